"""An export to the Hugging Face hub, if it is fit to be published.

The token comes from the environment (HF_TOKEN, or `hf auth login`) and is never read by us or written anywhere.
"""

from collections.abc import Sequence
from pathlib import Path

from distil_jax.errors import UserError


def push(folder: Path, repo: str, *, private: bool, missing: Sequence[str] = ()) -> str:
    """Uploads the files of `folder` to the model repository `repo` ("owner/name"), made if need be; returns the URL of
    the commit.

    private: of a repository that is made; one that is there already and public is refused while this is true. missing:
    what keeps the export from being published. Raises UserError, before anything is sent if `missing` holds anything.
    """
    if missing:
        more = f" (and {len(missing) - 1} more, see its README.md)" if len(missing) > 1 else ""
        raise UserError(f"{folder} is not ready to publish and was not pushed. Missing: {missing[0]}{more}")
    from huggingface_hub import HfApi, constants, get_token  # only a push needs a client
    from huggingface_hub.errors import HFValidationError

    again = f"the export in {folder} is finished: repeat with `distil-jax export` and --config.export.push_to={repo}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"not pushed to {repo}, as HF_HUB_OFFLINE is set; {again} without it")
    if not get_token():
        raise UserError(f"not pushed to {repo}: no token; set HF_TOKEN or run `hf auth login`; {again}")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        public = private and not api.model_info(repo).private
        if not public:
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model, card and licences from distil_jax"
            )
            return str(commit.commit_url)
    except HFValidationError as error:
        raise UserError(f"config.export.push_to is {repo!r}: {_first_line(error)}") from error
    except Exception as error:  # the client raises its own errors, its HTTP library's, ValueError and OSError alike
        raise UserError(f"not pushed to {repo}: {_reason(error)}; {again}") from error
    raise UserError(f"not pushed to {repo}: it is public; set --config.export.private=false if that is meant; {again}")


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token (401); make one with write access and set HF_TOKEN"
    if status == 403:
        return f"the token may not write there (403: {_first_line(error)}); use one with write access to that owner"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
