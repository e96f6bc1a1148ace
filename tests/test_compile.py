"""`distil-jax compile`: what it counts, prints and refuses. That a plan is the step of training, test_run.py asks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_run import config_of

from distil_jax import compile as command
from distil_jax import flops, hlo, sharding, train
from distil_jax.errors import OUT_OF_MEMORY, UserError
from distil_jax.models import model_from_config
from distil_jax.plan import plan


def small(**changes):
    """The tiny recipe at toy size, whose models compile in seconds."""
    return config_of("nowhere", **changes)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_refused():
    mesh = sharding.mesh_of("data:8")
    for change, message in (
        ({"objective.kind": "gold"}, "objective.kind=projected"),
        ({"teacher.scores": "stored"}, "teacher.scores=online"),
        ({"student.training.batch_size": 6}, "does not divide among"),
        ({"teacher.spread": "everywhere"}, "teacher.spread is 'everywhere'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(small(**change), "distilled", mesh)


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    mesh = sharding.mesh_of("data:8")
    cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def add(part):
        return jax.lax.psum(part, "data")

    def looped(x):
        def body(carry, _):
            total = jax.shard_map(
                lambda part: jax.lax.psum(part, "data"),
                mesh=mesh,
                in_specs=PartitionSpec("data"),
                out_specs=PartitionSpec(),
            )(carry)
            return jnp.sin(jnp.tile(total, (8, 1))), None

        return jax.lax.scan(body, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 96), jnp.float32, sharding=cut)
    text = jax.jit(looped, out_shardings=whole).lower(x).compile().as_text()
    reduces = [c for c in hlo.collectives(text) if c.kind == "all-reduce"]
    assert [(c.dtype, c.shape, c.count, c.bytes) for c in reduces] == [("f32", (1, 96), 5, 384)]


def test_a_kernel_that_describes_itself_over_several_lines_does_not_end_its_computation():
    """As the TPU compiler writes one."""
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="splash"}
  %g = f32[8] all-gather(%k), channel_id=1, dimensions={0}
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %w = (s32[], f32[8]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert [(c.kind, c.shape, c.count) for c in hlo.collectives(text)] == [("all-gather", (8,), 5)]


SHAPES = {
    "llama": {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8},
}
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("family", SHAPES)
def test_flops_of_a_pass_are_those_of_its_products_and_of_what_attention_sees(family):
    model, rows, length = model_from_config(SIZES | SHAPES[family]), 2, 64
    c = model.config
    D, F, H, G, K = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    products = D * H * K + 2 * D * G * K + H * K * D + 3 * D * F
    windows = [length / 2] * 3 if family == "llama" else [8] * 5 + [length / 2]
    wanted = sum(2 * rows * length * products + 4 * rows * length * seen * H * K for seen in windows)
    assert flops.forward(model, rows, length) == wanted


def test_the_bound_is_the_slowest_of_what_a_step_waits_for():
    one = flops.Bound(arithmetic=1.0, memory=3.0, links=2.0)
    assert one.seconds == 3.0 and one.by == "memory"


# ---- the command ----------------------------------------------------------------------------------------------------


def needs_libtpu():
    pytest.importorskip("libtpu", reason="no libtpu: pip install 'distil-jax[tpu-compile]'")


@pytest.fixture
def tiny_file(tmp_path):
    """A config file for the command with the settings of `small`."""
    file = tmp_path / "small.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(train.__file__).replace('distil_jax/train.py', 'tests')!r})\n"
        "from test_run import config_of\n\ndef get_config():\n    return config_of('nowhere')\n"
    )
    return file


def test_the_command_prints_whether_a_step_fits_and_what_it_takes(tiny_file, capsys, tmp_path):
    needs_libtpu()
    arguments = ["--config", str(tiny_file), "--topology", "v5e:2x2", "--config.mesh=fsdp:4", "--shardings"]
    assert command.main([*arguments, "--save", str(tmp_path / "saved")]) == 0
    said = capsys.readouterr().out
    for line in (
        "mesh {'data': 1, 'fsdp': 4, 'tensor': 1}, 4 devices",
        "| learns: model.embedding ",
        "| teacher: layers.mlp.up ",
        "| moments of the optimiser ",
        "| all-gather ",
        "bound by ",
        "of 16.00 GiB a chip",
    ):
        assert line in said, line
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {"step.hlo.txt", "step.executable"}
    # Nothing of the size of logits is sent: a batch has 8 x 128 positions, the student 512 tokens.
    text = (tmp_path / "saved" / "step.hlo.txt").read_text()
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text  # planned on a CPU, and yet what a TPU runs
    for c in hlo.collectives(text):
        assert np.prod(c.shape) < 8 * 128 * 512, c
    # The same step where a chip has less memory than it needs, with what to do.
    assert command.main([*arguments[:5], "--run=control", "--memory=10000"]) == OUT_OF_MEMORY
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "training.remat=full" in said


def test_several_slices_are_the_outermost_part_of_data(monkeypatch):
    needs_libtpu()
    mesh = command.mesh_of(small(mesh="slices:2,data:2,fsdp:2"), "v5e:2x2")
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert [[d.slice_index for d in row.flat] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_a_topology_that_is_not_known_is_refused():
    for topology in ("v5e", "v12:2x2", "v5e:banana"):
        with pytest.raises(UserError, match="topology"):
            command.main(["--config", "configs/tiny.py", "--topology", topology])


@pytest.mark.parametrize("first", [80, 16, 640, 1600])
@pytest.mark.parametrize("told", [True, False], ids=["the compiler says how much", "it does not"])
@pytest.mark.parametrize("bend", [0.0, 2e-5])
def test_the_largest_batch_is_found_in_a_few_compilations(first, told, bend):
    """Bytes that grow with the rows, in a line and a little faster."""
    memory, tried = 16.0, []

    def needed(rows):
        size = 1.5 + 0.03 * rows + bend * rows**2
        tried.append(rows)
        return (size if told or size <= memory else 0), size <= memory

    low, high = command.most(needed, needed(first), first, 16, memory)
    assert needed(low)[1] and not needed(high)[1]
    assert all(rows % 16 == 0 for rows in tried) and high - low <= max(16, low // 16)


def test_a_batch_of_which_nothing_fits_ends_the_search():
    tried = []
    assert command.most(lambda rows: (tried.append(rows), (99, False))[1], (100, False), 64, 16, 10.0) == (0, 16)
    assert len(tried) <= 6


def test_a_first_batch_that_is_the_fewest_and_fits_not():
    assert command.most(lambda rows: (0, True), (100, False), 16, 16, 10.0) == (0, 16)
