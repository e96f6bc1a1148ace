"""Teacher scores on disk: for every position of the teacher that a student needs, its K likeliest tokens and the rest.

One file for each shard of the corpus, of the same name, one record for each packed row, in the same order. Which
positions a record holds is not stored: `needed` finds them in the corpus' row. A record is, little-endian,

    uint32 n             positions
    uint16 [n, K]        low 16 bits of the ids, likeliest first
    uint8  [n, K / 4]    their high 2 bits, four ids to a byte, the first in the lowest bits
    uint16 [n, K]        logits as steps below the largest (losses/stored.py)
    float32 [n, T]       log of the summed exp(z / tau) of all other tokens, at each stored temperature
    float16 [n, T]       its slope in 1 / tau; only if there is more than one temperature

which makes 4 K + K / 4 + 4 T (+ 2 T) bytes a position: 276 for K = 64 and one temperature, 296 for four.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt16
from ml_collections import ConfigDict

from distil_jax.data.loader import check_file
from distil_jax.errors import UserError
from distil_jax.tokens.align import NONE

ID_BITS = 18
MODES = ("online", "stored")  # of teacher.scores
_AGAIN = "delete the scores folder and run `distil-jax score` again"


@dataclass(frozen=True)
class Layout:
    """What a record holds of each position: K tokens, and the rest at some temperatures, ascending."""

    top_k: int
    temperatures: tuple[float, ...]

    @property
    def slopes(self) -> int:
        """How many slopes are stored: none where nothing is interpolated."""
        return len(self.temperatures) if len(self.temperatures) > 1 else 0

    @property
    def position_bytes(self) -> int:
        return 4 * self.top_k + -(-self.top_k // 4) + 4 * len(self.temperatures) + 2 * self.slopes

    def pack(
        self,
        ids: Int32[np.ndarray, "n K"],
        codes: UInt16[np.ndarray, "n K"],
        rest: Float32[np.ndarray, "n T 2"],
    ) -> bytes:
        """The record of one row. rest: log R and slope, as `stored.rest_of` gives them."""
        n = len(ids)
        if ids.shape != (n, self.top_k) or codes.shape != ids.shape or rest.shape != (n, len(self.temperatures), 2):
            raise ValueError(f"{ids.shape}, {codes.shape}, {rest.shape} are not scores of {self}")
        low, high = pack_ids(ids)
        slopes = rest[:, : self.slopes, 1]
        parts = (np.array(n, "<u4"), low, high, codes.astype("<u2"), rest[..., 0].astype("<f4"), slopes.astype("<f2"))
        return b"".join(part.tobytes() for part in parts)

    def unpack(self, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, codes, rest) of a record, exactly as they were packed. Raises ValueError if it has another size."""
        n = int(np.frombuffer(record, "<u4", 1)[0]) if len(record) >= 4 else -1
        if len(record) != 4 + n * self.position_bytes:
            raise ValueError(f"a record of {len(record)} bytes is none of {n} positions of {self.position_bytes}")
        K, T, at, parts = self.top_k, len(self.temperatures), 4, []
        for dtype, width in (("<u2", K), ("u1", -(-K // 4)), ("<u2", K), ("<f4", T), ("<f2", self.slopes)):
            part = np.frombuffer(record, dtype, n * width, at).reshape(n, width)
            at += part.nbytes
            parts.append(part)
        low, high, codes, values, slopes = parts
        rest = np.zeros((n, T, 2), np.float32)
        rest[..., 0], rest[:, : self.slopes, 1] = values, slopes
        return unpack_ids(low, high, K), codes.astype(np.uint16), rest


def pack_ids(ids: Int32[np.ndarray, "n K"]) -> tuple[UInt16[np.ndarray, "n K"], np.ndarray]:
    """Low 16 bits, uint16 [n, K], and high 2 bits, uint8 [n, ceil(K / 4)]. UserError for an id of more than 18 bits."""
    if ids.size and not (ids.min() >= 0 and ids.max() < 1 << ID_BITS):
        raise UserError(
            f"teacher token ids reach from {ids.min()} to {ids.max()}, stored scores have room for 0 to "
            f"{(1 << ID_BITS) - 1}: use teacher.scores=online with this teacher"
        )
    quads = np.pad(ids >> 16, ((0, 0), (0, -ids.shape[1] % 4))).reshape(len(ids), -(-ids.shape[1] // 4), 4)
    return (ids & 0xFFFF).astype("<u2"), (quads << np.array([0, 2, 4, 6])).sum(-1).astype(np.uint8)


def unpack_ids(low: UInt16[np.ndarray, "n K"], high: np.ndarray, count: int) -> Int32[np.ndarray, "n K"]:
    """The inverse of `pack_ids`, for `count` ids a row."""
    bits = (high[..., None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return low.astype(np.int32) | (bits.reshape(len(high), high.shape[1] * 4)[:, :count].astype(np.int32) << 16)


def needed(row: Mapping[str, np.ndarray]) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " Ls"]]:
    """The teacher's positions that the supervised tokens of a packed row refer to, ascending, and for each student
    position the index of its own among them (0 where it has none).

    Roots, interiors and crossings alike: an interior token speaks of the same teacher position as the root before it,
    so all of them together are under 1 % more than the roots alone.
    """
    asks = (row["student_weights"] > 0) & (row["role"] != NONE)
    positions, index = np.unique(row["teacher_position"][asks], return_inverse=True)
    slot = np.zeros(asks.shape, np.int32)
    slot[asks] = index
    return positions.astype(np.int32), slot


class Scores:
    """The scores of a corpus, row by row, as fields of fixed shape that a `Loader` adds to its batches.

    score_ids    int32 [P, K]          teacher token ids
    score_codes  uint16 [P, K]         logits as steps below the largest
    score_rest   float32 [P, T, 2]     log R and its slope
    score_slot   int32 [Ls]            which of the P each student position refers to

    P is the largest number of positions that a row of this corpus needs; what a row has less is filled up with zeros,
    to which no slot of a position with a role points.
    """

    def __init__(
        self, directory: str | Path, manifest: Mapping[str, Any], corpus: Mapping[str, Any], *, verify: bool = True
    ):
        """manifest: of the scores; corpus: the manifest part of the shards that they belong to.

        verify: read every file once and compare checksums; sizes and record counts are always compared.
        Raises UserError naming the file that is missing, damaged, or of another corpus.
        """
        self.layout = Layout(manifest["top_k"], tuple(manifest["temperatures"]))
        self.positions = manifest["most"]
        self.records = corpus["records"]
        entries = {entry["name"]: entry for entry in manifest["files"]}
        paths = []
        for shard in corpus["files"]:
            path = Path(directory) / shard["name"]
            entry = entries.get(shard["name"])
            if entry is None or (entry["corpus_sha256"], entry["records"]) != (shard["sha256"], shard["records"]):
                raise UserError(f"score file {path} is not of the corpus' shard {shard['name']}: {_AGAIN}")
            check_file(path, entry, verify, _AGAIN)
            paths.append(str(path))
        self._paths, self._starts = paths, np.cumsum([shard["records"] for shard in corpus["files"]])
        self._source = grain.sources.ArrayRecordDataSource(paths)

    def fields(self, number: int, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What row `number` of the corpus, `row`, gets. Raises UserError if its record is not of that row."""
        positions, slot = needed(row)
        try:
            ids, codes, rest = self.layout.unpack(self._source[number])
        except ValueError as error:
            raise UserError(f"score file {self._file(number)}: {error}: {_AGAIN}") from error
        if len(ids) != len(positions) or len(ids) > self.positions:
            raise UserError(
                f"score file {self._file(number)} holds {len(ids)} positions for a row that needs {len(positions)}: "
                f"{_AGAIN}"
            )
        filled = {"score_ids": ids, "score_codes": codes, "score_rest": rest}
        room = self.positions - len(ids)
        filled = {name: np.pad(x, ((0, room),) + ((0, 0),) * (x.ndim - 1)) for name, x in filled.items()}
        return filled | {"score_slot": slot}

    def _file(self, number: int) -> str:
        return self._paths[int(np.searchsorted(self._starts, number, side="right"))]


def total(files: Sequence[Mapping[str, Any]], name: str) -> int:
    """The sum of one count over all files."""
    return sum(entry[name] for entry in files)


def check(config: ConfigDict) -> None:
    """Raises UserError for settings of stored scores that training would stumble over."""
    s, o, mode = config.score, config.objective, config.teacher.scores
    temperatures = tuple(s.temperatures)
    if mode not in MODES:
        raise UserError(f"teacher.scores is {mode!r}: use {' or '.join(MODES)}")
    if s.top_k < 1:
        raise UserError(f"score.top_k={s.top_k} must be at least 1")
    if 1.0 not in temperatures or temperatures != tuple(sorted(set(temperatures))) or temperatures[0] <= 0:
        raise UserError(
            f"score.temperatures={temperatures}: give ascending numbers above 0 with 1.0 among them, at which runs are "
            "compared"
        )
    if mode == "online":
        return
    if max(o.beta.start, o.beta.end, o.hidden_states) > 0:
        raise UserError(
            "objective.beta and objective.hidden_states need maps and states of the teacher, which are not stored: set "
            "both to 0, or teacher.scores=online"
        )
    if o.positions == "all":
        raise UserError(
            "objective.positions='all' asks the teacher what follows inside its tokens, which is not stored: set it to "
            "'boundaries' or 'roots', or teacher.scores=online"
        )
    if o.top_k > s.top_k:
        raise UserError(f"objective.top_k={o.top_k}, but only score.top_k={s.top_k} tokens are stored")
    reached = {o.temperature.start} | ({o.temperature.end} if o.temperature.kind != "constant" else set())
    if min(reached) < temperatures[0] or max(reached) > temperatures[-1]:
        raise UserError(
            f"objective.temperature reaches from {min(reached):g} to {max(reached):g}, score.temperatures only from "
            f"{temperatures[0]:g} to {temperatures[-1]:g}: add what is missing and run `distil-jax score` again"
        )


def summary(temperatures: tuple[float, ...], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says of all files together: entries of `loader.write_file` with what score.Counts adds."""
    layout = Layout(files[0]["top_k"], temperatures)
    sampled = [f["error"] for f in files if f["error"]["positions"]]
    weights = [e["positions"] for e in sampled]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=weights)) if sampled else 0.0

    def over(name: str) -> dict[str, float]:
        return {
            "max": max((e[name]["max"] for e in sampled), default=0.0),
            "mean": mean([e[name]["mean"] for e in sampled]),
        }

    error = {"positions": sum(weights), "log_prob": over("log_prob"), "loss": over("loss")}
    return {
        "top_k": layout.top_k,
        "temperatures": list(temperatures),
        "records": total(files, "records"),
        "positions": total(files, "positions"),
        "most": max(f["most"] for f in files),
        "tokens": total(files, "tokens"),
        "bytes": total(files, "bytes"),
        "bytes_per_position": layout.position_bytes,
        "bytes_per_token": round(total(files, "bytes") / max(total(files, "tokens"), 1), 2),
        "clamped": total(files, "clamped"),
        "error": error | {"loss_value": mean([e["loss_value"] for e in sampled])},
        "files": list(files),
    }
