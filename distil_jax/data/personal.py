"""Personal data in a text: e-mail addresses, telephone numbers, dates of birth, names, identity numbers.

Rules of ours: the models of the libraries for this are no packages, so a corpus would depend on a download. They look
for what people write of themselves in a forum; tests/test_personal.py measures what they find and what they mistake.
"""

import re
from collections import Counter
from typing import NamedTuple

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:19|20)\d\d"
_DATE = (
    rf"(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)?\d\d|{_YEAR}-\d\d-\d\d"
    rf"|{_DAY}\s+{_MONTH},?\s+{_YEAR}|{_MONTH}\s+{_DAY},?\s+{_YEAR})"
)
_NAME = r"(?:[A-Z]'[A-Z][a-z]+|[A-Z][a-z]+(?:-[A-Z][a-z]+)?)"
_RELATIVES = "son|daughter|husband|wife|mother|father|brother|sister|friend"
_RELATIVE = rf"[Mm]y (?:{_RELATIVES})"
# What stands after "Dr." or "Regards" and is no name.
_NO_NAME = frozenset(
    "A An The And Or But Not Very Sorry Sure Glad Happy Also Now Still Just Having Taking Getting Feeling Suffering "
    "Worried Pregnant Diabetic Male Female Married Single Trying Currently Writing From In On At Hello Hi Thanks Dear "
    "Welcome Your Google Search Advice Please Doctor Down Crohn Parkinson Alzheimer Hodgkin Graves Cushing "
    "Addison".split()
)

_RULES: tuple[tuple[str, re.Pattern], ...] = (
    ("EMAIL", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    (
        "DATE OF BIRTH",
        re.compile(
            r"\b(?:dob|d\.o\.b\.?|date of birth|birth ?date|birthday|born(?: on)?)\b\W{0,3}(?:is|was|on)?\W{0,2}"
            rf"({_DATE})",
            re.I,
        ),
    ),
    (
        "IDENTITY NUMBER",
        re.compile(
            r"\b\d{3}-\d{2}-\d{4}\b"
            r"|(?i:\b(?:ssn|passport|mrn|medical record|insurance|patient id|aadhaar)\b(?:\s+(?:no|number|id))?"
            r"\W{0,3}(?:is\W{0,2})?)([A-Z]{0,3}\d{5,12}|\d{4} \d{4} \d{4})\b"
        ),
    ),
    (
        "PHONE",
        re.compile(
            r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,5}\)[ .-]?|\d{3,5}[ .-])\d{3,4}[ .-]\d{3,4}(?![\w-])"
            r"|(?<![\w.])\+\d{1,3}[ .-]\d{4,5}[ .-]\d{4,6}(?![\w-])|(?<![\w.])\+\d{8,14}(?!\w)"
            r"|(?i:\b(?:call|phone|tel|telephone|mobile|cell|whatsapp|contact|number)[^\w+]{1,3}(?:me\W)?"
            r"(?:(?:at|on|is|no|number)[^\w+]{0,3}){0,2})(\+?\d{7,13})\b"
        ),
    ),
    (
        "NAME",
        re.compile(
            r"\b(?:[Mm]y name is|[Nn]ame\s*:|[Tt]his is|[Ii] am (?:called|named)|[Ii]'m called"
            rf"|{_RELATIVE}(?:'s name is|,| is called| named)"
            r"|[Dd]r\.?|[Mm]rs?\.|[Mm]s\.|[Dd]octor|[Rr]egards,?|[Ss]incerely,?|[Tt]hanks,|[Yy]ours,?)\s+"
            rf"({_NAME}(?:\s+(?:{_NAME}|[A-Z]\.?(?![a-z']))){{0,2}})"
        ),
    ),
)
_EPONYM = re.compile(r"'s?\s+(?:syndrome|disease|sign|test|palsy|chorea|lymphoma)|\s+(?:syndrome|disease|sign|test)\b")
_DIGITS = re.compile(r"\d\d\d")
# A rule is asked only where one of these stands in the text, in lower case: most texts hold none.
_SIGNS = {
    "EMAIL": ("@",),
    "DATE OF BIRTH": ("dob", "d.o.b", "birth", "born"),
    "NAME": (
        *("name", "called", "this is", "dr.", "dr ", "doctor", "mr.", "mrs.", "ms.", "regards", "sincerely", "thanks,"),
        *(f"my {relative}" for relative in _RELATIVES.split("|")),
        "yours",
    ),
}


class Span(NamedTuple):
    kind: str
    start: int
    end: int


def found(text: str) -> list[Span]:
    """What personal data the text holds, in order, without overlaps: the first rule that finds something keeps it."""
    spans: list[Span] = []
    lower, digits = text.lower(), _DIGITS.search(text) is not None
    for kind, rule in _RULES:
        if not (any(sign in lower for sign in _SIGNS[kind]) if kind in _SIGNS else digits):
            continue
        for match in rule.finditer(text):
            start, end = match.span(1) if match.lastindex else match.span()
            if kind == "NAME":
                if text[start:end].split()[0] in _NO_NAME or _EPONYM.match(text, end):
                    continue
            if all(end <= s.start or start >= s.end for s in spans):
                spans.append(Span(kind, start, end))
    return sorted(spans, key=lambda span: span.start)


def replaced(text: str) -> tuple[str, Counter]:
    """(the text with [EMAIL], [NAME] and so on in the place of what was found, how much of each kind)."""
    spans = found(text)
    out, at = [], 0
    for span in spans:
        out += [text[at : span.start], f"[{span.kind}]"]
        at = span.end
    return "".join([*out, text[at:]]), Counter(span.kind for span in spans)
