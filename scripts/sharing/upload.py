"""
Uploading a folder to the Hub as one commit, with errors that say what to do.

A push is whole or has not happened: large files go up first and show nowhere until the one commit that names them. What
has not changed is not sent again. A broken connection, a full queue (429) or a server error (5xx) is tried again where
that cannot do anything twice.
"""

import fnmatch
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


TRIES, FIRST_WAIT = 3, 1.0  # seconds, doubled each time
MODEL_TYPE = "rtransformer"
# huggingface_hub 1 speaks through httpx, 2 through httpx2; its own error is derived from the one that it uses.
HTTP_ERROR = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


class PushError(Exception):
    """A push that did not happen; the message says why, what is left on the Hub, and what to do."""


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
    Make the repository if there is none, and the branch, then commit every file of `folder`.

    Args:
        repo_id: `name` or `owner/name`.
        replaces: patterns of files that are deleted from the repository where `folder` does not have them.
        private: only the owner sees the repository, if it is new; one that is there has to be private already.
        revision: the branch; `main` if None.
        create_pr: propose the commit as a pull request to a repository that is there.

    Returns:
        `repo_id`, `url`, `commit`, `pull_request` (or None), `changed` (False if all was there already), and the names
        `deleted`.

    Raises:
        PushError: it did not happen.
    """
    api = api or HfApi()
    if create_pr and revision is not None:
        raise PushError("--create-pr proposes a change of the main branch; leave --revision out")
    created = False
    try:
        owner, names = _identity(api)
        repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
        info = _repo_info(api, repo_id, repo_type)
        if info is None:
            if create_pr:
                raise PushError(
                    f"{repo_id} does not exist, so there is nothing to propose a change of; leave --create-pr"
                )
            if repo_id.split("/")[0] not in names:
                raise PushError(
                    f"{owner} cannot make a repository in {repo_id.split('/')[0]}; yours are {', '.join(names)}"
                )
            _patiently(
                lambda: api.create_repo(
                    repo_id,
                    repo_type=repo_type,
                    private=private,
                    exist_ok=True,
                    space_sdk="static" if repo_type == "space" else None,
                )
            )
            created = True
        else:
            _check_existing(info, repo_id, private, create_pr)
        if revision not in (None, "main"):
            _patiently(lambda: api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True))
        plan = Plan(api, folder, repo_id, repo_type, revision or "main", replaces)
        commit = _commit(plan, message, create_pr)
    except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        left = f"{repo_id} was made and is empty" if created else "nothing was changed there"
        raise PushError(f"{_explanation(error, api, repo_id)}. Nothing was pushed: {left}") from error
    return {
        "repo_id": repo_id,
        "url": f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}",
        "commit": commit.oid,
        "pull_request": commit.pr_url,
        "changed": plan.changed,
        "deleted": plan.deleted,
    }


class Plan:
    """What a commit adds and deletes, found anew for every try: the one before may have arrived after all."""

    def __init__(self, api: HfApi, folder: Path, repo_id: str, repo_type: str, revision: str, replaces: Sequence[str]):
        self.api, self.folder, self.replaces = api, folder, replaces
        self.where = {"repo_id": repo_id, "repo_type": repo_type}
        self.revision = revision
        self.first_head: str | None = None
        self.changed = False
        self.deleted: list[str] = []

    def commit(self, message: str, create_pr: bool) -> CommitInfo:
        """One commit upon the head that was seen; refused by the Hub if another has come in between."""
        head = self.api.repo_info(**self.where, revision=self.revision)
        self.first_head = self.first_head or head.sha
        there = {file.rfilename for file in head.siblings}
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        additions = [CommitOperationAdd(path.name, str(path)) for path in files]
        gone = there - {path.name for path in files}
        deleted = sorted(name for name in gone if any(fnmatch.fnmatch(name, rule) for rule in self.replaces))
        commit = self.api.create_commit(
            **self.where,
            operations=[*additions, *(CommitOperationDelete(name) for name in deleted)],
            commit_message=message,
            revision=self.revision,
            create_pr=create_pr,
            parent_commit=head.sha,
        )
        self.deleted = sorted({*self.deleted, *deleted})  # a try before this one may have brought its own there
        self.changed = self.changed or commit.oid != self.first_head
        return commit


def _commit(plan: Plan, message: str, create_pr: bool) -> CommitInfo:
    # A pull request whose answer was lost may be there, and a second try would make another.
    return _patiently(lambda: plan.commit(message, create_pr), lost_answers=not create_pr)


def _patiently(call: Callable[[], Any], lost_answers: bool = True) -> Any:
    """The result of `call`, tried again after what may pass: 429, 5xx and, if asked for, a broken connection."""
    for attempt in range(TRIES):
        try:
            return call()
        except (HTTP_ERROR, RuntimeError) as error:
            cause = _http_cause(error)
            status = _status(cause)
            passing = status == 429 or (status or 0) >= 500 or (lost_answers and status is None and cause is not None)
            # Of a RuntimeError from an upload, huggingface_hub has tried the request itself again already.
            if not passing or cause is not error or attempt == TRIES - 1:
                raise
            wait = FIRST_WAIT * 2**attempt
            print(f"{_short(cause)}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)


def _identity(api: HfApi) -> tuple[str, list[str]]:
    """The user's name, and the owners that the user can make repositories for."""
    me = _patiently(api.whoami)
    return me["name"], [me["name"], *(org["name"] for org in me.get("orgs", []))]


def _repo_info(api: HfApi, repo_id: str, repo_type: str):
    try:
        return _patiently(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except RepositoryNotFoundError:
        return None


def _check_existing(info, repo_id: str, private: bool, create_pr: bool) -> None:
    if private and not info.private:
        raise PushError(f"{repo_id} exists and is public; make it private in its settings, or leave --private out")
    model_type = (getattr(info, "config", None) or {}).get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE and not create_pr:
        raise PushError(
            f"{repo_id} exists and holds a model of type {model_type!r}, which this push would replace; choose another "
            "name, or propose the change with --create-pr"
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_cause(error: BaseException) -> BaseException | None:
    return next((cause for cause in _causes(error) if isinstance(cause, HTTP_ERROR)), None)


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _short(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answered {status}" if status else f"the connection broke ({type(error).__name__})"


def _explanation(error: BaseException, api: HfApi, repo_id: str) -> str:
    cause = _http_cause(error)
    status = _status(cause)
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
        again = f"; look at {api.endpoint}/{repo_id}/discussions before pushing again" if _was_sent(cause) else ""
        return f"no connection to {api.endpoint} ({type(cause).__name__}); check the network, then push again{again}"
    return str(error).strip()


def _was_sent(error: BaseException) -> bool:
    """Whether a broken connection may have taken a commit along: it was not the connecting that failed."""
    request = getattr(error, "_request", None)
    return type(error).__name__ != "ConnectError" and request is not None and "create_pr=1" in str(request.url)
