"""What every family's config has: sizes, special ids, rotary frequencies, under their Hugging Face names."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from distil_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary frequencies, in the fields of transformers v5's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    NEEDED: ClassVar = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }

    def __post_init__(self):
        if self.rope_type not in self.NEEDED:
            raise UserError(
                f"config: rope_type {self.rope_type!r} is not supported; supported are {', '.join(self.NEEDED)}"
            )
        for key in ("rope_theta", *self.NEEDED[self.rope_type]):
            value = getattr(self, key)
            if value is None:
                raise UserError(f"config: rope_type {self.rope_type!r} needs {key!r} in rope_parameters")
            if not isinstance(value, int | float) or value <= 0:
                raise UserError(f"config: {key} of rope_parameters is {value!r}; it must be a number above 0")

    @classmethod
    def read(cls, given: "Mapping | RopeParameters | None", *, theta: float, max_positions: int) -> "RopeParameters":
        """From a `rope_parameters` (v5) or `rope_scaling` (older) mapping; `theta` where it has no rope_theta."""
        if isinstance(given, RopeParameters):
            return given
        given = cls.entries(given)
        if "type" in given:  # the oldest spelling
            given.setdefault("rope_type", given["type"])
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config: partial_rotary_factor is not supported; these families rotate the whole head")
        if given.get("rope_type") == "llama3":
            given.setdefault("original_max_position_embeddings", max_positions)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{"rope_theta": theta} | {k: v for k, v in given.items() if k in known and v is not None})

    @staticmethod
    def entries(given: Mapping | None) -> dict:
        """A copy of a mapping in config.json. Raises UserError if it is none."""
        if not isinstance(given or {}, Mapping):
            raise UserError(f"config: rope parameters are {given!r}; they must be an object with a rope_type")
        return dict(given or {})

    def write(self) -> dict:
        """The `rope_parameters` mapping of transformers v5."""
        keys = ("rope_theta", "rope_type", *self.NEEDED[self.rope_type])
        return {key: getattr(self, key) for key in keys}

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "K2"]:
        """Angle per position of each pair, float32 (radians). Source: transformers, modeling_rope_utils."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.float32(self.rope_theta) ** exponent
        if self.rope_type == "default":
            return plain
        if self.rope_type == "linear":
            return plain / np.float32(self.factor)
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        low, high, context = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        wavelength = np.float32(2 * math.pi) / plain
        keep = ((context / wavelength - low) / (high - low)).astype(np.float32)
        between = (1 - keep) * plain / np.float32(self.factor) + keep * plain
        stretched = np.where(wavelength > context / low, plain / np.float32(self.factor), between)
        return np.where(wavelength < context / high, plain, stretched).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields that every family has, under their Hugging Face names (defaults are the family's in transformers)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    tokenizer_size: int | None = None  # ids that the tokenizer has; not in config.json, see Model.with_tokenizer

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    NOT_WRITTEN: ClassVar = frozenset({"tokenizer_size"})

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):  # hashable, as configs are static arguments of jit
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            self._at_least_one(key)
        wholes = [("num_attention_heads", "num_key_value_heads")]
        if self.head_dim is None:
            wholes.append(("hidden_size", "num_attention_heads"))
        for whole, part in wholes:
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"config: {whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}; change one"
                )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        self._at_least_one("head_dim")
        if self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} is odd; rotary positions need an even number")

        if not isinstance(self.tie_word_embeddings, bool):
            raise UserError(f"config: tie_word_embeddings is {self.tie_word_embeddings!r}; it must be true or false")
        if not isinstance(self.rms_norm_eps, int | float) or self.rms_norm_eps <= 0:
            raise UserError(f"config: rms_norm_eps is {self.rms_norm_eps!r}; it must be a number above 0")

    def _at_least_one(self, key: str):
        value = getattr(self, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config: {key} is {value!r}; it must be a whole number above 0")

    @property
    def text_vocab_size(self) -> int:
        """Token ids below it may appear in a softmax: rows that pad the vocabulary for the hardware may not."""
        return min(self.vocab_size, self.tokenizer_size or self.vocab_size)

    @classmethod
    def own_fields(cls, raw: Mapping) -> dict:
        """The entries of a config.json that are fields of this dataclass."""
        names = {field.name for field in dataclasses.fields(cls)} - cls.NOT_WRITTEN
        return {name: raw[name] for name in names if name in raw}

    @staticmethod
    def refuse(raw: Mapping, **supported):
        """Raises UserError where config.json asks for something that these modules do not compute."""
        for key, value in supported.items():
            if raw.get(key) is not None and raw[key] != value:
                raise UserError(f"config.json: {key}={raw[key]!r} is not supported, only {value!r} is")

    def hf_fields(self) -> dict:
        """The dataclass as JSON values (transformers v5 spelling)."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.NOT_WRITTEN]
        written = {name: getattr(self, name) for name in names}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in written.items()}
