"""How often each source is read: its weight, a temperature over the sizes of the sources, a cap.

A source is read `copies` times in one pass over the corpus: the whole part counts for every one of its rows, the rest
for the rows that a hash of their ids chooses, the same on every machine. Only training rows are repeated or left out.
"""

from collections.abc import Mapping

from distil_jax.data.rows import stable_fraction
from distil_jax.errors import UserError, nearest


def copies(
    rows: Mapping[str, int], *, weights: Mapping[str, float], temperature: float = 1.0, cap: int = 0, most: float = 4.0
) -> dict[str, float]:
    """How often each source is read.

    rows: source -> training rows. With a temperature T above 1 small sources are read more often, in proportion to
    `n^(1/T)` with the largest source read once (Conneau et al. 2020, section 3.1, with 1/T for alpha), but at most
    `most` times; `weights` multiply that. cap: a source counts for at most so many rows; 0: for all.

    Raises UserError for the weight of a source that is not there.
    """
    for name in weights:
        if name not in rows:
            raise UserError(
                f"config.data.weights names {name!r}{nearest(name, rows)}; the corpus has {', '.join(sorted(rows))}"
            )
    if temperature < 1:
        raise UserError(f"config.data.temperature is {temperature}: 1 keeps the sizes of the sources, more evens them")
    counted = {name: min(n, cap) if cap else n for name, n in rows.items() if n}
    largest = max(counted.values(), default=0)
    made = {}
    for name, n in counted.items():
        evened = min((n / largest) ** (1 / temperature - 1), most)
        made[name] = weights.get(name, 1.0) * evened * n / rows[name]
    return made | {name: 0.0 for name, n in rows.items() if not n}


def copies_of_row(row_id: str, of_source: float) -> int:
    """How often this row is read."""
    whole = int(of_source)
    return whole + (stable_fraction(row_id, "mixture") < of_source - whole)
