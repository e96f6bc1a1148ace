"""Weights land in their shards: only what is needed is read, little is held at once, bad numbers are named."""

import os
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from distil_jax.errors import UserError
from distil_jax.models import load_pretrained, model_from_config, save_pretrained, shards
from distil_jax.models.decoder import Weight
from distil_jax.models.tensors import SINGLE, TensorFiles
from distil_jax.sharding import make_mesh, param_shardings

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "gemma": SIZES | {"model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 8},
    "llama": SIZES | {"model_type": "llama", "num_hidden_layers": 2},
}


def random_params(model, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), model.abstract_params(dtype)
    )


def assert_same(params, other):
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module", params=CONFIGS)
def stored(request, tmp_path_factory):
    model = model_from_config(CONFIGS[request.param])
    params = random_params(model)
    return model, params, save_pretrained(model, params, tmp_path_factory.mktemp(request.param) / "model")


MESHES = {"fsdp": dict(data=1, fsdp=8), "tensor": dict(data=4, tensor=2), "all": dict(data=2, fsdp=2, tensor=2)}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_numbers(stored, mesh, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 700)  # several blocks a tensor, which do not divide it
    model, params, directory = stored
    mesh = make_mesh(**MESHES[mesh])
    _, placed = load_pretrained(directory, mesh=mesh)
    assert_same(params, placed)
    assert jax.tree.all(jax.tree.map(lambda leaf, want: leaf.sharding == want, placed, param_shardings(model, mesh)))


@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_stored_dtype_is_read_as_every_other(of, to, tmp_path):
    model = model_from_config(CONFIGS["llama"])
    params = random_params(model)
    directory = save_pretrained(model, params, tmp_path / "float32")
    numbers = {name: tensor.astype(of) for name, tensor in load_file(directory / SINGLE).items()}
    save_file(numbers, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    rounded = jax.tree.map(lambda leaf: leaf.astype(of).astype(to), params)
    assert_same(rounded, load_pretrained(tmp_path, dtype=to)[1])


def test_loaded_parameters_may_be_donated(stored):
    """On CPU bfloat16 parameters share memory with what they were read into."""
    _, params, directory = stored
    _, loaded = load_pretrained(directory, dtype="bfloat16", mesh=make_mesh(data=1, fsdp=8))
    moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(loaded)
    assert_same(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) + 1, params), moved)


# ---- what is read ---------------------------------------------------------------------------------------------------

Q = Weight("layers.{}.q", ("q",), inputs=1)  # ours [N, D, H, K], the file's [H K, D]
OUT = Weight("layers.{}.o", ("o",), inputs=2)  # ours [N, H, K, D], the file's [D, H K]
NORM = Weight("norm", ("norm",))


def test_a_shard_is_a_rectangle_of_the_file():
    def of(weight, shape, *index):
        return shards.rectangle(weight, shape, tuple(slice(*part) for part in index))

    assert of(Q, (3, 8, 4, 2), (None,), (2, 4), (1, 3), (None,)) == (slice(2, 6), slice(2, 4))
    assert of(OUT, (3, 4, 2, 8), (None,), (1, 3), (None,), (2, 4)) == (slice(2, 4), slice(2, 6))
    assert of(NORM, (8,), (4, 8)) == (slice(4, 8),)
    # one head: part of it is contiguous too
    assert of(Q, (3, 8, 4, 2), (None,), (None,), (1, 2), (1, 2)) == (slice(3, 4), slice(0, 8))
    with pytest.raises(ValueError, match="not contiguous"):
        of(Q, (3, 8, 4, 2), (None,), (None,), (1, 3), (1, 2))
    with pytest.raises(ValueError, match="layer axis"):
        of(Q, (3, 8, 4, 2), (0, 1), (None,), (None,), (None,))


def test_the_shards_of_a_parameter_cover_its_tensor_once():
    """So each of four processes with two devices would read a quarter."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    tensor = np.zeros((8, 8), int)
    for process in range(4):
        devices = mesh.devices.flat[2 * process : 2 * process + 2]
        indices = sharding.devices_indices_map((3, 8, 4, 2))
        part = np.zeros_like(tensor)
        for device in devices:
            part[shards.rectangle(Q, (3, 8, 4, 2), indices[device])] += 1
        assert part.sum() == tensor.size / 4 and part.max() == 1
        tensor += part
    assert (tensor == 1).all()


def test_each_number_is_read_once_though_every_device_holds_it(stored, monkeypatch):
    model, params, directory = stored
    read, counted = TensorFiles.read, []

    def counting(self, name, parts):
        arrays = read(self, name, parts)
        counted.append(sum(array.size for array in arrays))
        return arrays

    monkeypatch.setattr(TensorFiles, "read", counting)
    for mesh in (make_mesh(data=1, fsdp=8), make_mesh(data=8)):
        counted.clear()
        load_pretrained(directory, mesh=mesh)
        assert sum(counted) == sum(leaf.size for leaf in jax.tree.leaves(params))


PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from distil_jax.models import load_pretrained, save_pretrained
from distil_jax.models.tensors import TensorFiles
from distil_jax.sharding import make_mesh
read, numbers = TensorFiles.read, 0
def counting(self, name, parts):
    global numbers
    arrays = read(self, name, parts)
    numbers += sum(array.size for array in arrays)
    return arrays
TensorFiles.read = counting
model, params = load_pretrained(sys.argv[3], mesh=make_mesh(data=1, fsdp=4, tensor=2))
save_pretrained(model, params, sys.argv[4])
print("numbers", numbers)
"""


def test_two_processes_read_half_each_and_write_the_same_file(tmp_path):
    model = model_from_config(CONFIGS["llama"])
    directory = save_pretrained(model, random_params(model), tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    commands = [[sys.executable, "-c", PROCESS, address, str(i), str(directory), str(tmp_path / "out")] for i in (0, 1)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    norms = 5 * 32  # which no mesh axis cuts
    half = norms + (sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params())) - norms) // 2
    assert [int(line.split()[1]) for out in outputs for line in out.splitlines() if "numbers" in line] == [half, half]
    assert (tmp_path / "out" / SINGLE).read_bytes() == (directory / SINGLE).read_bytes()


@pytest.mark.parametrize("mesh", [None, dict(data=1, fsdp=8)])
def test_no_host_array_is_as_large_as_the_largest_tensor(mesh, tmp_path, monkeypatch):
    """What Python and numpy hold while loading, with blocks of 128 KB and a largest tensor of 2 MB in 8 MB."""
    monkeypatch.setattr(shards, "BLOCK", 1 << 15)
    sizes = dict(vocab_size=4096, hidden_size=128, intermediate_size=1024, num_attention_heads=4)
    model = model_from_config({"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": True} | sizes)
    directory = save_pretrained(model, random_params(model), tmp_path / "model")
    mesh = mesh and make_mesh(**mesh)
    load_pretrained(directory, mesh=mesh)  # compiles, which takes memory of its own
    tracemalloc.start()
    try:
        load_pretrained(directory, mesh=mesh)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4096 * 128 * 4


# ---- bad numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_number_that_is_not_finite_is_named(stored, bad, name, tmp_path):
    _, _, directory = stored
    tensors = load_file(directory / SINGLE)
    tensors[name][..., -1] = bad
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    for mesh in (None, make_mesh(data=1, fsdp=8)):
        with pytest.raises(UserError, match=rf"model\.safetensors: tensor '{name}' .* not finite"):
            load_pretrained(tmp_path, mesh=mesh)


def test_a_number_too_large_for_float16_is_named(stored, tmp_path):
    _, _, directory = stored
    tensors = load_file(directory / SINGLE)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    load_pretrained(tmp_path, dtype="bfloat16")
    with pytest.raises(UserError, match="not finite in float16"):
        load_pretrained(tmp_path, dtype="float16")
