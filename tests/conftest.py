"""The ground under every test: CPU only, eight fake devices, no network, no silent broadcasting of ranks."""

import importlib.util
import os
import tempfile
from pathlib import Path

# XLA reads these once, when jax makes its first client, so they must stand before anything imports jax. Subprocesses
# that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
# Eight devices share the cores: on a busy machine one may come late to a collective, which is no reason to abort.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
if _EIGHT_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES} {_PATIENCE}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
# One program is compiled once, whichever process of the session, or of a later one, needs it.
_CACHE = Path(tempfile.gettempdir()) / f"distil_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 << 30)}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax  # noqa: E402
import pytest  # noqa: E402

# An accidental [B, L] + [L] is the likeliest silent bug here: make it an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tokenizers_dir() -> Path:
    """Folder with the real tokenizers, ``gemma3/`` and ``llama3/`` (tokenizer.json and tokenizer_config.json each).

    They are too large and not ours to ship, so they are looked for in ``$DISTIL_JAX_TOKENIZERS``, then in
    ``shared/tokenizers`` beside the checkout.
    """
    stated = os.environ.get("DISTIL_JAX_TOKENIZERS")
    folder = Path(stated) if stated else PROJECT.parent / "shared" / "tokenizers"
    missing = [name for name in ("gemma3", "llama3") if not (folder / name / "tokenizer.json").is_file()]
    if missing:
        pytest.skip(
            f"no {' and '.join(missing)} tokenizer under {folder}: set DISTIL_JAX_TOKENIZERS to a folder that has them"
        )
    return folder


@pytest.fixture(scope="session")
def bench_tool():
    """Loads a script of bench/ by its name, as running it would: its folder stands first in the path meanwhile."""

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(PROJECT / "bench")
            spec = importlib.util.spec_from_file_location(name, PROJECT / "bench" / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def quickly_compiled():
    """Where compiling takes nearly all of the time: the numbers do not depend on how hard XLA tries."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
