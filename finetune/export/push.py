"""Upload a finished folder to the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from finetune.errors import Failed, UserError
from finetune.files.path_errors import path_errors
from finetune.terminal import Say, say

# Files that the hub itself puts into a new repository.
OF_THE_HUB = {".gitattributes", "README.md"}


def refuse_push(repo: str, *, public: bool, api: HfApi | None = None) -> None:
    """Find out before the work begins that its result could not be uploaded.

    Args:
        repo: `owner/name`.
        public: whether everybody may see it.
        api: of the hub; None for the usual one.

    Raises:
        UserError: no token, a malformed name, a repository with files of its own, or one that everybody sees where
            that was not asked for.
        Failed: the hub does not answer.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {error}") from None
    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: give owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push needs the network, but HF_HUB_OFFLINE is set: unset it")
    if get_token() is None:
        raise UserError("--push needs a token of the hub: log in (hf auth login), or set HF_TOKEN")
    try:
        found = (api or HfApi()).model_info(repo)
    except RepositoryNotFoundError:
        return
    except (HfHubHTTPError, OSError) as error:
        raise Failed(f"--push {repo}: the hub does not answer ({_first_line(error)})") from error
    if not found.private and not public:
        raise UserError(f"--push {repo}: that repository is public. Give --public if everybody may see this model")
    there = sorted({file.rfilename for file in found.siblings or ()} - OF_THE_HUB)
    if there:
        raise UserError(
            f"--push {repo}: that repository holds files already ({', '.join(there[:3])}), which would mix with the "
            "new ones: give another name"
        )


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    api: HfApi | None = None,
    say: Say = say,
) -> None:
    """Upload a folder as it is; the repository is created, and private unless asked otherwise.

    Args:
        folder: finished. Nothing outside it is uploaded, and no links.
        repo: `owner/name`, as accepted by `refuse_push`.
        public: as in `refuse_push`.
        api: of the hub; None for the usual one.
        say: prints a labelled line.

    Raises:
        UserError: a link in the folder.
        Failed: the upload did not finish. The folder is as it was, and uploading it again goes on.
    """
    folder, api = Path(folder), api or HfApi()
    with path_errors(folder, "read", "Make it readable"):
        for path in folder.rglob("*"):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link: what it leads to is no part of the folder. Put the file there instead"
                )
    visibility = "public" if public else "private"
    say("uploading", f"{folder} to {repo} ({visibility})")
    try:
        api.create_repo(repo, private=not public, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), repo_type="model", commit_message="Upload checkpoint")
    except (HfHubHTTPError, OSError) as error:
        raise Failed(
            f"{folder} is finished, but its upload to {repo} is not: {_first_line(error)}. Go on with: "
            f"hf upload {repo} {os.path.relpath(folder)}{'' if public else ' --private'}"
        ) from error
    say("uploaded", f"{constants.ENDPOINT}/{repo}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
