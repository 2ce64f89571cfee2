"""
A Hub on the loopback device: as much of the Hub's HTTP interface as `huggingface_hub` uses to push and to load.

Repositories live in memory: models, spaces, branches, commits, pull requests, LFS objects. It fails on purpose:

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", status=503, times=2)    # two uploads break off half-way with 503
        hub.fail("POST", "/commit/", drop="after")       # the commit is made, but its answer is lost
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USERS = {
    "hf_" + "w" * 34: ("someone", "write"),
    "hf_" + "r" * 34: ("reader", "read"),
    "hf_" + "o" * 34: ("other", "write"),
}
WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = USERS
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".pth")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclasses.dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def commit_at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        number = sum(map(len, self.branches.values()))
        commit = Commit(hashlib.sha1(f"{number} {title}".encode()).hexdigest(), title, files)
        self.branches.setdefault(branch, []).append(commit)
        return commit


@dataclasses.dataclass
class Fault:
    method: str
    path: str
    status: int | None
    drop: str | None
    times: int
    headers: dict[str, str]


class Refused(Exception):
    """An answer that is an error: status, message and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, path, *, status=None, drop=None, times=1, headers=None) -> None:
        """Answer the next `times` requests with a status, or drop the connection `"before"` or `"after"` the work."""
        self.faults.append(Fault(method, path, status, drop, times, headers or {}))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return self.repos[repo_type, repo_id].commit_at(revision).files

    def commits(self, repo_id: str, branch: str = "main", repo_type: str = "model") -> list[str]:
        return [commit.title for commit in self.repos[repo_type, repo_id].branches[branch]]

    def count(self, method: str, path: str) -> int:
        return sum(asked == method and re.search(path, where) is not None for asked, where in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status: int = 200, content: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def serve(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        fault = self.hub.take_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.drop != "after":
            self.rfile.read(length // 2)  # broken off half-way through what the client sends
            self.close_connection = True
            if fault.status is not None:
                # Without being told, the client would send its next request into the connection that is closing.
                headers = {"Connection": "close", **fault.headers}
                self.answer(fault.status, {"error": f"made to fail with {fault.status}"}, **headers)
                self.wfile.flush()
                self.rfile.read(length - length // 2)  # unread, it would reset the connection before the answer is seen
            return
        self.body = self.rfile.read(length) if length else self.read_chunks()
        self.hub.requests.append((self.command, path))
        self.hub.bodies.append(self.body)
        if fault is not None:
            self.answer = lambda *arguments, **headers: setattr(self, "close_connection", True)
        try:
            with self.hub.lock:
                self.route(path)
        except Refused as error:
            headers = {"X_Error_Message": str(error)} | ({"X_Error_Code": error.code} if error.code else {})
            self.answer(error.status, {"error": str(error)}, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_chunks(self) -> bytes:
        """The body of a request that tells its length piece by piece."""
        content = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    def user(self, write: bool = False, owner: str | None = None) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        name, role = USERS.get(token, (None, None))
        if write and name is None:
            raise Refused(401, "Invalid username or password.")
        if write and (role != "write" or owner != name):
            raise Refused(403, f"You don't have the rights to write to {owner}")
        return name

    def repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user() != repo_id.split("/")[0]):
            raise Refused(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return repo

    def route(self, path: str) -> None:
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                kind = (match.groupdict().get("kind") or "models").removesuffix("s")
                return method(self, **{**match.groupdict(), "kind": kind})
        raise Refused(404, f"the test server has no {path}")

    def whoami(self, kind):
        name = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        role = next(role for user, role in USERS.values() if user == name)
        self.answer(
            content={"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}, "type": "x"}}
        )

    def create(self, kind):
        asked = json.loads(self.body)
        kind, owner = asked.get("type") or "model", asked.get("organization") or self.user()
        self.user(write=True, owner=owner)
        repo_id = f"{owner}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        content = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", **content})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.hub.repos[kind, repo_id] = Repo(private, {})
        repo.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(content=content)

    def validate(self, kind):
        text = json.loads(self.body)["content"]
        try:
            data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
            errors = [] if isinstance(data, dict) else [{"message": "the metadata are no mapping"}]
        except (TypeError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, kind, repo_id, revision="main"):
        commit = self.commit(kind, repo_id, revision)
        content = {"id": repo_id, "sha": commit.oid, "private": self.repo(kind, repo_id).private, "tags": []}
        content["siblings"] = [{"rfilename": name} for name in commit.files]
        if "config.json" in commit.files:
            content["config"] = {"model_type": json.loads(commit.files["config.json"]).get("model_type")}
        self.answer(content=content)

    def commit(self, kind, repo_id, revision) -> Commit:
        commit = self.repo(kind, repo_id).commit_at(revision)
        if commit is None:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return commit

    def refs(self, kind, repo_id):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in self.repo(kind, repo_id).branches.items()
        ]
        self.answer(content={"branches": branches, "tags": [], "converts": []})

    def branch(self, kind, repo_id, revision):
        self.user(write=True, owner=repo_id.split("/")[0])
        repo = self.repo(kind, repo_id)
        if revision in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[revision] = [repo.branches["main"][-1]]
        self.answer()

    def tree(self, kind, repo_id, revision, path=None):
        files = self.commit(kind, repo_id, revision).files
        below = {name for name in files if path is None or name.startswith(path + "/")}
        if path is not None and not below:
            raise Refused(404, f"no {path}", "EntryNotFound")
        self.answer(
            content=[
                {"type": "file", "path": name, "size": len(files[name]), "oid": git_hash(files[name])}
                for name in sorted(below)
            ]
        )

    def resolve(self, kind, repo_id, revision, path):
        commit = self.commit(kind, repo_id, revision)
        if path not in commit.files:
            return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        self.answer(content=content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit.oid)

    def preupload(self, kind, repo_id, revision):
        asked = json.loads(self.body)
        here = self.commit(kind, repo_id, revision).files
        rules = asked.get("gitIgnore")
        if rules is None:
            rules = here.get(".gitignore", b"").decode()
        answers = []
        for file in asked["files"]:
            name = file["path"]
            is_lfs = name.endswith(LFS_SUFFIXES)
            old = here.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_lfs else git_hash(old)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": ignored(name, rules), "oid": oid})
        self.answer(content={"files": answers})

    def lfs_batch(self, kind, repo_id):
        self.user(write="create_pr" not in self.query and self.user() is None, owner=None)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            actions = {}
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}"}
                actions = {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}}
            objects.append({**entry, **actions})
        self.answer(content={"transfer": "basic", "objects": objects})

    def lfs_put(self, kind, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not what its hash says")
        self.hub.objects[oid] = self.body
        self.answer()

    def lfs_verify(self, kind):
        asked = json.loads(self.body)
        self.answer(200 if len(self.hub.objects.get(asked["oid"], b"")) == asked["size"] else 404)

    def make_commit(self, kind, repo_id, revision):
        as_request = "create_pr" in self.query
        repo = self.repo(kind, repo_id)
        self.user(write=True, owner=self.user() if as_request else repo_id.split("/")[0])
        head = self.commit(kind, repo_id, revision)
        files, title = dict(head.files), None
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"the LFS object of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        branch = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.branches) + 1}" if as_request else revision
        commit = repo.add(branch, title, files)
        url = f"{self.hub.url}/{repo_id}"
        content = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if as_request:
            content["pullRequestUrl"] = f"{url}/discussions/{branch.removeprefix('refs/pr/')}"
        self.answer(content=content)


def ignored(name: str, rules: str) -> bool:
    """Whether the last matching line of a `.gitignore` says so; lines as `/pattern` and `!/pattern`, for the root."""
    verdict = False
    for line in rules.splitlines():
        if fnmatch(name.split("/")[0], line.lstrip("!").lstrip("/")):
            verdict = not line.startswith("!")
    return verdict


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|spaces)/{REPO}"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    ("/api/whoami-v2", Handler.whoami),
    ("/api/repos/create", Handler.create),
    ("/api/validate-yaml", Handler.validate),
    (API, Handler.info),
    (f"{API}/revision/{REVISION}", Handler.info),
    (f"{API}/refs", Handler.refs),
    (f"{API}/branch/{REVISION}", Handler.branch),
    (f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", Handler.tree),
    (f"{API}/preupload/{REVISION}", Handler.preupload),
    (f"{API}/commit/{REVISION}", Handler.make_commit),
    (rf"/(?:(?P<kind>spaces)/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("/lfs-verify", Handler.lfs_verify),
    (rf"/(?:(?P<kind>spaces)/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
