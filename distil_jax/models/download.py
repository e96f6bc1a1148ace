"""A model's directory, local or by its name on the Hugging Face hub."""

import os
import re
from pathlib import Path

from distil_jax.errors import UserError

# No pickles and no code. "consolidated" is the vendor's own second copy of the weights.
WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*", "USE_POLICY*", "NOTICE*"]
UNWANTED = ["*/*", "consolidated*"]
LOGIN = "set HF_TOKEN or run `hf auth login`"


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of a model: a directory as it is, or "owner/name" or "owner/name@revision" from the hub.

    revision: branch, tag or commit, in place of @revision. What the cache holds is not fetched again, and with
    HF_HUB_OFFLINE set nothing is. Raises UserError that says what to do if there is no such directory or repository, a
    licence has to be accepted, or the hub cannot be reached.
    """
    path, name = Path(path_or_id).expanduser(), os.fspath(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{name} is a local directory and has no revision {revision!r}; leave the revision out")
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and the safetensors files")
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(
            f"{name}: no such directory, and no hub id (owner/name or owner/name@revision) either; check the path"
        )
    repository, stated = match.groups()
    if stated and revision not in (None, stated):
        raise UserError(f"{name} and revision {revision!r} are two revisions; give one")
    return _snapshot(repository, stated or revision)


def config_file(hub_id: str) -> Path:
    """The config.json of "owner/name" or "owner/name@revision", fetched alone. Raises UserError otherwise."""
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=revision or None))
    except Exception as error:
        raise UserError(
            f"{hub_id}: its config.json could not be fetched from the hub ({_reason(error)}); check the name and your "
            "access, or give a local directory"
        ) from error


def _snapshot(repository: str, revision: str | None) -> Path:
    import huggingface_hub  # a local directory needs no network and no client
    from huggingface_hub import errors

    name = repository if revision is None else f"{repository}@{revision}"
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: open {huggingface_hub.constants.ENDPOINT}/{repository}, accept the licence, then {LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the repository has no such revision; give a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no local directory, and no repository on the hub that you may see; check the name and, if it is "
            f"private, {LOGIN}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: no local directory, and not whole in the cache, while HF_HUB_OFFLINE forbids the network; "
                "fetch it once without HF_HUB_OFFLINE, or give a local directory"
            ) from error
        raise UserError(
            f"{name}: no local directory, not whole in the cache, and the hub did not answer ({_reason(error)}); check "
            "the network, or give a local directory"
        ) from error
    except Exception as error:  # its HTTP library's errors, ValueError and OSError (a full disk) alike
        raise UserError(
            f"{name}: no local directory, and the hub did not give it ({_reason(error)}); try again, or give a local "
            "directory"
        ) from error
    return Path(found)


def _reason(error: BaseException) -> str:
    """The first cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
