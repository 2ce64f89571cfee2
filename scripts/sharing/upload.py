"""
Upload a folder to the Hub as one commit, with errors that say what to do.

A push is complete or has no effect: large files are uploaded first and stay invisible until the one commit that names
them. huggingface_hub skips unchanged files. A broken connection, a full queue (429) and a server error (5xx) are
retried where a second request cannot do anything twice.
"""

import fnmatch
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from modeling_rtransformer import CONFIGS


TRIES, FIRST_WAIT = 3, 1.0  # seconds, doubled each time
MODEL_TYPES = {config_class.model_type for config_class in CONFIGS}
# huggingface_hub 1 uses httpx, 2 uses httpx2; its own error is derived from that library's.
HTTP_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


class PushError(Exception):
    """A push that failed; the message says why, what is left on the Hub, and what to do."""


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
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
    created = False
    try:
        user = retried(api.whoami)
        owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        where = {"repo_id": repo_id, "repo_type": repo_type}
        created = ensure_repository(api, where, owners, private, create_pr)
        if revision not in (None, "main"):
            retried(lambda: api.create_branch(**where, branch=revision, exist_ok=True))
        where["revision"] = revision or "main"
        before = retried(lambda: api.repo_info(**where))
        files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        outdated = sorted(
            file.rfilename
            for file in before.siblings
            if file.rfilename not in files and any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in replaces)
        )

        def commit():
            head = api.repo_info(**where)  # again: a commit whose answer was lost may have arrived
            present = {file.rfilename for file in head.siblings}
            return api.create_commit(
                **where,
                operations=[
                    *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                    *(CommitOperationDelete(name) for name in outdated if name in present),
                ],
                commit_message=message,
                create_pr=create_pr,
                parent_commit=head.sha,  # the Hub refuses the commit if another one has come in between
            )

        done = retried(commit, lost_answers=not create_pr)  # a retry could open a second pull request
    except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        left = f"{repo_id} was made and is empty" if created else "nothing was changed there"
        raise PushError(f"{explanation(error, api, repo_id, create_pr)}. Nothing was pushed: {left}") from error
    return {
        "repo_id": repo_id,
        "url": f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}",
        "commit": done.oid,
        "pull_request": done.pr_url,
        "changed": done.oid != before.sha,
        "deleted": outdated,
    }


def ensure_repository(api: HfApi, where: dict[str, str], owners: list[str], private: bool, create_pr: bool) -> bool:
    """Create the repository if there is none, else check that it may be replaced; whether it was created."""
    repo_id = where["repo_id"]
    try:
        found = retried(lambda: api.repo_info(**where))
    except RepositoryNotFoundError:
        found = None
    if found is not None:
        if private and not found.private:
            raise PushError(f"{repo_id} exists and is public; make it private in its settings, or leave --private out")
        model_type = (getattr(found, "config", None) or {}).get("model_type")
        if model_type not in (None, *MODEL_TYPES) and not create_pr:
            raise PushError(
                f"{repo_id} exists and holds a model of type {model_type!r}, which this push would replace; choose "
                "another name, or propose the change with --create-pr"
            )
        return False
    if create_pr:
        raise PushError(f"{repo_id} does not exist, so there is nothing to propose a change of; leave --create-pr")
    if repo_id.split("/")[0] not in owners:
        raise PushError(
            f"{owners[0]} cannot make a repository in {repo_id.split('/')[0]}; yours are {', '.join(owners)}"
        )
    sdk = "static" if where["repo_type"] == "space" else None
    retried(lambda: api.create_repo(**where, private=private, exist_ok=True, space_sdk=sdk))
    return True


def retried(call: Callable[[], Any], lost_answers: bool = True) -> Any:
    """The result of `call`, retried after 429, 5xx and, with `lost_answers`, a broken connection."""
    for attempt in range(TRIES):
        try:
            return call()
        except HTTP_ERROR as error:  # uploads raise RuntimeError, after retries by huggingface_hub
            status = status_of(error)
            temporary = lost_answers if status is None else status == 429 or status >= 500
            if not temporary or attempt == TRIES - 1:
                raise
            wait = FIRST_WAIT * 2**attempt
            answer = f"the Hub answered {status}" if status else f"the connection broke ({type(error).__name__})"
            print(f"{answer}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)


def status_of(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def explanation(error: BaseException, api: HfApi, repo_id: str, create_pr: bool) -> str:
    """What went wrong and what to do, in one sentence without a full stop."""
    cause = error
    while cause is not None and not isinstance(cause, HTTP_ERROR):
        cause = cause.__cause__ or cause.__context__
    status = status_of(cause)
    login = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
    if isinstance(error, LocalTokenNotFoundError):
        return f"not logged in; {login}"
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the Hub is out of reach; unset it"
    if status == 401:
        return f"the Hub does not accept the token; {login}"
    if status == 403:
        return (
            f"the token has no right to write to {repo_id}; use one with write access, or propose the change with "
            "--create-pr"
        )
    if status in (409, 412):
        return f"{repo_id} was changed by someone else meanwhile ({status}); look at it and push again"
    if status == 429:
        return "the Hub takes no more requests for now (429); push again in some minutes"
    if status is not None:
        return f"the Hub answered {status} ({str(cause).strip().splitlines()[-1]}); push again later"
    if cause is not None:
        sent = create_pr and type(cause).__name__ != "ConnectError"
        again = f"; look at {api.endpoint}/{repo_id}/discussions before pushing again" if sent else ""
        return f"no connection to {api.endpoint} ({type(cause).__name__}); check the network, then push again{again}"
    return str(error).strip()
