"""Promise: a batch is a function of (seed, step) alone, every row comes once an epoch, and a damaged shard is named."""

import json
import os
import threading
from itertools import islice

import numpy as np
import pytest
from jaxtyping import Int32

from distil_jax.data.loader import Loader, write_shards
from distil_jax.errors import UserError

R, LENGTHS = 23, {"student_tokens": 5, "student_segment_ids": 5, "role": 5, "teacher_tokens": 7}


def some_rows(count: int = R) -> dict[str, np.ndarray]:
    """Rows whose first student token is their number, from 1."""
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(-(2**31), 2**31, (count, length)).astype(np.int32) for name, length in LENGTHS.items()}
    rows["student_tokens"][:, 0] = np.arange(1, count + 1)
    rows["student_segment_ids"] = np.ones((count, 5), np.int32)
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """(directory, manifest part) of 23 rows in files of 10, 10 and 3. Tests read only."""
    directory = tmp_path_factory.mktemp("shards")
    return directory, write_shards(some_rows(), directory, "train", rows_per_shard=10)


def numbers(batch) -> list[int]:
    return batch["student_tokens"][:, 0].tolist()


def test_the_manifest_part_says_what_was_written(shards):
    directory, part = shards
    assert part["fields"] == LENGTHS and part["records"] == R
    assert [(f["name"], f["records"]) for f in part["files"]] == [
        ("train-00000-of-00003.arrayrecord", 10),
        ("train-00001-of-00003.arrayrecord", 10),
        ("train-00002-of-00003.arrayrecord", 3),
    ]
    assert sorted(p.name for p in directory.iterdir()) == [f["name"] for f in part["files"]]  # nothing partial is left
    assert all((directory / f["name"]).stat().st_size == f["bytes"] for f in part["files"])


def test_a_sweep_gives_back_what_was_written_in_order(shards):
    directory, part = shards
    part = json.loads(json.dumps(part, sort_keys=True))  # as a manifest.json gives it back
    batches = list(Loader(directory, part, 4, seed=0).sweep())
    rows = some_rows()
    for name, length in LENGTHS.items():
        column = np.concatenate([batch[name] for batch in batches])
        assert isinstance(column, Int32[np.ndarray, f"24 {length}"])
        assert np.array_equal(column[:R], rows[name]) and not column[R:].any()
    assert all(set(batch) == set(LENGTHS) for batch in batches)


def test_writing_again_gives_the_same_bytes(shards, tmp_path):
    assert write_shards(some_rows(), tmp_path, "train", rows_per_shard=10) == shards[1]
    shuffled_fields = dict(reversed(some_rows().items()))
    assert write_shards(shuffled_fields, tmp_path, "train", rows_per_shard=10) == shards[1]


def test_a_batch_is_a_function_of_seed_and_step_alone(shards):
    steps = [7, 0, 300, 7, 1, 5]
    one, other = Loader(*shards, 4, seed=3), Loader(*shards, 4, seed=3)
    history = [numbers(one.batch(step)) for step in steps]
    assert history[0] == history[3]
    assert history == [numbers(other.batch(step)) for step in reversed(steps)][::-1]
    for loader in (one, other):
        batch = loader.batch(2)
        assert all(isinstance(batch[name], Int32[np.ndarray, f"4 {length}"]) for name, length in LENGTHS.items())
    again = one.batch(0)
    again["student_tokens"][:] = 0  # the batch is the caller's own
    assert numbers(one.batch(0)) == history[1]


def test_every_row_comes_once_an_epoch_and_epochs_join_without_a_gap(shards):
    loader = Loader(*shards, 4, seed=3)
    stream = [n for step in range(R * 3) for n in numbers(loader.batch(step))]  # 12 epochs of 23 rows, in batches of 4
    epochs = [stream[start : start + R] for start in range(0, len(stream), R)]
    assert len(epochs) == 12 and all(sorted(epoch) == list(range(1, R + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12  # each in an order of its own


def test_a_batch_may_be_larger_than_an_epoch(shards):
    stream = numbers(Loader(*shards, 2 * R, seed=0).batch(0))
    assert sorted(stream[:R]) == sorted(stream[R:]) == list(range(1, R + 1))


def test_seeds_have_orders_of_their_own_in_every_epoch(shards):
    orders = [
        tuple(numbers(Loader(*shards, R, seed=seed, verify=False).batch(epoch)))
        for seed in range(6)
        for epoch in range(6)
    ]
    assert len(set(orders)) == 36


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_the_global_batch_is_the_same_for_any_number_of_processes(shards, processes):
    alone = Loader(*shards, 6, seed=1)
    dealt = [range(p, 6, processes) for p in range(processes)]  # whatever rows a mesh gives to a process
    together = [Loader(*shards, 6, 1, places=places, verify=False) for places in dealt]
    for step in (0, 3, 50):
        parts = [loader.batch(step) for loader in together]
        assert all(len(part["role"]) == 6 // processes for part in parts)
        for name in LENGTHS:
            for part, places in zip(parts, dealt, strict=True):
                assert np.array_equal(part[name], alone.batch(step)[name][list(places)])
    for loader in together:  # what is swept is whole for every process
        assert [numbers(batch) for batch in loader.sweep()] == [numbers(batch) for batch in alone.sweep()]


def test_iterating_gives_the_batches_from_any_step_on(shards):
    loader = Loader(*shards, 4, seed=2)
    before = threading.active_count()
    for start in (0, 5, 41):
        for prefetch in (1, 4):
            iterator = loader.iterate(start, prefetch)
            assert [numbers(b) for b in islice(iterator, 9)] == [numbers(loader.batch(start + n)) for n in range(9)]
            iterator.close()
    assert threading.active_count() == before


def test_an_error_while_reading_ahead_reaches_the_caller(shards):
    loader = Loader(*shards, 4, seed=0)
    with pytest.raises(ValueError, match="step -1"):
        next(loader.iterate(-1))


def test_sweeps_of_another_size_fill_up_the_last_batch(shards):
    loader = Loader(*shards, 4, seed=2)
    for size in (1, 5, R, 40):
        batches = list(loader.sweep(size))
        assert len(batches) == -(-R // size)
        segments = np.concatenate([b["student_segment_ids"] for b in batches])
        assert len(segments) == len(batches) * size
        assert segments[:R].all() and not segments[R:].any()


def test_a_sweep_of_some_rows_takes_them_from_all_over(shards):
    loader = Loader(*shards, 4, seed=2)
    for rows in (1, 7, R - 1):
        chosen = loader.spread(rows)
        assert len(chosen) == len(set(chosen)) == rows and chosen[-1] >= R - 1 - R // rows
        got = [number for batch in loader.sweep(3, rows) for number in numbers(batch)]
        assert got == [*(chosen + 1), *[0] * (-rows % 3)]
    assert len(loader.spread(0)) == len(loader.spread(R + 5)) == R


def test_damaged_shards_are_named(tmp_path):
    part = write_shards(some_rows(), tmp_path, "train", rows_per_shard=10)
    name = part["files"][1]["name"]
    path = tmp_path / name
    whole = path.read_bytes()

    def message(changed=None) -> str:
        with pytest.raises(UserError, match=name) as caught:
            Loader(tmp_path, changed or part, 4, seed=0)
        return str(caught.value)

    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "checksum" in message()
    path.write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes, the manifest says {len(whole)}" in message()
    os.remove(path)
    assert "missing" in message()
    path.write_bytes(whole)
    Loader(tmp_path, part, 4, seed=0)

    def entry(**changes):
        files = [dict(f) for f in part["files"]]
        files[1].update(changes)
        return part | {"files": files}

    assert "10 records of 88 bytes, the manifest says 9 of 88" in message(entry(records=9))
    with pytest.raises(UserError, match="train-00000.*10 records of 88 bytes, the manifest says 10 of 92"):
        Loader(tmp_path, part | {"fields": LENGTHS | {"role": 6}}, 4, seed=0)
    with pytest.raises(UserError, match="says 24 records"):
        Loader(tmp_path, part | {"records": 24}, 4, seed=0)


def test_what_cannot_be_written_or_shared_out_is_refused(shards, tmp_path):
    rows = some_rows()
    with pytest.raises(UserError, match="no rows to write"):
        write_shards(some_rows(0), tmp_path, "train")
    with pytest.raises(UserError, match="no rows to write"):
        write_shards({}, tmp_path, "train")
    with pytest.raises(UserError, match="unequal numbers of rows"):
        write_shards(rows | {"role": rows["role"][1:]}, tmp_path, "train")
    with pytest.raises(UserError, match="field role must be integers"):
        write_shards(rows | {"role": rows["role"].astype(np.float32)}, tmp_path, "train")
    with pytest.raises(UserError, match="field role reaches .* outside int32"):
        write_shards(rows | {"role": np.full((R, 5), 2**31)}, tmp_path, "train")
    with pytest.raises(UserError, match="rows_per_shard=0"):
        write_shards(rows, tmp_path, "train", rows_per_shard=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="batch_size=0"):
        Loader(*shards, 0, 0)
