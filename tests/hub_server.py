"""A Hugging Face Hub on the loopback interface, for tests of code that pushes to the Hub and loads from it.

The real ``huggingface_hub`` client talks to it over HTTP, so a test covers what mocks hide: retries, resumed downloads,
tokens that must not leave the Hub's host, commits that conflict. Only model repositories are known, and everything is
kept in memory. The client reads its settings when it is imported, so run it in a subprocess with this environment:

    HF_ENDPOINT=<hub.endpoint>  HF_TOKEN=<hub.token>  HF_HOME=<a fresh folder>  HF_HUB_DISABLE_XET=1
    NO_PROXY=127.0.0.1,localhost    (where the machine has a proxy)

Large files lie, as on the Hub, on a storage host: the same port under the name ``localhost`` instead of ``127.0.0.1``.
It takes signed links only and no tokens.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PART_SIZE = 5 << 20  # larger LFS objects are uploaded in parts of this size
REGULAR_LIMIT = 10 << 20  # larger files always go to LFS
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".npz", ".png", ".jpg", ".zip", ".gz")
BINARY = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # control characters that text files do not have
MODEL, REV, OID = "/api/models/(?P<repo>[^/]+/[^/]+)", "(?P<rev>[^/]+)", "(?P<oid>[0-9a-f]{64})"
LFS, STORAGE = "/(?P<repo>[^/]+/[^/]+)[.]git/info/lfs/objects", f"/storage/(?P<repo>[^/]+/[^/]+)/{OID}"
ROUTES: list[tuple[re.Pattern[str], str, Callable[..., Answer]]] = []


class Request(NamedTuple):
    """A line of the request log; its path is unquoted and lacks the query, which may hold a signature."""

    method: str
    path: str
    has_authorization: bool
    status: int


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """The ETag, and what the client compares to see whether a file has changed: not the same hash for LFS."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_hash(self.data)

    def info(self) -> dict[str, Any]:
        """Size and hashes, under the names of the tree listing and of the model info at once."""
        pointer = f"oid sha256:{self.oid}\nsize {len(self.data)}\n".encode()
        lfs = {"oid": self.oid, "sha256": self.oid, "size": len(self.data), "pointerSize": len(pointer)}
        blob = git_hash(pointer) if self.lfs else self.oid
        return {"oid": blob, "blobId": blob, "size": len(self.data)} | ({"lfs": lfs} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    """A model repository; branches, tags and pull requests map to commit hashes."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    prs: dict[int, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256, whether committed or not
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # of unfinished uploads

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a ``refs/pr/N`` or a full commit hash stands for."""
        refs = {f"refs/pr/{number}": sha for number, sha in self.prs.items()} | self.tags | self.branches
        if (sha := refs.get(revision, revision)) not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # break the connection after so many bytes of the body

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An error answer; the client picks its exception class by the status and by ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        plain = message.encode("ascii", "replace").decode()
        headers = {"X-Error-Message": plain} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer.json({"error": message, **more}, status, headers)


def route(pattern: str, access: str = "read") -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register the handler of ``METHOD /path``. Named groups become its arguments; ``repo`` after a check of access."""

    def register(handler: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((re.compile(pattern), access, handler))
        return handler

    return register


class LoopbackHub:
    """The server and its state. Tests may read the state at any time, and change it while no client is running."""

    def __init__(self, user: str = "tester") -> None:
        self.user = user
        self.token, self.read_token = (f"hf_{secrets.token_hex(16)}" for _ in range(2))
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.server: Server | None = None
        self.endpoint, self.port = "", 0
        self._secret = secrets.token_bytes(16)
        self._failures: list[tuple[re.Pattern[str], Answer]] = []
        self._corrupted: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    def start(self) -> LoopbackHub:
        """Serve in the background; started again after `stop`, the hub keeps its port and its state."""
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.hub, self.port = self, self.server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            server.shutdown()
            server.server_close()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def fail(self, match: str, status: int, times: int = 1, body: str = "", after_bytes: int | None = None) -> None:
        """Answer the next requests whose ``METHOD /path`` matches a regular expression with an error, changing nothing.

        With ``after_bytes`` and a status below 400 a GET is served as ever, but its body breaks off after that many.
        """
        error = HubError(status, responses.get(status, "Error")).answer
        error.body, error.cut = body.encode() or error.body, after_bytes
        with self._lock:
            self._failures += [(re.compile(match), error)] * times

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return {path: file.data for path, file in self.repos[repo_id].find(revision).files.items()}

    def corrupt(self, repo_id: str, file: str) -> None:
        """From now on serve a file with its last byte changed, while size and hashes are reported as before.

        The last byte, because the file then still parses: only somebody who checks the hash can tell.
        """
        with self._lock:
            if not any(file in commit.files for commit in self.repos[repo_id].commits.values()):
                raise KeyError(f"{repo_id} has no file {file}")
            self._corrupted.add((repo_id, file))

    def answer(self, call: Handler) -> Answer:
        """The answer to a request. One lock covers all of it, so requests change the state one after another."""
        with self._lock:
            matching = (entry for entry in self._failures if entry[0].search(f"{call.command} {call.plain_path}"))
            failure = next((entry for entry in matching if entry[1].cut is None or call.command == "GET"), None)
            if failure:
                self._failures.remove(failure)
            try:
                answer = failure[1] if failure and failure[1].status >= 400 else self._dispatch(call)
            except HubError as error:
                answer = error.answer
            except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
                answer = HubError(400, f"Malformed request: {error!r}").answer
            answer.cut = failure[1].cut if failure else None
            self.requests.append(Request(call.command, call.plain_path, "Authorization" in call.headers, answer.status))
            return answer

    def _dispatch(self, call: Handler) -> Answer:
        method = "GET" if call.command == "HEAD" else call.command
        for pattern, access, handler in ROUTES:
            if found := pattern.fullmatch(f"{method} {urlsplit(call.path).path}"):
                groups: dict[str, Any] = {name: unquote(text or "") for name, text in found.groupdict().items()}
                if "repo" in groups:
                    groups["repo"] = self._open(call, groups["repo"], access)
                return handler(self, call, **groups)
        raise HubError(404, f"This hub does not know {call.command} {call.plain_path}")

    def _role(self, call: Handler) -> str:
        """What the token of a request allows; an unknown token is an error even where none is needed."""
        roles = {f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read", None: ""}
        if (header := call.headers.get("Authorization")) not in roles:
            raise HubError(401, "Invalid credentials in Authorization header")
        return roles[header]

    def _open(self, call: Handler, repo_id: str, access: str) -> Repo:
        """The repository, if the request may use it: whoever may not see a private one is told that there is none."""
        repo = self.repos.get(repo_id)
        if access == "signed":
            if repo is None or call.query.get("Signature") != self._signature(call.plain_path):
                raise HubError(403, "The signature of the link is missing or wrong")
            return repo
        role = self._role(call)
        if repo is None or (repo.private and not role):
            raise HubError(404 if role else 401, "Repository not found", "RepoNotFound")
        if access == "write" and role != "write":
            raise HubError(403 if role else 401, f"You need write access to {repo_id}")
        return repo

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()

    def _signed(self, host: str, path: str) -> str:
        return f"http://{host}:{self.port}{quote(path)}?Signature={self._signature(path)}"

    @route("GET /api/whoami-v2")
    def _whoami(self, call: Handler) -> Answer:
        if not (role := self._role(call)):
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return Answer.json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    @route("POST /api/repos/create")
    def _create(self, call: Handler) -> Answer:
        wanted, role = call.json(), self._role(call)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if role != "write":
            raise HubError(403 if role else 401, f"You have no rights to create {repo_id}")
        if wanted.get("type") not in (None, "model"):
            raise HubError(400, "This hub keeps models only")
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        private = wanted.get("private") or wanted.get("visibility") == "private"
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        first = Commit(secrets.token_hex(20), "initial commit", None, {".gitattributes": File(rules.encode())})
        self.repos[repo_id] = Repo(repo_id, bool(private), {first.sha: first}, {"main": first.sha})
        return Answer.json({"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    @route("POST /api/validate-yaml")
    def _validate_yaml(self, call: Handler) -> Answer:
        """This is no YAML parser: the one mistake that it sees is a metadata block without an end."""
        content = call.json()["content"]
        bad = content.startswith("---") and "\n---" not in content
        errors = [{"message": "the metadata block has no end"}] if bad else []
        return Answer.json({"errors": errors, "warnings": []}, 400 if bad else 200)

    @route(f"GET {MODEL}(/revision/{REV})?")
    def _info(self, call: Handler, repo: Repo, rev: str) -> Answer:
        commit, blobs = repo.find(rev or "main"), call.flag("blobs")
        siblings = [{"rfilename": path} | (file.info() if blobs else {}) for path, file in commit.files.items()]
        card = commit.files.get("README.md", File(b"")).data.decode(errors="replace")
        tags = re.findall(r"- (.+)", "".join(re.findall(r"^tags:\n((?: *- .+\n)+)", card, re.MULTILINE)[:1]))
        known = {"id": repo.id, "sha": commit.sha, "private": repo.private}
        return Answer.json(known | {"tags": tags, "siblings": siblings})

    @route(f"GET {MODEL}/tree/{REV}(/(?P<folder>.+))?")
    def _tree(self, call: Handler, repo: Repo, rev: str, folder: str) -> Answer:
        """The files below a folder; the folders themselves are not listed."""
        prefix, deep = f"{folder}/" if folder else "", call.flag("recursive")
        files = {path: file for path, file in sorted(repo.find(rev).files.items()) if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, f"{folder} does not exist on {rev}", "EntryNotFound")
        names = [path for path in files if deep or "/" not in path[len(prefix) :]]
        return Answer.json([{"type": "file", "path": path, **files[path].info()} for path in names])

    @route(f"GET {MODEL}/refs")
    def _refs(self, call: Handler, repo: Repo) -> Answer:
        def listed(kind: str, refs: Mapping[Any, str]) -> list[dict[str, str]]:
            return [{"name": str(n), "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]

        refs = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}
        return Answer.json(refs | ({"pullRequests": listed("pr", repo.prs)} if call.flag("include_prs") else {}))

    @route(f"POST {MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)", "write")
    def _add_ref(self, call: Handler, repo: Repo, kind: str, name: str) -> Answer:
        """A branch is named by the path; for a tag the path names its revision."""
        wanted, refs = call.json(), repo.branches if kind == "branch" else repo.tags
        ref, revision = (name, wanted.get("startingPoint") or "main") if kind == "branch" else (wanted["tag"], name)
        commit = repo.find(revision)
        if ref in refs:
            raise HubError(409, f"The {kind} {ref} already exists")
        refs[ref] = commit.sha
        return Answer.json({"name": ref, "targetCommit": commit.sha})

    @route(f"POST {MODEL}/preupload/{REV}", "write")
    def _preupload(self, call: Handler, repo: Repo, rev: str) -> Answer:
        """How each file is to be sent, and the hash of the one that it replaces: the client leaves out equal files."""
        present, modes = repo.find(rev).files, []
        for file in call.json()["files"]:
            path, sample = file["path"], base64.b64decode(file.get("sample", ""))
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT or BINARY.search(sample)
            mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": present[path].oid} if path in present else {}))
        return Answer.json({"files": modes})

    @route(f"POST {LFS}/batch", "write")
    def _batch(self, call: Handler, repo: Repo) -> Answer:
        """Where to send each object. One that is here already gets no action, so a repeated push goes on."""
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.json()["objects"]]
        base = f"/{repo.id}.git/info/lfs/objects"
        for entry in (entry for entry in objects if entry["oid"] not in repo.objects):
            oid, count = entry["oid"], -(-entry["size"] // PART_SIZE)
            urls = {str(n): self._signed("localhost", f"/storage/{repo.id}/{oid}/{n}") for n in range(count + 1)}
            upload: dict[str, Any] = {"href": urls.pop("0")}
            if count > 1:
                repo.parts[oid] = {}
                upload = {"href": self._signed("127.0.0.1", f"{base}/complete/{oid}")}
                upload["header"] = {"chunk_size": str(PART_SIZE), **urls}
            entry["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}{base}/verify"}}
        return Answer.json({"transfer": "multipart", "objects": objects})

    @route(f"PUT {STORAGE}/(?P<part>[0-9]+)", "signed")
    def _put(self, call: Handler, repo: Repo, oid: str, part: str) -> Answer:
        """Take a part of an object, or all of it as part 0."""
        if part == "0":
            return self._store(repo, oid, call.body)
        repo.parts[oid][int(part)] = call.body
        return Answer(200, headers={"ETag": git_hash(call.body)})

    @route(f"POST {LFS}/complete/{OID}", "signed")
    def _complete(self, call: Handler, repo: Repo, oid: str) -> Answer:
        parts = dict(sorted(repo.parts[oid].items()))
        if [part["etag"] for part in call.json()["parts"]] != [git_hash(data) for data in parts.values()]:
            raise HubError(400, "The parts are not the ones that were uploaded")
        return self._store(repo, oid, b"".join(parts.values()))

    def _store(self, repo: Repo, oid: str, data: bytes) -> Answer:
        repo.parts.pop(oid, None)
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "The sha256 of the uploaded data is not the announced one")
        repo.objects[oid] = data
        return Answer.json({"success": True})

    @route(f"POST {LFS}/verify", "write")
    def _verify(self, call: Handler, repo: Repo) -> Answer:
        if len(repo.objects.get(call.json()["oid"], b"")) != call.json()["size"]:
            raise HubError(404, "The object has not been uploaded")
        return Answer.json({"success": True})

    @route(f"POST {MODEL}/commit/{REV}", "write")
    def _commit(self, call: Handler, repo: Repo, rev: str) -> Answer:
        """One commit from lines of JSON: all of it is worked out before anything is stored."""
        lines = [json.loads(line) for line in call.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent, head, as_pr = header.get("parentCommit"), repo.find(rev), call.flag("create_pr")
        number = len(repo.prs) + 1 if as_pr else int(rev[8:]) if re.fullmatch(r"refs/pr/\d+", rev) else 0
        if not number and rev not in repo.branches:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        if as_pr and parent:
            head = repo.find(parent)  # a pull request may start from an older commit
        elif parent not in (None, head.sha):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = File(repo.objects[value["oid"]], lfs=True)  # a missing object is an error
            elif key in ("deletedFile", "deletedFolder"):
                name = value["path"] if key == "deletedFile" else value["path"].rstrip("/") + "/"
                gone = [path for path in files if path == name or (name.endswith("/") and path.startswith(name))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {name}", "EntryNotFound")
                files = {path: file for path, file in files.items() if path not in gone}
            elif key != "header":
                raise HubError(400, f"This hub does not know the operation {key}")
        message = f"{header['summary']}\n\n{header.get('description') or ''}".rstrip()
        commit = Commit(secrets.token_hex(20), message, head.sha, files)
        repo.commits[commit.sha] = commit
        refs: dict[Any, str] = repo.prs if number else repo.branches
        refs[number or rev] = commit.sha
        url = f"{self.endpoint}/{repo.id}"
        pull = {"pullRequestUrl": f"{url}/discussions/{number}"} if as_pr else {}
        return Answer.json({"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"} | pull)

    @route(f"GET /(?P<repo>[^/]+/[^/]+)/resolve/{REV}/(?P<path>.+)")
    def _resolve(self, call: Handler, repo: Repo, rev: str, path: str) -> Answer:
        """A file of a revision; for one in LFS its metadata and a signed link to the storage host."""
        commit = repo.find(rev)
        file = commit.files.get(path)
        if file is None:
            answer = HubError(404, "Entry not found", "EntryNotFound").answer
        elif file.lfs:
            link = self._signed("localhost", f"/storage/{repo.id}/{file.oid}/{path}")
            linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            answer = Answer(302, headers={"Location": link, **linked})
        else:
            answer = self._content(call, repo, path, file)
        answer.headers["X-Repo-Commit"] = commit.sha
        return answer

    @route(f"GET {STORAGE}/(?P<path>.+)", "signed")
    def _stored(self, call: Handler, repo: Repo, oid: str, path: str) -> Answer:
        return self._content(call, repo, path, File(repo.objects[oid], lfs=True))

    def _content(self, call: Handler, repo: Repo, path: str, file: File) -> Answer:
        data, size = file.data, len(file.data)
        headers = {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if (repo.id, path) in self._corrupted:
            data = data[:-1] + bytes(byte ^ 0xFF for byte in data[-1:])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        if start >= stop:
            return Answer(416, headers={"Content-Range": f"bytes */{size}"})
        return Answer(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that die in the middle of a request are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection, and at the same time the request that is being answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def serve(self) -> None:
        target = urlsplit(self.path)
        self.plain_path, self.query = unquote(target.path), dict(parse_qsl(target.query))
        self.body = self.read_body()  # before any error: what is left of it would be taken for the next request
        if self.server.hub.server is not self.server:
            raise ConnectionError("The hub has been stopped: a connection that was kept alive must not outlive it")
        answer = self.server.hub.answer(self)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.cut])
            self.close_connection |= answer.cut is not None and answer.cut < len(answer.body)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = serve

    def read_body(self) -> bytes:
        """The body, which the client sends in chunks where it does not know the length (the parts of an upload)."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("The client went away in the middle of a request")
        return data

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: `LoopbackHub.requests` is the log."""
