"""Texts as sequences of words that case, punctuation and spacing do not change, and numbers for runs of words."""

import hashlib
import re
import zlib

import numpy as np
from jaxtyping import UInt64

_WORD = re.compile(r"\w+")
_REMEMBERED = 200_000  # words
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words, case-folded; numbers are words."""
    return _WORD.findall(text.casefold())


class _Hashes(dict[str, int]):
    """Word -> a number below 2^64, remembered: a corpus says the same words again and again."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        crc = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        found = self[word] = (crc + 1) * int(_BASE) & 0xFFFF_FFFF_FFFF_FFFF
        return found


_hashes = _Hashes()


def hashes(words: list[str]) -> UInt64[np.ndarray, " n"]:
    """A number for each word, the same in every process."""
    return np.array(list(map(_hashes.__getitem__, words)), np.uint64)


def runs(word_hashes: UInt64[np.ndarray, " n"], length: int) -> UInt64[np.ndarray, " m"]:
    """A number for each run of `length` words; none if there are fewer."""
    count = len(word_hashes) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for at in range(length):
        total = total * _BASE + (word_hashes[at : at + count] ^ (word_hashes[at : at + count] >> np.uint64(29)))
    return total ^ (total >> np.uint64(31))


def whole(words: list[str]) -> int:
    """A number below 2^64 for the whole sequence, the same in every process."""
    said = " ".join(words).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")
