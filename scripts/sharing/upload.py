"""
Upload a folder to the Hub as one commit, with errors that say what to do.

A push is complete or has no effect: large files are uploaded first and stay invisible until the one commit that names
them. huggingface_hub skips unchanged files, and sends an upload again after a broken connection, a full queue (429) or
a server error (5xx). The other requests are short. They are sent once, since only their answer may be lost; a second
push sends what is missing.
"""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from modeling_rtransformer import CONFIGS


MODEL_TYPES = {config_class.model_type for config_class in CONFIGS}
# huggingface_hub 1 uses httpx, 2 uses httpx2; its own error is derived from that library's.
HTTP_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
# What is wrong and what to do, by the status that the Hub answers.
ANSWERS = {
    401: f"the Hub does not accept the token; {LOG_IN}",
    403: "the token has no right to write to REPO; use one with write access, or propose the change with --create-pr",
    404: "REPO does not exist, so there is nothing to propose a change of; leave --create-pr out",
    409: "REPO was changed by someone else meanwhile (409); look at it and push again",
    412: "REPO was changed by someone else meanwhile (412); look at it and push again",
    429: "the Hub takes no more requests for now (429); push again in some minutes",
}


class PushError(Exception):
    """A push that failed; the message says why, what is left on the Hub, and what to do."""


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    replaces: Sequence[str] = (),
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload the model",
    api: HfApi | None = None,
) -> dict[str, Any]:
    """
    Create the repository and the branch where they do not exist, then commit every file of `folder`.

    Args:
        repo_id: `name` or `owner/name`.
        replaces: patterns of files that are deleted from the repository if `folder` does not have them.
        private: only the owner sees a new repository; an existing one has to be private already.
        revision: the branch; `main` if None.
        create_pr: propose the commit as a pull request to an existing repository.

    Returns:
        `repo_id`, `url`, `commit`, `pull_request` (or None), `changed` (False if the repository already had all of it),
        and the names `deleted`.

    Raises:
        PushError: the push failed.
    """
    api = api or HfApi()
    if create_pr and revision is not None:
        raise PushError("--create-pr proposes a change of the main branch; leave --revision out")
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    created = False
    try:
        user = api.whoami()["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if not create_pr and not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            created = True
        refuse_existing(api.repo_info(repo_id), private, create_pr)
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=revision or "main")
        absent = sorted({file.rfilename for file in head.siblings} - files.keys())
        outdated = [name for name in absent if any(fnmatch.fnmatch(name, pattern) for pattern in replaces)]
        done = api.create_commit(
            repo_id,
            revision=revision or "main",
            operations=[
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                *map(CommitOperationDelete, outdated),
            ],
            commit_message=message,
            create_pr=create_pr,
            parent_commit=head.sha,  # the Hub refuses the commit if another one has come in between
        )
    except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        raise PushError(explanation(error, api.endpoint, repo_id, created, create_pr)) from error
    return {
        "repo_id": repo_id,
        "url": f"{api.endpoint}/{repo_id}",
        "commit": done.oid,
        "pull_request": done.pr_url,
        "changed": done.oid != head.sha,
        "deleted": outdated,
    }


def refuse_existing(found, private: bool, create_pr: bool) -> None:
    """Refuse a public repository for a private push, and one with a model that is not of this package."""
    if private and not found.private:
        raise PushError(f"{found.id} exists and is public; make it private in its settings, or leave --private out")
    model_type = (getattr(found, "config", None) or {}).get("model_type")
    if model_type not in (None, *MODEL_TYPES) and not create_pr:
        raise PushError(
            f"{found.id} exists and holds a model of type {model_type!r}, which this push would replace; choose "
            "another name, or propose the change with --create-pr"
        )


def explanation(error: BaseException, endpoint: str, repo_id: str, created: bool, create_pr: bool) -> str:
    """What went wrong, what is left on the Hub, and what to do."""
    if isinstance(error, LocalTokenNotFoundError):
        return f"not logged in; {LOG_IN}"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the Hub is out of reach; unset it"
    cause = error  # uploads raise a RuntimeError because of what the Hub answered
    while cause is not None and not isinstance(cause, HTTP_ERROR):
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if cause is None or status in ANSWERS:
        left = f"{repo_id} was made and is empty" if created else "nothing was changed there"
        return f"{ANSWERS.get(status, str(error).strip()).replace('REPO', repo_id)}. Nothing was pushed: {left}"
    what = f"no connection to {endpoint}" if status is None else f"the Hub answered {status}"
    again = f"look at {endpoint}/{repo_id}/discussions before pushing again" if create_pr else "push again"
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    return f"{what} ({reason}). The push was made whole or not at all; {again}"
