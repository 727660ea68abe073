"""A small Hub on loopback for tests: models only, commits in memory, files on disk, as huggingface_hub's client asks.

`Hub(root)` is a server that runs; point the client at its `url`. With `xet`, large files go through the Xet client, to
the storage of `minicas.py` on the same server. `drop` breaks so many requests off in their middle, of those that
`drop_at` matches: uploads of large files, unless a test says otherwise.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = ("apache-2.0", "mit", "other")
TOKENS = {"hf_test": "tester", "hf_other": "other"}
LARGE = (".safetensors", ".png")
UPLOADS = r"PUT /lfs/.*|POST /cas/.*/(xorbs|shards).*"
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


def route(methods: str, pattern: str) -> Callable:
    def register(function: Callable) -> Callable:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.lock = threading.RLock()
        self.forget()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """Be empty again, and whole."""
        self.repos: dict[str, dict[str, Any]] = {}
        self.xet, self.xet_files = False, {}  # SHA-256 -> what minicas.py knows of the file
        self.drop, self.drop_at = 0, UPLOADS
        for path in self.root.iterdir():
            path.unlink()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, dict]:
        repo = self.repos[repo_id]
        return repo["commits"][repo["branches"][revision]]["tree"]

    def commit(self, repo: dict, branch: str, tree: dict, title: str) -> str:
        parent = repo["branches"].get(branch)
        oid = hashlib.sha1(json.dumps([repo["id"], tree, title, parent, time.time_ns()]).encode()).hexdigest()
        repo["commits"][oid] = {"tree": tree, "title": title, "parent": parent}
        repo["branches"][branch] = oid
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        url = urlsplit(self.path)
        if self.server.drop and re.fullmatch(self.server.drop_at, f"{self.command} {url.path}"):
            self.server.drop -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.raw = (
            self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        self.query = parse_qs(url.query)
        try:
            with self.server.lock:
                for methods, pattern, function in ROUTES:
                    if self.command in methods.split() and (match := pattern.fullmatch(url.path)):
                        function(self, *map(unquote, match.groups("")))
                        return
            raise Refusal(404, "", f"no route {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.reply({"error": refusal.message}, refusal.status, {k: v for k, v in headers.items() if v})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = "application/octet-stream" if isinstance(data, bytes) else "application/json"
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in TOKENS:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repo(self, repo_id: str, write: bool = False) -> dict[str, Any]:
        user, repo = self.user(), self.server.repos.get(repo_id)
        owner = user == repo_id.split("/")[0]
        if repo is None or (repo["private"] and not owner):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise Refusal(403, "", "You don't have the rights to write here")
        return repo

    def tree(self, repo: dict, revision: str) -> tuple[str, dict]:
        commit = repo["branches"].get(revision or "main", revision)
        if commit not in repo["commits"]:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo["commits"][commit]["tree"]


MODEL = r"/api/models/([^/]+/[^/]+)"


@route("GET", r"/api/whoami-v2")
def whoami(h: Handler) -> None:
    if (user := h.user()) is None:
        raise Refusal(401, "", "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    h.reply({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})


@route("POST", r"/api/validate-yaml")
def validate_yaml(h: Handler) -> None:
    """The Hub's rules for the fields that cards here have."""
    text = json.loads(h.raw)["content"]
    data = (yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None) or {}
    ids = lambda value: [value] if isinstance(value, str) else value  # noqa: E731
    rules = {
        "base_model": lambda value: all(re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", name) for name in ids(value)),
        "library_name": lambda value: isinstance(value, str),
        "license": lambda value: value in LICENSES,
        "pipeline_tag": lambda value: value in ("text-generation", "text-classification"),
        "tags": lambda value: all(isinstance(tag, str) and 0 < len(tag) < 101 for tag in value),
        "model-index": lambda value: all(entry["name"] and "results" in entry for entry in value),
    }
    wrong = [name for name, rule in rules.items() if name in data and not rule(data[name])]
    errors = [{"message": f'"{name}" must be valid, not {data[name]!r}'} for name in wrong]
    h.reply({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("POST", r"/api/repos/create")
def create(h: Handler) -> None:
    user, wanted = h.user(), json.loads(h.raw)
    repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
    if user is None or repo_id.split("/")[0] != user:
        raise Refusal(401 if user is None else 403, "", "You don't have the rights to create this repository")
    if repo_id in h.server.repos:
        h.reply({"error": "You already created this model repo", "url": f"{h.server.url}/{repo_id}"}, 409)
        return
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    repo = h.server.repos[repo_id] = {"id": repo_id, "private": private, "commits": {}, "branches": {}}
    h.server.commit(repo, "main", {}, "initial commit")
    h.reply({"url": f"{h.server.url}/{repo_id}", "name": repo_id, "id": repo_id})


@route("GET", MODEL + r"(?:/revision/(.+))?")
def info(h: Handler, repo_id: str, revision: str) -> None:
    repo = h.repo(repo_id)
    commit, tree = h.tree(repo, revision)
    files = [{"rfilename": path} for path in sorted(tree)]
    if "blobs" in h.query:
        for file in files:
            entry = _entry(file["rfilename"], tree[file["rfilename"]])
            file |= {"blobId": entry["oid"], "size": entry["size"]}
            if "lfs" in entry:
                file["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 130}
    h.reply({"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "private": repo["private"]} | {
        "siblings": files, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False
    })  # fmt: skip


@route("GET", MODEL + r"/tree/([^/]+)(?:/.*)?")
def listing(h: Handler, repo_id: str, revision: str) -> None:
    h.reply([_entry(path, file) for path, file in sorted(h.tree(h.repo(repo_id), revision)[1].items())])


@route("POST", MODEL + r"/paths-info/([^/]+)")
def paths_info(h: Handler, repo_id: str, revision: str) -> None:
    is_json = "json" in h.headers.get("Content-Type", "")
    paths = (json.loads(h.raw) if is_json else parse_qs(h.raw.decode())).get("paths", [])
    tree = h.tree(h.repo(repo_id), revision)[1]
    h.reply([_entry(path, tree[path]) for path in paths if path in tree])


def _entry(path: str, file: dict) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
    if "sha256" in file:
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
    return entry | ({"xetHash": file["xet"]} if file.get("xet") else {})


@route("POST", MODEL + r"/branch/(.+)")
def branch(h: Handler, repo_id: str, name: str) -> None:
    repo = h.repo(repo_id, write=True)
    if name in repo["branches"]:
        raise Refusal(409, "", "Reference already exists")
    repo["branches"][name] = h.tree(repo, json.loads(h.raw or b"{}").get("startingPoint") or "main")[0]
    h.reply({})


@route("POST", MODEL + r"/preupload/(.+)")
def preupload(h: Handler, repo_id: str, revision: str) -> None:
    tree = h.tree(h.repo(repo_id, write=True), revision)[1]
    files = []
    for file in json.loads(h.raw)["files"]:
        known = tree.get(file["path"], {})
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        oid = known.get("sha256") or known.get("oid")
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    h.reply({"files": files})


@route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(h: Handler, repo_id: str) -> None:
    h.repo(repo_id, write=True)
    objects = []
    for wanted in json.loads(h.raw)["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if not (h.server.root / wanted["oid"]).exists():
            answer["actions"] = {"upload": {"href": f"{h.server.url}/lfs/{wanted['oid']}"}}
        objects.append(answer)
    h.reply({"transfer": "basic", "objects": objects})


@route("PUT", r"/lfs/([0-9a-f]{64})")
def lfs_put(h: Handler, oid: str) -> None:
    if hashlib.sha256(h.raw).hexdigest() != oid:
        raise Refusal(400, "", "the file does not have the announced hash")
    (h.server.root / oid).write_bytes(h.raw)
    h.reply(b"", headers={"ETag": f'"{oid}"'})


@route("GET", MODEL + r"/xet-(?:write|read)-token/(.+)")
def xet_token(h: Handler, repo_id: str, revision: str) -> None:
    if not h.server.xet:
        raise Refusal(404, "", "this server has no Xet")
    h.repo(repo_id, write="/xet-write-token/" in h.path)
    url, expires = f"{h.server.url}/cas", str(int(time.time()) + 3600)
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": expires}
    h.reply({"accessToken": "t", "exp": int(expires), "casUrl": url}, headers=headers)


@route("POST", MODEL + r"/commit/(.+)")
def commit(h: Handler, repo_id: str, revision: str) -> None:
    repo = h.repo(repo_id, write=True)
    if revision not in repo["branches"]:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    tree, title = dict(h.tree(repo, revision)[1]), ""
    for line in h.raw.splitlines():
        key, value = (json.loads(line)[name] for name in ("key", "value"))
        if key == "header":
            title = value["summary"]
        elif key == "file":
            data = base64.b64decode(value["content"])
            (h.server.root / git_oid(data)).write_bytes(data)
            tree[value["path"]] = {"oid": git_oid(data), "size": len(data)}
        elif key == "lfsFile":
            oid = value["oid"]
            xet, stored = h.server.xet_files.get(oid), h.server.root / oid
            if xet is None and not stored.exists():
                raise Refusal(400, "", f"{value['path']} was not uploaded")
            size = xet["size"] if xet else stored.stat().st_size
            tree[value["path"]] = {"oid": git_oid(oid.encode()), "size": size, "sha256": oid}
            if xet:
                tree[value["path"]]["xet"] = xet["name"]
        elif key == "deletedFile":
            tree.pop(value["path"])
    oid = h.server.commit(repo, revision, tree, title)
    url = f"{h.server.url}/{repo_id}/commit/{oid}"
    h.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


@route("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(h: Handler, repo_id: str, revision: str, path: str) -> None:
    commit, tree = h.tree(h.repo(repo_id), revision)
    if path not in tree:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    file = tree[path]
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.get("sha256") or file["oid"]}"', "Accept-Ranges": "bytes"}
    if "sha256" in file:
        headers |= {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": str(file["size"])}
    if file.get("xet"):
        refresh = f"{h.server.url}/api/models/{repo_id}/xet-read-token/{commit}"
        h.reply(b"", headers=headers | {"X-Xet-Hash": file["xet"], "X-Xet-Refresh-Route": refresh})
        return
    h.reply((h.server.root / (file.get("sha256") or file["oid"])).read_bytes(), headers=headers)
