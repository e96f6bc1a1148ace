"""Which parameters of a model learn, and which stay as they are.

A frozen parameter is an input of the loss that nothing differentiates: it has no gradient, no optimiser state and no
place in the checkpoint, and the gradient's norm, to which clipping is relative, is the norm over what learns.
"""

from typing import Any

from distil_jax.errors import UserError, nearest


def split(params: dict[str, Any], prefixes: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what learns, what is frozen): two trees that `merge` makes one again.

    params: nested dicts with anything at the leaves (arrays, shapes, shardings).
    prefixes: dotted paths separated by commas, "embedding" or "embedding,layers.attention.q"; each freezes the
      parameter of that path or all below it. Layers are stacked: a path means that parameter in every layer.
    Raises UserError for a path that leads to nothing, and if nothing is left to learn.
    """
    wanted = [tuple(part.strip().split(".")) for part in prefixes.split(",") if part.strip()]
    known = _paths(params)
    for path in wanted:
        if path not in known:
            name = ".".join(path)
            raise UserError(
                f"training.freeze: no parameter {name!r}{nearest(name, map('.'.join, known), cutoff=0)}; "
                "paths are dotted and separated by commas"
            )
    learning, frozen = _split(params, (), set(wanted))
    if not learning:
        raise UserError(f"training.freeze={prefixes!r} freezes every parameter: leave something to learn")
    return learning, frozen


def merge(learning: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The whole tree that `split` took apart."""
    both = learning.keys() & frozen.keys()
    return {**learning, **frozen, **{name: merge(learning[name], frozen[name]) for name in both}}


def _paths(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path that leads to a parameter or to a dict of them."""
    found = []
    for name, inner in tree.items():
        found.append((*above, name))
        if isinstance(inner, dict):
            found += _paths(inner, (*above, name))
    return found


def _split(tree: dict[str, Any], above: tuple[str, ...], wanted: set[tuple[str, ...]]) -> tuple[dict, dict]:
    learning: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for name, inner in tree.items():
        path = (*above, name)
        if path in wanted:
            frozen[name] = inner
        elif isinstance(inner, dict):
            parts = _split(inner, path, wanted)
            for side, part in zip((learning, frozen), parts, strict=True):
                if part:
                    side[name] = part
        else:
            learning[name] = inner
    return learning, frozen
