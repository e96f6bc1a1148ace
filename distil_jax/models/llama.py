"""Llama 3.x: pre-norm blocks, SwiGLU, grouped queries, llama3 rotary scaling. Source: transformers, modeling_llama."""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx

from distil_jax.errors import UserError
from distil_jax.models.config import DecoderConfig, RopeParameters
from distil_jax.models.decoder import LayerKind, Model, Weight
from distil_jax.models.layers import Attention, GatedMLP, RMSNorm

# A Mistral block is a Llama block with a sliding window. Its config.json leaves out other defaults than Llama's: these
# (transformers, configuration_mistral).
MISTRAL = {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Fields and defaults of transformers' LlamaConfig."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    rope_parameters: RopeParameters | Mapping | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def __post_init__(self):
        rope = RopeParameters.read(self.rope_parameters, theta=10_000.0, max_positions=self.max_position_embeddings)
        object.__setattr__(self, "rope_parameters", rope)
        super().__post_init__()

    @classmethod
    def from_hf(cls, raw: Mapping) -> "LlamaConfig":
        """From a config.json, old spelling (rope_theta, rope_scaling) or new (rope_parameters); Mistral's too if its
        window hides nothing."""
        if raw.get("model_type") == "mistral":
            raw = MISTRAL | dict(raw) | {"attention_bias": False, "mlp_bias": False}
            window, longest = raw["sliding_window"], raw["max_position_embeddings"]
            if window is not None and window < longest:
                raise UserError(
                    f"config.json: sliding_window {window} (4096 where it is left out) is shorter than "
                    f"max_position_embeddings {longest}, and a Llama layer has no window; set max_position_embeddings "
                    f"to {window} if no text is longer"
                )
        cls.refuse(raw, hidden_act="silu", partial_rotary_factor=1.0)
        fields = cls.own_fields(raw)
        scaling = fields.get("rope_parameters") or raw.get("rope_scaling") or {}
        fields["rope_parameters"] = {"rope_theta": raw.get("rope_theta") or 10_000.0} | RopeParameters.entries(scaling)
        return cls(**fields)

    def to_hf(self) -> dict:
        """The entries of a config.json in the spelling of transformers v5."""
        fixed = {"hidden_act": "silu", "attention_dropout": 0.0}
        return fixed | self.hf_fields() | {"rope_parameters": self.rope_parameters.write()}


class LlamaBlock(nnx.Module):
    """norm -> attention -> add; norm -> MLP -> add."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype):
        def norm():
            return RMSNorm(config.hidden_size, config.rms_norm_eps, one_plus=False, dtype=dtype)

        self.input_norm = norm()
        self.attention = Attention(config, rngs, dtype, scale=config.head_dim**-0.5, bias=config.attention_bias)
        self.post_attention_norm = norm()
        self.mlp = GatedMLP(config, rngs, dtype, activation=jax.nn.silu, bias=config.mlp_bias)

    def __call__(self, x_BxLxD, table, mix):
        attended, extra = self.attention(self.input_norm(x_BxLxD), table, mix)
        x_BxLxD = x_BxLxD + attended
        return x_BxLxD + self.mlp(self.post_attention_norm(x_BxLxD)), extra


class Llama(Model):
    """Llama 3.x (also Llama 2, SmolLM 1 and 2, Mistral without a window, and the fine-tunes of any, such as Med42)."""

    block = LlamaBlock
    one_plus = False
    names = (
        Weight("model.embed_tokens.weight", ("embedding",)),
        Weight("model.layers.{}.input_layernorm.weight", ("layers", "input_norm", "scale")),
        Weight("model.layers.{}.self_attn.q_proj.weight", ("layers", "attention", "q"), inputs=1),
        Weight("model.layers.{}.self_attn.q_proj.bias", ("layers", "attention", "q_bias"), inputs=0),
        Weight("model.layers.{}.self_attn.k_proj.weight", ("layers", "attention", "k"), inputs=1),
        Weight("model.layers.{}.self_attn.k_proj.bias", ("layers", "attention", "k_bias"), inputs=0),
        Weight("model.layers.{}.self_attn.v_proj.weight", ("layers", "attention", "v"), inputs=1),
        Weight("model.layers.{}.self_attn.v_proj.bias", ("layers", "attention", "v_bias"), inputs=0),
        Weight("model.layers.{}.self_attn.o_proj.weight", ("layers", "attention", "o"), inputs=2),
        Weight("model.layers.{}.self_attn.o_proj.bias", ("layers", "attention", "o_bias"), inputs=0),
        Weight("model.layers.{}.post_attention_layernorm.weight", ("layers", "post_attention_norm", "scale")),
        Weight("model.layers.{}.mlp.gate_proj.weight", ("layers", "mlp", "gate"), inputs=1),
        Weight("model.layers.{}.mlp.gate_proj.bias", ("layers", "mlp", "gate_bias"), inputs=0),
        Weight("model.layers.{}.mlp.up_proj.weight", ("layers", "mlp", "up"), inputs=1),
        Weight("model.layers.{}.mlp.up_proj.bias", ("layers", "mlp", "up_bias"), inputs=0),
        Weight("model.layers.{}.mlp.down_proj.weight", ("layers", "mlp", "down"), inputs=1),
        Weight("model.layers.{}.mlp.down_proj.bias", ("layers", "mlp", "down_bias"), inputs=0),
        Weight("model.norm.weight", ("final_norm", "scale")),
        Weight("lm_head.weight", ("lm_head",)),
    )

    def layer_kinds(self):
        kind = LayerKind(None, self.config.rope_parameters.frequencies(self.config.head_dim))
        return (kind,), (0,) * self.config.num_hidden_layers
