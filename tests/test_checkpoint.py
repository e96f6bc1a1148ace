"""Checkpoints: what is restored is what was saved, and the newest whole one wins, whatever happened to the others."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distil_jax.checkpoint import Checkpoints, on_sigterm, read_part
from distil_jax.errors import UserError

OPTIMIZER = optax.adamw(1e-2)


def make_state(scale: float = 1.0):
    params = {"w": scale * jnp.arange(4096.0).reshape(64, 64), "norm": jnp.full(64, 0.1, jnp.bfloat16)}
    return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(0), "key": jax.random.key(7)}


@jax.jit
def update(state):
    key, noise = jax.random.split(state["key"])
    gradients = jax.tree.map(lambda p: jax.random.normal(noise, p.shape, p.dtype), state["params"])
    updates, opt_state = OPTIMIZER.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1, "key": key}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, *states):
    """States saved as steps 1, 2, ..."""
    with Checkpoints(directory) as checkpoints:
        for step, state in enumerate(states, 1):
            assert checkpoints.save(step, state)
    return directory


def restore(directory, like):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_latest(like)


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "new", make_state()) is None


def test_what_is_restored_is_what_was_saved(tmp_path):
    state = make_state()
    saved(tmp_path, state, update(state))
    abstract = jax.eval_shape(make_state)
    step, restored = restore(tmp_path, abstract)
    assert step == 2
    assert_same(restored, update(state))


def test_a_part_is_read_of_any_step_and_the_folder_stays_as_it_is(tmp_path, capfd):
    first, second = make_state(), update(make_state())
    saved(tmp_path, first, second)
    unfinished = tmp_path / "3.orbax-checkpoint-tmp"  # of the run that goes on meanwhile
    unfinished.mkdir()
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    part = {"params": jax.eval_shape(make_state)["params"]}
    for step, found, state in ((None, 2, second), (1, 1, first)):
        got, read = read_part(tmp_path, part, step)
        assert got == found
        assert_same(read, {"params": state["params"]})
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2"):
        read_part(tmp_path, part, 7)
    with pytest.raises(UserError, match="params.more is absent there"):
        read_part(tmp_path, {"params": part["params"] | {"more": jnp.ones(3)}})
    largest = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert read_part(tmp_path, part)[0] == 1 and "damaged" in capfd.readouterr().err
    with pytest.raises(UserError, match="choose another step"):
        read_part(tmp_path, part, 2)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="no whole checkpoint"):
        read_part(tmp_path / "none", part)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)
    x = jnp.ones((1024, 1024))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(8):
            x = doubled(x)
        x.block_until_ready()
        _, restored = checkpoints.restore_latest({"x": x})
    assert (restored["x"] == 1).all()


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path):
    undisturbed = make_state()
    for _ in range(6):
        undisturbed = update(undisturbed)
    state = make_state()
    with Checkpoints(tmp_path, save_every=2) as checkpoints:
        for step in range(1, 6):  # stops after 5 steps, the last save was at 4
            state = update(state)
            assert checkpoints.save(step, state) == (step % 2 == 0)
    step, state = restore(tmp_path, make_state())
    assert step == 4
    for _ in range(step, 6):
        state = update(state)
    assert_same(state, undisturbed)


def test_few_are_kept_and_none_is_saved_twice(tmp_path):
    state = {"x": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2, save_every=10) as checkpoints:
        assert [step for step in range(0, 41) if checkpoints.save(step, state)] == [0, 10, 20, 30, 40]
        assert checkpoints.save(41, state, force=True) and not checkpoints.save(41, state, force=True)
        checkpoints.wait()
        assert checkpoints.steps == [40, 41]
    assert sorted(os.listdir(tmp_path)) == ["40", "41"]


def test_restores_onto_another_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    w = jnp.arange(64.0).reshape(8, 8)
    saved(tmp_path / "eight", {"w": jax.device_put(w, rows), "step": jax.device_put(jnp.int32(5), whole)})
    saved(tmp_path / "one", {"w": jax.device_put(w, one), "step": jnp.int32(5)})
    for directory in ("eight", "one"):
        for sharding in (one, rows, NamedSharding(mesh, P(None, "fsdp"))):
            like = {
                "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding),
                "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            }
            _, state = restore(tmp_path / directory, like)
            assert state["w"].sharding == sharding and state["step"].sharding == whole
            np.testing.assert_array_equal(state["w"], w)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s["params"].update(w=jnp.zeros((64, 65))),
            "params.w is float32[64,64] there and float32[64,65] here",
        ),
        (lambda s: s["params"].update(w=jnp.zeros((64, 64), jnp.bfloat16)), "and bfloat16[64,64] here"),
        (lambda s: s["params"].update(head=jnp.zeros(2)), "params.head is absent there"),
        (lambda s: s.pop("key"), "key is key<fry>[] there and absent here"),
    ],
)
def test_a_state_of_another_model_is_refused_by_leaf(tmp_path, change, said):
    saved(tmp_path, make_state())
    other = make_state()
    change(other)
    with pytest.raises(UserError) as caught:
        restore(tmp_path, other)
    assert said in str(caught.value) and "delete" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["1"]


def files_of(folder: Path) -> list[str]:
    """Names that stay the same between two checkpoints, but for the data files, whose names are random."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def damage(kind: str, file: Path):
    content = file.read_bytes()
    middle = len(content) // 2
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:middle])
    elif kind == "flipped":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


@pytest.mark.parametrize("kind", ["gone", "cut", "flipped"])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(tmp_path, capfd, kind):
    state = make_state()
    whole = saved(tmp_path / "whole", state, update(state))
    names = [name for name in files_of(whole / "2") if name != "whole.json"]
    assert len(names) > 5
    for name in names:
        directory = tmp_path / "copy"
        shutil.copytree(whole, directory)
        damage(kind, directory / "2" / name)
        step, restored = restore(directory, state)
        said = capfd.readouterr().err
        assert step == 1 and said.count("\n") == 1
        assert said.startswith("warning: checkpoint ") and f"is damaged ({name} " in said
        assert_same(restored, state)
        assert sorted(os.listdir(directory)) == ["1", "damaged-2"]
        shutil.rmtree(directory)


def test_damage_without_a_seal_is_found_as_it_is_read(tmp_path, capfd):
    """A process killed between the save and the seal leaves a whole checkpoint without one."""
    state = make_state()
    saved(tmp_path, state, update(state))
    (tmp_path / "2" / "whole.json").unlink()
    step, restored = restore(tmp_path, state)
    assert step == 2
    assert_same(restored, update(state))
    data = max((tmp_path / "2" / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    damage("cut", data)
    step, restored = restore(tmp_path, state)
    assert step == 1 and "is damaged" in capfd.readouterr().err
    assert_same(restored, state)


def test_a_run_goes_on_over_a_damaged_step(tmp_path):
    state = make_state()
    saved(tmp_path, state, state, state)
    damage("gone", tmp_path / "3" / "state" / "_METADATA")
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest(state)
        assert step == 2
        checkpoints.save(3, update(state))
    step, restored = restore(tmp_path, state)
    assert step == 3
    assert_same(restored, update(state))


def test_no_whole_checkpoint_at_all_is_an_error(tmp_path):
    state = make_state()
    saved(tmp_path, state, state)
    for step in (1, 2):
        damage("cut", tmp_path / str(step) / "state" / "_METADATA")
    with pytest.raises(UserError, match="steps 1, 2 are damaged"):
        restore(tmp_path, state)


SAVES_AND_DIES = """
    import os, resource, signal, sys, time
    import jax, jax.numpy as jnp
    from distil_jax.checkpoint import Checkpoints
    directory, how, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
    x = jax.random.normal(jax.random.key(0), (2000, 1000))
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"x": x})
    checkpoints.wait()
    if how == "limited":  # no file may grow beyond 1 MB: what a full disk does, without filling one
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    checkpoints.save(2, {"x": x + 1})
    if how == "killed":
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.close()
"""


def run_and_die(directory, how, delay=0.0):
    command = [sys.executable, "-c", textwrap.dedent(SAVES_AND_DIES), str(directory), how, str(delay)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_a_process_killed_as_it_saves_leaves_the_last_whole_one(tmp_path, capfd, delay):
    assert run_and_die(tmp_path, "killed", delay).returncode == -signal.SIGKILL
    assert (tmp_path / "1").is_dir()
    cut_off = not (tmp_path / "2").is_dir()
    x = jax.random.normal(jax.random.key(0), (2000, 1000))
    step, state = restore(tmp_path, {"x": x})
    np.testing.assert_array_equal(state["x"], x + (step - 1))
    assert step == (1 if cut_off else 2)
    assert ("the save of step 2 was cut off" in capfd.readouterr().err) == cut_off
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_a_save_that_the_disk_refuses_is_an_error_and_leaves_the_last_whole_one(tmp_path):
    died = run_and_die(tmp_path, "limited")
    assert died.returncode == 1 and "File too large" in died.stderr
    step, _ = restore(tmp_path, {"x": jnp.zeros((2000, 1000))})
    assert step == 1


def test_sigterm_asks_the_loop_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_there_is_no_signal_to_take():
    asked = []

    def loop():
        with on_sigterm() as stop:
            asked.append(stop.requested)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert asked == [False]
