"""Texts that stand in a corpus twice, or nearly.

Each text gets a print: a number for its words, one for its numbers, and 64 minima of hashed pairs of words (MinHash,
Broder 1997), 16 bits each. Four minima make a band; texts that share one of 16 bands are candidates, and of those the
share of equal minima estimates the Jaccard index of their pairs of words. From 0.75 on a text is a near duplicate of
the earlier one, unless their numbers differ: "5 mg" and "50 mg" are two texts. Of fewer than 30 words only equal ones
repeat each other: there one word, such as "left" or "increased", may be all that a text says. A pair with an index of
0.8 becomes a candidate with probability 0.9998, and one of 0.5 with 0.64, which the estimate then tells apart.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from distil_jax.data.words import hashes, runs, whole

BANDS = 16
MINIMA = 4 * BANDS
NEAR = 0.75  # share of equal minima
FEWEST = 30  # words
WIDTH = 2 + BANDS  # numbers of a print
_SEED = 1
_RECENT = 8192  # texts that are looked up in a dict before they are sorted into a level
_NUMBER = re.compile(r"\d+")

Prints = UInt64[np.ndarray, "n 18"]


def prints(texts: Sequence[tuple[str, list[str]]]) -> Prints:
    """The prints of texts, each with its words (words.words_of); the same in every process."""
    import rensa

    made = np.zeros((len(texts), WIDTH), np.uint64)
    if not texts:
        return made
    pairs = []
    for n, (text, words) in enumerate(texts):
        made[n, 0] = whole(words)
        made[n, 1] = whole(_NUMBER.findall(text)) if len(words) >= FEWEST else made[n, 0]
        pairs.append(runs(hashes(words), min(2, max(1, len(words)))))
    offsets = np.cumsum([0, *map(len, pairs)], dtype=np.uint64)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(pairs), offsets, MINIMA, _SEED)
    minima = np.asarray(digests.to_rows(), np.uint32)
    short = ((minima >> 16) ^ minima).astype(np.uint16)
    made[:, 2:] = np.ascontiguousarray(short).view(np.uint64)
    return made


class Seen:
    """The texts so far. First come stays: a text that repeats one of them is not remembered itself.

    Takes 290 bytes a text that stays, its print, and each band's key with the text's number, sorted; while the array of
    prints grows, twice its part of that.
    """

    def __init__(self, near: bool = True):
        self.near = near
        self.count = 0  # of texts that were shown
        self._kept = 0
        self._prints = np.zeros((1024, WIDTH), np.uint64)  # of those that stay
        self._number = np.zeros(1024, np.int64)  # which of the shown it was
        self._levels: list[tuple[np.ndarray, np.ndarray]] = []  # (sorted keys [17, m], places [17, m])
        self._recent: list[dict[int, int]] = [{} for _ in range(1 + BANDS)]
        self._recent_from = 0

    def admit(self, prints: Prints, stays: Callable[[int], bool] = lambda n: True) -> Int64[np.ndarray, " n"]:
        """For each text, in order, the number of the earlier one that it repeats, or -1 if it is new. Numbers count all
        texts shown, from 0. `stays`: asked of each that is new; one that does not stay for another reason is not
        remembered. The result does not depend on how many texts are shown at once.
        """
        keys = _keys(prints)
        older, start = self._in_levels(keys), 0  # of the texts from `start` on
        found = np.full(len(prints), -1, np.int64)
        for n in range(len(prints)):
            places = set(older[n - start][older[n - start] >= 0].tolist())
            places |= {place for band, key in zip(self._recent, keys[n].tolist(), strict=True)
                       if (place := band.get(key)) is not None}  # fmt: skip
            place = self._first_equal(prints[n], places)
            if place >= 0:
                found[n] = self._number[place]
            elif stays(n):
                self._keep(prints[n], keys[n], self.count + n)
                if self._kept - self._recent_from == _RECENT:
                    self._sort_in()
                    older, start = self._in_levels(keys[n + 1 :]), n + 1
        self.count += len(prints)
        return found

    def _first_equal(self, print_: np.ndarray, places: set[int]) -> int:
        for place in sorted(places):
            other = self._prints[place]
            if other[0] == print_[0]:
                return place
            if self.near and other[1] == print_[1]:
                same = np.mean(other[2:].view(np.uint16) == print_[2:].view(np.uint16))
                if same >= NEAR:
                    return place
        return -1

    def _keep(self, print_: np.ndarray, keys: np.ndarray, number: int) -> None:
        if self._kept == len(self._prints):
            self._prints = np.concatenate([self._prints, np.zeros_like(self._prints)])
            self._number = np.concatenate([self._number, np.zeros_like(self._number)])
        self._prints[self._kept], self._number[self._kept] = print_, number
        for band, key in zip(self._recent, keys.tolist(), strict=True):
            band.setdefault(key, self._kept)
        self._kept += 1

    def _sort_in(self) -> None:
        """The recent texts become a level; levels of one size become one, so there are few."""
        keys = _keys(self._prints[self._recent_from : self._kept]).T
        places = np.broadcast_to(np.arange(self._recent_from, self._kept, dtype=np.uint32), keys.shape)
        self._recent_from = self._kept
        for band in self._recent:
            band.clear()
        while self._levels and self._levels[-1][0].shape[1] <= keys.shape[1]:
            other_keys, other_places = self._levels.pop()
            keys, places = np.concatenate([other_keys, keys], 1), np.concatenate([other_places, places], 1)
        order = np.argsort(keys, axis=1, kind="stable")
        self._levels.append((np.take_along_axis(keys, order, 1), np.take_along_axis(places, order, 1)))

    def _in_levels(self, keys: np.ndarray) -> Int64[np.ndarray, "n c"]:
        """The first text with the same key, in each level and band; -1 for none."""
        found = np.full((len(keys), len(self._levels) * (1 + BANDS)), -1, np.int64)
        column = 0
        for level, places in self._levels:
            for band in range(1 + BANDS):
                at = np.minimum(np.searchsorted(level[band], keys[:, band]), level.shape[1] - 1)
                found[:, column] = np.where(level[band][at] == keys[:, band], places[band][at].astype(np.int64), -1)
                column += 1
        return found


def _keys(prints: Prints) -> np.ndarray:
    """uint32[n, 17]: of the whole text and of each band."""
    chosen = prints[:, [0, *range(2, WIDTH)]]
    return (chosen ^ (chosen >> np.uint64(32))).astype(np.uint32)
