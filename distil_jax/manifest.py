"""What a stage leaves behind: `manifest.json`, written last and whole or not at all.

A stage folder without a manifest is unfinished. One whose `key` differs was made from another config or other inputs.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON so that `path` holds the old content or the new, never a part of it.

    Raises OSError if the disk is full (the old content stays), TypeError or ValueError for what is no JSON (NaN too).
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_folder(partial: Path, target: Path) -> None:
    """Renames the folder `partial` to `target`; what stood there steps aside first and is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write(folder: str | os.PathLike, key: str, **facts: Any) -> None:
    """Marks `folder` as finished: `{"key": key, **facts}`, facts as JSON values. Call it last."""
    write_json_atomic(Path(folder) / NAME, {"key": key, **facts})


def read(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of a finished stage; None if there is none, or none that can be read: the stage then runs again."""
    try:
        manifest = json.loads((Path(folder) / NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("key"), str) else None
