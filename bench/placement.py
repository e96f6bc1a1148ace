"""How evenly W's entries lie on the shards of a spread vocabulary.

Cut into ranges, dealt out like cards, and dealt with the heavy tokens apart (kd.place), which is what the head does.

    python bench/placement.py TEACHER_TOKENIZER STUDENT_TOKENIZER

Prints rows on the fullest shard over the mean, for W from bytes and first pieces (every teacher token has one entry).
"""

import sys

import numpy as np

from distil_jax.losses.kd import place
from distil_jax.losses.vocabulary import Shards
from distil_jax.projection import Projection
from distil_jax.tokens.bytes import ByteTable


def main(teacher: str, student: str) -> None:
    W = Projection.build(teacher=ByteTable.from_tokenizer(teacher), student=ByteTable.from_tokenizer(student))
    table = W.table()
    students = np.asarray(table.student_ids)
    print(f"{len(students):,} entries, {W.student_vocab:,} student tokens")
    for size in (4, 16, 64, 256):
        cut = np.bincount(students // -(-W.student_vocab // size), minlength=size)
        placed = place(table, Shards(("fsdp",), size))
        dealt = np.asarray(placed.weights).reshape(size, -1).astype(bool).sum(1)
        straight = np.bincount(students % size, minlength=size)
        fullest = [f"{x.max() / x.mean():.2f}" for x in (cut, straight, dealt)]
        cells = "   ".join(f"{name} {value}" for name, value in zip(("cut", "dealt", "placed"), fullest, strict=True))
        print(f"{size:4d} shards   {cells}   {len(placed.heavy)} heavy tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
