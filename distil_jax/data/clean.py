"""Mending a text, and refusing what is no text to learn from.

Mending changes how a text is written and not what it says: wrongly decoded UTF-8 (ftfy), HTML entities, composed
characters (NFC), line ends, invisible characters, blank lines. Quotation marks, ligatures and wide letters stay.
"""

import re
import unicodedata
from typing import NamedTuple

import ftfy

_CONFIG = ftfy.TextFixerConfig(
    unescape_html=True, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
    fix_line_breaks=True, remove_control_chars=True, remove_terminal_escapes=True, normalization="NFC", explain=False,
)  # fmt: skip
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\u00ad]")  # not the joiners, which scripts need
_TRAILING = re.compile(r"[ \t]+(?=\n)")
_BLANK = re.compile(r"\n{3,}")
_SUSPECT = re.compile(r"[^\t\n -~]|&[a-zA-Z#]|[ \t]\n|\n\n\n")  # anything else is left as it is
_LETTERS = re.compile(r"[^\W\d_]+")
# English text has these in every line; Latin terms, drug lists and other languages that share letters do not.
_COMMON = frozenset(
    "the of and with for by are which from that this not was can what following has most does how due have".split()
)
_JUDGED = 200  # letters: a shorter text is not judged
_SHARE = 0.06  # of common words, from which on a text is English without a further look
_SURE = 0.99
_LOOKED_AT = 1000  # characters
_LATIN = "\u03ff"  # the last of the Latin and Greek letters


class Limits(NamedTuple):
    """shortest: characters of the completion; longest: of prompt and completion together; english: refuse others."""

    shortest: int = 1
    longest: int = 200_000
    english: bool = True


def repaired(text: str) -> str:
    """The text, mended. Its ends are left as they are."""
    if not _SUSPECT.search(text):
        return text
    if not text.isascii() or "&" in text or "\r" in text or "\x1b" in text or not text.isprintable():
        text = ftfy.fix_text(text, _CONFIG)
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return _BLANK.sub("\n\n", _TRAILING.sub("", text))


def refusal(prompt: str, completion: str, limits: Limits) -> tuple[str, str] | None:
    """(reason, detail) for a row that should not be learned from; None for the others."""
    length = len(prompt) + len(completion)
    if not completion.strip():
        return "empty text", "nothing is left of the completion"
    if len(completion.strip()) < limits.shortest:
        return "too short", f"{len(completion.strip())} characters, at least {limits.shortest} are asked for"
    if length > limits.longest:
        return "gigantic", f"{length} characters, at most {limits.longest} are taken"
    if limits.english and (language := other_language(f"{prompt} {completion}")):
        return "another language", language
    return None


def other_language(text: str) -> str | None:
    """The language if the text is surely not English (its code by py3langid, Lui and Baldwin 2012); None otherwise.

    Texts of fewer than 200 letters are not judged, nor those in which every sixteenth word is one that English text is
    full of; only for the others is the classifier asked, and believed from a probability of 0.99 on.
    """
    words = _LETTERS.findall(text[:_LOOKED_AT])
    letters = sum(map(len, words))
    if letters < _JUDGED:
        return None
    if not text.isascii() and sum(len(word) for word in words if word[0] > _LATIN) > letters / 2:
        return "most of it is not in Latin letters"
    if sum(map(_COMMON.__contains__, map(str.lower, words))) >= _SHARE * len(words):
        return None
    language, probability = _identifier().classify(text[:_LOOKED_AT])
    return language if language not in ("en", "la") and probability >= _SURE else None


_identifiers: list = []  # loading the model takes a second, so it waits for the first doubtful text


def _identifier():
    if not _identifiers:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        _identifiers.append(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))
    return _identifiers[0]
