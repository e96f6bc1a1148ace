"""Other ways to compare two models with different tokenizers: what the field has, on the same aligner, to be measured
against the project's own objective (`objective.kind`; docs/rivals.md).

    strict     KL over byte-identical tokens, one-to-one positions      rivals/strict.py
    uld        sorted probabilities                                     rivals/uld.py
    gold       groups: JSD on matched tokens, sorted rest               rivals/gold.py
    xtoken_p   the student in the teacher's vocabulary                  rivals/xtoken.py
    xtoken_h   pairs by that map, sorted rest                           rivals/xtoken.py
    alm        likelihood of chunks                                     rivals/alm.py
    bpm        longest byte prefixes                                    rivals/bpm.py
    mlp        the paper's projection                                   rivals/learned.py
    low_rank   a stochastic W of low rank                               rivals/learned.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from distil_jax.losses.rivals import alm, bpm, gold, learned, strict, uld, xtoken
from distil_jax.losses.rivals.stream import Sides, Told
from distil_jax.sharding import BATCH_AXES

__all__ = ["KINDS", "RIVALS", "Rival", "Sides", "Told", "divergence"]


@dataclass(frozen=True)
class Rival:
    """One objective.

    tables: `(teacher, student) -> arrays` that the others read, from two ByteTables, on the host.
    taught: `(tables, batch) -> bool [B, L]`, the student positions that give up cross-entropy for it.
    told: `(tables, parameters, sides, batch, temperature, text_vocab=, block=) -> Told`.
    start: `(key, teacher rows, student unigram [Vs], size) -> parameters`; None: it learns nothing.
    softened: whether the temperature of the step is in its softmaxes, and tau^2 before it.
    """

    tables: Callable[..., Any]
    taught: Callable[..., Array]
    told: Callable[..., Told]
    start: Callable[..., dict[str, Array]] | None = None
    softened: bool = True


RIVALS = {
    "strict": Rival(strict.tables, strict.taught, strict.told),
    "uld": Rival(uld.tables, uld.taught, uld.told),
    "gold": Rival(gold.tables, gold.taught, gold.told),
    "xtoken_p": Rival(xtoken.projected_tables, xtoken.taught, xtoken.projected),
    "xtoken_h": Rival(xtoken.hybrid_tables, xtoken.taught, xtoken.hybrid),
    "alm": Rival(alm.tables, alm.taught, alm.told, softened=False),
    "bpm": Rival(bpm.tables, bpm.taught, bpm.told),
    "mlp": Rival(learned.tables, learned.taught, learned.told_mlp, learned.start_mlp),
    "low_rank": Rival(learned.tables, learned.taught, learned.told_low_rank, learned.start_low_rank),
}
KINDS = ("projected", *RIVALS)  # of objective.kind


def divergence(
    rival: Rival,
    tables: Any,
    parameters: Any,
    sides: Sides,
    batch: dict[str, Array],
    temperature: Float[Array, ""],
    *,
    text_vocab: int,
    block: int = 0,
    mesh: Mesh | None = None,
    **options: Any,
) -> Told:
    """What a rival makes of a batch. Gradients flow into the student's side and the rival's parameters.

    text_vocab: rows of the student's head that are tokens. block: positions whose logits exist at one time; 0 chooses.
    mesh: rows of the batch lie over its batch axes, the vocabularies are whole on each device.
    """

    def local(tables, parameters, sides, batch, temperature):
        return rival.told(tables, parameters, sides, batch, temperature, text_vocab=text_vocab, block=block, **options)

    arguments = (tables, parameters, sides, batch, temperature)
    if mesh is None:
        return local(*arguments)
    rows, whole = PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.axis_names)), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, Sides(rows, whole, rows, whole), rows, whole),
        out_specs=rows,
        check_vma=False,
    )(*arguments)
