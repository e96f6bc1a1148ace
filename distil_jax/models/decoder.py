"""The decoder that every family shares: its description in Flax NNX and the scan over stacked layers.

A family (gemma3.py, llama.py) adds its config fields, the order of operations in a block and its table of Hugging Face
names. Parameters cross the `jax.jit` boundary as a plain nested dict; the modules are merged back inside the trace.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from distil_jax.errors import UserError
from distil_jax.models import attention as attending
from distil_jax.models import layers
from distil_jax.models.config import DecoderConfig
from distil_jax.models.int8 import Int8

Params = dict[str, Any]

# What a layer keeps for the backward pass: everything; its input alone; its input and its matrix products, so that only
# what is cheap (norms, activations) and the attention scores are computed again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def checkpointed(function: Callable, remat: str, **options: Any) -> Callable:
    """`function` under one of the policies of REMAT. Raises UserError for another name."""
    if remat not in REMAT:
        raise UserError(f"remat is {remat!r}; use one of {', '.join(map(repr, REMAT))}")
    return function if remat == "none" else jax.checkpoint(function, policy=REMAT[remat], **options)


class Weight(NamedTuple):
    """One row of a name table: a Hugging Face tensor and the parameter that holds it, read and written by the same row.

    `name` has {} for the layer index where `path` is a stacked parameter. `inputs` is None where both sides store the
    same array; else the tensor is a torch Linear [out, in] and our kernel has that many leading input axes (0 for its
    bias: the same numbers, flat).
    """

    name: str
    path: tuple[str, ...]
    inputs: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{}" in self.name

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on the Hugging Face side of a parameter of `shape` (without the layer axis)."""
        if self.inputs is None:
            return tuple(shape)
        if self.inputs == 0:
            return (math.prod(shape),)
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def write(self, array: np.ndarray) -> np.ndarray:
        """Ours -> Hugging Face."""
        return array if self.inputs is None else array.reshape(self.hf_shape(array.shape)[::-1]).T


class LayerKind(NamedTuple):
    """What differs between the layers of one model beyond their weights."""

    window: int | None  # sliding window in tokens, the query's own included; None attends to everything before
    frequencies: np.ndarray  # rotary, [K/2]


class Seen(NamedTuple):
    """What a chosen layer hands over: scaled and rotated queries, keys, and its output."""

    q_BxLxHxK: Float[Array, "B L H K"]
    k_BxLxGxK: Float[Array, "B L G K"]
    x_BxLxD: Float[Array, "B L D"]


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm and, if untied, a head: the description of the parameters."""

    def __init__(self, config: DecoderConfig, block: Callable, rngs: nnx.Rngs, dtype, *, one_plus: bool):
        def stacked(rngs: nnx.Rngs):
            return block(config, rngs, dtype)

        V, D, N = config.vocab_size, config.hidden_size, config.num_hidden_layers
        # 0.02 at D = 2500, as is usual; the narrow models of a test or a demonstration learn slower from 0.02.
        self.embedding = layers.normal(rngs, (V, D), ("vocab", "embed"), D**-0.5, dtype)
        self.layers = nnx.split_rngs(splits=N)(nnx.vmap(stacked, in_axes=0, out_axes=0))(rngs)
        self.final_norm = layers.RMSNorm(D, config.rms_norm_eps, one_plus=one_plus, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = layers.normal(rngs, (V, D), ("vocab", "embed"), D**-0.5, dtype)


class Model:
    """A decoder-only language model as pure functions of a parameter dict; equal configs make equal models.

    Families set `block` (a module called as block(x, rope table, mix) -> x, what mix returned beside), `names` (the
    table of Hugging Face weights) and `one_plus` (Gemma's norm), and say the kinds of their layers.
    """

    block: ClassVar[type[nnx.Module]]
    names: ClassVar[tuple[Weight, ...]]
    one_plus: ClassVar[bool]

    def __init__(self, config: DecoderConfig):
        self.config = config
        description = nnx.eval_shape(lambda: self._describe(nnx.Rngs(0), jnp.float32))
        self._abstract = nnx.state(description)
        self._block_def, self._norm_def = nnx.graphdef(description.layers), nnx.graphdef(description.final_norm)

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.config == other.config

    def __hash__(self) -> int:
        return hash((type(self), self.config))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"

    def _describe(self, rngs: nnx.Rngs, dtype) -> Decoder:
        return Decoder(self.config, self.block, rngs, dtype, one_plus=self.one_plus)

    def with_tokenizer(self, size: int | None) -> "Model":
        """This model, knowing that its tokenizer has `size` ids: rows of the vocabulary beyond them, which some
        checkpoints have as padding, are kept and are in no softmax."""
        return type(self)(dataclasses.replace(self.config, tokenizer_size=size))

    def layer_kinds(self) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
        """The kinds of layer in this model, and which of them each layer is."""
        raise NotImplementedError

    @property
    def embedding_scale(self) -> float:
        """Factor on the embedded tokens."""
        return 1.0

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The rows of the name table that this model has (a tied model has no head of its own, most have no biases)."""
        pure = nnx.to_pure_dict(self._abstract)

        def held(path):
            tree = pure
            for key in path:
                tree = tree.get(key, {})
            return tree != {}

        return tuple(w for w in self.names if held(w.path))

    def init(self, key: Array, dtype=jnp.float32) -> Params:
        """Random parameters: Gaussians of deviation 1/sqrt(inputs), identity norms. Pure, so it can be jitted."""
        return nnx.to_pure_dict(nnx.state(self._describe(nnx.Rngs(params=key), dtype)))

    def abstract_params(self, dtype=jnp.float32) -> Params:
        """The tree of `init` with a ShapeDtypeStruct at each leaf."""
        pure = nnx.to_pure_dict(self._abstract)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), pure)

    def logical_axes(self) -> Params:
        """The tree of `init` with a tuple of logical axis names at each leaf."""

        def axes(path, leaf):
            return ("layers",) * (path[0] == "layers") + leaf.get_metadata()["axes"]

        return nnx.to_pure_dict(nnx.map_state(axes, self._abstract))

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The matrix whose rows score the tokens: logits are `hidden @ unembedding.T`."""
        return params["embedding"] if self.config.tie_word_embeddings else params["lm_head"]

    def hidden(
        self,
        params: Params,
        tokens_BxL: Int[Array, "B L"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        attention_layers: tuple[int, ...] = (),
        observe: tuple[int, ...] = (),
        remat: str = "none",
        attention: str = "auto",
        mesh: Mesh | None = None,
    ):
        """Hidden states after the final norm, [B, L, D] in the dtype of the parameters.

        segment_ids: 0 is padding; attention is causal within an equal, non-zero id (None: one segment per row).
        positions: rotary positions (None: index within the segment).
        attention_layers: indices of layers; if any, returns (hidden, {layer: float32 maps [B, H, L, L]}), where the
          rows of padding queries are zero. Only these maps are ever whole in memory.
        observe: indices of layers instead; returns (hidden, {layer: Seen}), from which maps can be made piece by piece.
        remat: what each layer keeps for the backward pass: "none" of it is computed again; "full" keeps its input,
          "dots" also its matrix products (REMAT).
        attention: which form computes it (attention.py); the numbers are the same to rounding.
        mesh: where rows and parameters lie, if not all on one device of this process.
        Raises UserError for a layer index out of range, another remat or another attention.
        """
        count = self.config.num_hidden_layers
        if any(not 0 <= layer < count for layer in (*attention_layers, *observe)):
            raise UserError(f"attention_layers {(*attention_layers, *observe)}: layers are numbered 0 to {count - 1}")
        if segment_ids is None:
            segment_ids = jnp.ones((1, tokens_BxL.shape[1]), jnp.int32)
        if positions is None:
            positions = layers.segment_positions(segment_ids)
        kinds, kind_of_layer = self.layer_kinds()
        tables = jnp.stack([layers.rope_table(positions, kind.frequencies) for kind in kinds])
        attend = attending.over_kinds([kind.window for kind in kinds], segment_ids, attention, mesh)

        shown = sorted({*attention_layers, *observe})

        def run(x, kind, block_state):
            kind = 0 if len(kinds) == 1 else kind

            def mix(q, k, v):
                return attend(q, k, v, kind), (q, k)

            x, (q, k) = self.block_of(block_state)(x, tables[kind], mix)
            return x, Seen(q, k, x) if shown else None

        run = checkpointed(run, remat, prevent_cse=False)

        # One scan whatever is shown: a program that holds the layer once compiles fastest. Every layer writes into the
        # place of the next one that is shown, which is the last to write there.
        def body(carry, layer):
            x, held = carry
            block_state, kind, place = layer
            x, new = run(x, kind, block_state)
            held = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, place, 0), held, new)
            return (x, held), None

        x = self.embed(params, tokens_BxL)
        places = np.searchsorted(shown, np.arange(count))
        per_layer = (params["layers"], jnp.asarray(kind_of_layer), jnp.asarray(places))
        one = None
        if shown:
            one = jax.eval_shape(run, x, 0, jax.tree.map(lambda leaf: leaf[0], params["layers"]))[1]
        held = jax.tree.map(lambda leaf: jnp.zeros((places[-1] + 1, *leaf.shape), leaf.dtype), one)
        (x, held), _ = jax.lax.scan(body, (x, held), per_layer)
        seen = {layer: jax.tree.map(lambda leaf, n=n: leaf[n], held) for n, layer in enumerate(shown)}
        x = self.normed(params, x)
        if observe:
            return x, seen
        if not attention_layers:
            return x
        maps = {}
        for layer in attention_layers:
            mask = layers.attention_mask(segment_ids, kinds[kind_of_layer[layer]].window)
            maps[layer] = layers.attention_map(seen[layer].q_BxLxHxK, seen[layer].k_BxLxGxK, mask)
        return x, {layer: jnp.where((segment_ids != 0)[:, None, :, None], m, 0.0) for layer, m in maps.items()}

    def embed(self, params: Params, tokens_BxL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The input of the first block."""
        embedding = params["embedding"]
        if isinstance(embedding, Int8):
            dtype = params["final_norm"]["scale"].dtype  # the model computes in the dtype of what is not in 8 bits
            scale_BxL = jnp.take(embedding.scale, tokens_BxL, axis=0).astype(dtype)
            x = jnp.take(embedding.values, tokens_BxL, axis=0).astype(dtype) * scale_BxL[..., None]
        else:
            x = jnp.take(embedding, tokens_BxL, axis=0)
        # The scale itself is rounded to the dtype, as it was when Gemma was trained.
        return x if self.embedding_scale == 1.0 else x * jnp.asarray(self.embedding_scale, x.dtype)

    def block_of(self, layer: Params) -> nnx.Module:
        """One layer of `params["layers"]` as a block, called as block(x, rope table, mix)."""
        return nnx.merge(self._block_def, layer)

    def normed(self, params: Params, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The final norm on the output of the last block."""
        return nnx.merge(self._norm_def, params["final_norm"])(x_BxLxD)

    def apply(
        self,
        params: Params,
        tokens_BxL: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        **options: Any,
    ) -> Float[Array, "B L V"]:
        """Logits in float32, whole in memory; columns that are no text token hold the lowest float32.

        options: `attention` and `mesh` of `hidden`.
        """
        hidden_BxLxD = self.hidden(params, tokens_BxL, segment_ids=segment_ids, positions=positions, **options)
        scores_VxN = layers.unembed(self.unembedding(params), hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1]))
        logits = scores_VxN.T.reshape(*tokens_BxL.shape, -1)
        is_text = jnp.arange(self.config.vocab_size) < self.config.text_vocab_size
        return jnp.where(is_text[None, None, :], logits, layers.MASKED)
