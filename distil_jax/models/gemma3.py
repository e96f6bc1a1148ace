"""Gemma 3 text tower (270M to 27B, MedGemma): sliding and full layers, four norms a block, GeGLU, normed heads.

Source: Hugging Face transformers, modeling_gemma3; Gemma 3 technical report (2025), section 2.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from flax import nnx

from distil_jax.errors import UserError
from distil_jax.models.config import DecoderConfig, RopeParameters
from distil_jax.models.decoder import LayerKind, Model, Weight
from distil_jax.models.layers import Attention, GatedMLP, RMSNorm

SLIDING, FULL = "sliding_attention", "full_attention"
FIRST_IMAGE_TOKEN = 262_144  # rows of the embedding from here on are no text tokens


@dataclasses.dataclass(frozen=True)
class GemmaRope:
    """Rotary parameters of the two kinds of layer (the nesting of transformers v5's rope_parameters)."""

    full_attention: RopeParameters
    sliding_attention: RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """Fields and defaults of transformers' Gemma3TextConfig (released files leave out what equals a default)."""

    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 131_072
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None  # None: five sliding, then one full
    rope_parameters: GemmaRope | Mapping | None = None

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"

    def __post_init__(self):
        super().__post_init__()
        types = self.layer_types or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(self.num_hidden_layers)]
        object.__setattr__(self, "layer_types", tuple(types))
        if not isinstance(self.rope_parameters, GemmaRope):
            given = self.rope_parameters or {}
            read = functools.partial(RopeParameters.read, max_positions=self.max_position_embeddings)
            rope = GemmaRope(read(given.get(FULL), theta=1_000_000.0), read(given.get(SLIDING), theta=10_000.0))
            object.__setattr__(self, "rope_parameters", rope)
        if len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"config: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} hidden layers"
            )
        if unknown := set(self.layer_types) - {SLIDING, FULL}:
            raise UserError(f"config: layer_types has {sorted(unknown)[0]!r}; a layer is {SLIDING!r} or {FULL!r}")
        if SLIDING in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise UserError(f"config: sliding_window is {self.sliding_window!r}; give a number of tokens above 0")

    @property
    def text_vocab_size(self) -> int:
        return min(super().text_vocab_size, FIRST_IMAGE_TOKEN)

    @classmethod
    def from_hf(cls, raw: Mapping) -> "Gemma3Config":
        """From the config.json of a text model or of the vision wrapper, old or new spelling."""
        if "text_config" in raw:
            if not isinstance(raw["text_config"], Mapping):
                raise UserError("config.json: text_config is no object; fetch the file again")
            outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
            raw = dict(raw["text_config"]) | {key: raw[key] for key in outer if key in raw}
        cls.refuse(raw, attention_bias=False, hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if raw.get(key) is not None:
                raise UserError(f"config.json: {key}={raw[key]!r} is not supported; Gemma 3 has no soft caps")
        fields = cls.own_fields(raw)
        if fields.get("layer_types") is None and raw.get("sliding_window_pattern"):
            period, count = raw["sliding_window_pattern"], fields.get("num_hidden_layers", cls.num_hidden_layers)
            fields["layer_types"] = tuple(SLIDING if (i + 1) % period else FULL for i in range(count))
        nested = RopeParameters.entries(fields.get("rope_parameters"))
        if nested and not {FULL, SLIDING} & set(nested):
            raise UserError(f"config.json: rope_parameters must be nested under {FULL!r} and {SLIDING!r} for Gemma 3")
        scaling = nested.get(FULL) or raw.get("rope_scaling") or {}
        fields["rope_parameters"] = {
            FULL: {"rope_theta": raw.get("rope_theta") or 1_000_000.0} | RopeParameters.entries(scaling),
            SLIDING: {"rope_theta": raw.get("rope_local_base_freq") or 10_000.0}
            | RopeParameters.entries(nested.get(SLIDING)),
        }
        return cls(**fields)

    def to_hf(self) -> dict:
        """The entries of a config.json in the spelling of transformers v5."""
        fixed = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0}
        none = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        rope = {kind: getattr(self.rope_parameters, kind).write() for kind in (FULL, SLIDING)}
        return fixed | none | self.hf_fields() | {"rope_parameters": rope}


class Gemma3Block(nnx.Module):
    """norm -> attention -> norm -> add; norm -> MLP -> norm -> add."""

    def __init__(self, config: Gemma3Config, rngs: nnx.Rngs, dtype):
        def norm(size=config.hidden_size):
            return RMSNorm(size, config.rms_norm_eps, one_plus=True, dtype=dtype)

        scale = config.query_pre_attn_scalar**-0.5
        self.input_norm = norm()
        self.attention = Attention(config, rngs, dtype, scale=scale, head_norm=lambda: norm(config.head_dim))
        self.post_attention_norm = norm()
        self.pre_feedforward_norm = norm()
        self.mlp = GatedMLP(config, rngs, dtype, activation=jax.nn.gelu)  # jax's gelu is the tanh approximation
        self.post_feedforward_norm = norm()

    def __call__(self, x_BxLxD, table, mix):
        attended, extra = self.attention(self.input_norm(x_BxLxD), table, mix)
        x_BxLxD = x_BxLxD + self.post_attention_norm(attended)
        fed = self.mlp(self.pre_feedforward_norm(x_BxLxD))
        return x_BxLxD + self.post_feedforward_norm(fed), extra


class Gemma3(Model):
    """Gemma 3, text only."""

    block = Gemma3Block
    one_plus = True
    names = (
        Weight("model.embed_tokens.weight", ("embedding",)),
        Weight("model.layers.{}.input_layernorm.weight", ("layers", "input_norm", "scale")),
        Weight("model.layers.{}.self_attn.q_proj.weight", ("layers", "attention", "q"), inputs=1),
        Weight("model.layers.{}.self_attn.k_proj.weight", ("layers", "attention", "k"), inputs=1),
        Weight("model.layers.{}.self_attn.v_proj.weight", ("layers", "attention", "v"), inputs=1),
        Weight("model.layers.{}.self_attn.o_proj.weight", ("layers", "attention", "o"), inputs=2),
        Weight("model.layers.{}.self_attn.q_norm.weight", ("layers", "attention", "q_norm", "scale")),
        Weight("model.layers.{}.self_attn.k_norm.weight", ("layers", "attention", "k_norm", "scale")),
        Weight("model.layers.{}.post_attention_layernorm.weight", ("layers", "post_attention_norm", "scale")),
        Weight("model.layers.{}.pre_feedforward_layernorm.weight", ("layers", "pre_feedforward_norm", "scale")),
        Weight("model.layers.{}.mlp.gate_proj.weight", ("layers", "mlp", "gate"), inputs=1),
        Weight("model.layers.{}.mlp.up_proj.weight", ("layers", "mlp", "up"), inputs=1),
        Weight("model.layers.{}.mlp.down_proj.weight", ("layers", "mlp", "down"), inputs=1),
        Weight("model.layers.{}.post_feedforward_layernorm.weight", ("layers", "post_feedforward_norm", "scale")),
        Weight("model.norm.weight", ("final_norm", "scale")),
        Weight("lm_head.weight", ("lm_head",)),
    )

    @property
    def embedding_scale(self) -> float:
        return self.config.hidden_size**0.5

    def layer_kinds(self):
        used = sorted(set(self.config.layer_types))
        kinds = tuple(
            LayerKind(
                self.config.sliding_window if kind == SLIDING else None,
                getattr(self.config.rope_parameters, kind).frequencies(self.config.head_dim),
            )
            for kind in used
        )
        return kinds, tuple(used.index(kind) for kind in self.config.layer_types)
