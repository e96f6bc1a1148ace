"""distil_jax: distil a large teacher into a small student across tokenizers and architectures, in JAX.

The names below are loaded when they are first used, so that importing this package is quick and touches no device.
"""

import importlib

__version__ = "0.1.0"

# name -> the module that holds it; "losses" is that module itself
_FACE = {
    "load_pretrained": "distil_jax.models.hub",
    "save_pretrained": "distil_jax.models.hub",
    "ByteTable": "distil_jax.tokens.bytes",
    "align": "distil_jax.tokens.align",
    "Projection": "distil_jax.projection",
    "losses": "distil_jax.losses",
    "generate": "distil_jax.generation",
    "UserError": "distil_jax.errors",
}
__all__ = [*_FACE, "__version__"]


def __getattr__(name: str):
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_FACE[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
