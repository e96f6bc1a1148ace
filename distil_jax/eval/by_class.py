"""What a model makes of words, digits, spaces and punctuation: bits per byte and accuracy by class of token.

The classes (tokens/align.py, token_classes) are those of the student's tokens, for every model, so that all are
measured over the same bytes and can be subtracted:

bits: a student's are its tokens' own. The bits of a teacher's token are spread evenly over its bytes and fall to the
    student tokens that hold them. Over the classes they add up to the whole. Where both tokenizers keep a class to
    itself, as Gemma and Llama do with digits, nothing is shared out between classes.
accuracy: how often a token is the most likely one, over all tokens of a class and not at root positions alone, since
    a number of several digits crosses the teacher's tokens. The teacher is right about a student's token where it is
    right about every token of its own that holds one of those bytes: it would have written it. Where its token is the
    longer one it must be right about more.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from distil_jax.eval import bootstrap
from distil_jax.tokens.align import CLASSES


@dataclass(frozen=True)
class Spans:
    """The supervised text tokens of one side, document after document in the order of the text.

    place_N: where each stands in the flattened packed rows. document_N: 0..D-1. size_N: its bytes, at least 1.
    """

    place_N: Int[np.ndarray, " N"]
    document_N: Int[np.ndarray, " N"]
    size_N: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, document_RxL: Int[np.ndarray, "R L"], size_RxL: Int[np.ndarray, "R L"]) -> "Spans":
        """size: bytes of the supervised text token at each place, 0 where there is none."""
        place = np.flatnonzero(size_RxL.ravel() > 0)
        place = place[np.argsort(document_RxL.ravel()[place], kind="stable")]  # a document lies within one row
        return cls(place, document_RxL.ravel()[place], size_RxL.ravel()[place].astype(np.int64))

    def at(self, values_RxL: np.ndarray) -> np.ndarray:
        """The values of the tokens, [N]."""
        return values_RxL.ravel()[self.place_N]

    def starts(self) -> np.ndarray:
        """First byte of each token in the text of all documents, [N]."""
        return np.cumsum(self.size_N) - self.size_N


def carried(values_N: np.ndarray, of: Spans, onto: Spans, join: np.ufunc) -> np.ndarray:
    """Values of the bytes of one side's tokens, joined over the bytes of each token of the other side, [N of onto]."""
    if of.size_N.sum() != onto.size_N.sum():
        raise AssertionError("both sides must hold the same bytes")
    return join.reduceat(np.repeat(values_N, of.size_N), onto.starts()) if len(onto.size_N) else values_N[:0]


@dataclass(frozen=True)
class ClassScores:
    """One model's sums by class and document."""

    bits_CxD: Float[np.ndarray, "C D"]
    right_CxD: Float[np.ndarray, "C D"]


class ByClass:
    """The tokens of the test rows by class. class_N: index into CLASSES of each student token; documents: D."""

    def __init__(self, student: Spans, teacher: Spans, class_N: Int[np.ndarray, " N"], documents: int):
        self.student, self.teacher, self.documents = student, teacher, documents
        self.cell_N = class_N.astype(np.int64) * documents + student.document_N
        self.bytes_CxD = self._sum(student.size_N)
        self.tokens_CxD = self._sum(np.ones_like(student.size_N))
        self.present = [i for i in range(len(CLASSES)) if self.tokens_CxD[i].any()]

    def _sum(self, values_N: np.ndarray) -> np.ndarray:
        size = len(CLASSES) * self.documents
        return np.bincount(self.cell_N, values_N.astype(np.float64), minlength=size).reshape(len(CLASSES), -1)

    def scores(self, side: str, nats_RxL: Float[np.ndarray, "R L"], right_RxL: Bool[np.ndarray, "R L"]) -> ClassScores:
        """Of a model on a side: nats and whether the most likely token was the true one, at its own tokens."""
        if side == "student":
            nats_N, right_N = self.student.at(nats_RxL), self.student.at(right_RxL)
        else:
            of = self.teacher
            nats_N = carried(of.at(nats_RxL) / of.size_N, of, self.student, np.add)
            right_N = carried(of.at(right_RxL), of, self.student, np.logical_and)
        return ClassScores(self._sum(nats_N) / np.log(2), self._sum(right_N))

    def sizes(self) -> dict[str, dict[str, int]]:
        """Tokens and bytes of each class that the text has."""
        return {
            CLASSES[i]: {"tokens": int(self.tokens_CxD[i].sum()), "bytes": int(self.bytes_CxD[i].sum())}
            for i in self.present
        }

    def measures(self, scores: ClassScores, samples: int) -> dict[str, dict[str, float | list[float]]]:
        """bits_per_byte and accuracy of each class, with their intervals over documents."""
        return self._each(scores, None, samples, "bits_per_byte_interval")

    def difference(
        self, other: ClassScores, scores: ClassScores, samples: int
    ) -> dict[str, dict[str, float | list[float]]]:
        """The same of `other` less this model's, paired by document. Above 0 in bits, below 0 in accuracy: this one is
        better."""
        return self._each(other, scores, samples, "interval")

    def _each(self, scores: ClassScores, minus: ClassScores | None, samples: int, named: str) -> dict[str, dict]:
        found = {}
        for i in self.present:
            less = (None, None) if minus is None else (minus.bits_CxD[i], minus.right_CxD[i])
            bits, bits_interval = bootstrap.ratio(scores.bits_CxD[i], self.bytes_CxD[i], minus=less[0], samples=samples)
            right, right_interval = bootstrap.ratio(
                scores.right_CxD[i], self.tokens_CxD[i], minus=less[1], samples=samples
            )
            found[CLASSES[i]] = {
                "bits_per_byte": bits,
                named: bits_interval,
                "accuracy": right,
                "accuracy_interval": right_interval,
            }
        return found
