"""A Hub for the tests: what `huggingface_hub` asks of huggingface.co about models, on the loopback device, in memory.

Written after the Hub's API documentation (hf.co/docs/hub/api) and Git LFS's batch API. Regular files are sent within a
commit and have Git's blob hash for an ETag; weights go through LFS and are served, as there, by another host ("CDN"),
to which no token may travel. It takes a bounded number of requests, of a bounded size, for a bounded time.
"""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import uvicorn
import yaml
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from huggingface_hub.repocard import REGEX_YAML_BLOCK


MAX_REQUESTS, MAX_BYTES, MAX_SECONDS, MAX_REPOS = 5000, 64 * 2**20, 3600, 50
PAGE = 20  # entries of a tree a page; the Hub's has 1,000
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl")
TOKENS = {"token-of-me": "me", "token-of-them": "them"}


@dataclass(frozen=True)
class Blob:
    """A file at a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What Git itself keeps: the file, or a few lines that point to an LFS object."""
        if not self.lfs:
            return self.content
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        state = json.dumps([self.branches.get(branch), title, *sorted((path, b.oid) for path, b in files.items())])
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha


class Hub:
    """The state of the server, open to the tests."""

    def __init__(self):
        self.url = ""
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.puts: Counter[str] = Counter()  # finished uploads of each
        self.leaks: list[str] = []  # requests that brought a token where none belongs
        self.hold_after: int | None = None  # this many uploads are let through, further ones wait
        self.held, self.cut = threading.Event(), threading.Event()  # one waits, one that waited is gone
        self.lock = threading.Lock()
        self.app = _routes(self)

    def hold(self, after: int) -> None:
        """Let `after` uploads through, and keep further ones waiting until `hold_after` is None again."""
        self.puts.clear()
        self.held.clear()
        self.cut.clear()
        self.hold_after = after

    def repo(self, repo_id: str, token: str | None, write: bool = False) -> Repository:
        """Raises what the Hub answers to somebody who may not see, or not write, a repository."""
        user, found = TOKENS.get(token or ""), self.repos.get(repo_id)
        if token is not None and user is None:
            raise HTTPException(401, "Invalid credentials in Authorization header")
        if found is None or (found.private and user != repo_id.split("/")[0]):
            raise _error(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user != repo_id.split("/")[0]:
            raise HTTPException(401 if user is None else 403, "You don't have the rights required")
        return found

    def add(self, repo_id: str, folder: Path) -> str:
        """Make a public repository hold a folder's files; returns the commit's hash."""
        repo = self.repos.setdefault(repo_id, Repository(private=False))
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        blobs = {name: Blob(path.read_bytes(), path.suffix in LFS_SUFFIXES) for name, path in files.items()}
        self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        return repo.commit("main", blobs, "initial commit")

    def holds(self, content: bytes) -> bool:
        """Whether any file of any commit contains this."""
        commits = [files for repo in self.repos.values() for files in repo.commits.values()]
        return any(content in blob.content for files in commits for blob in files.values())

    def files(self, repo_id: str, revision: str, token: str | None) -> tuple[str, dict[str, Blob]]:
        repo = self.repo(repo_id, token)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]


def _error(status: int, code: str, message: str, **headers: str) -> HTTPException:
    return HTTPException(status, message, {"X-Error-Code": code, "X-Error-Message": message, **headers})


def _token(request: Request) -> str | None:
    header = request.headers.get("authorization")
    return header.removeprefix("Bearer ") if header else None


def _routes(hub: Hub) -> FastAPI:
    app = FastAPI(openapi_url=None)
    api, repo = "/api/models/{namespace}/{name}", "/{namespace}/{name}"

    @app.exception_handler(HTTPException)
    async def say(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def body(request: Request) -> bytes:
        if int(request.headers.get("content-length") or 0) > MAX_BYTES:
            raise HTTPException(413, f"at most {MAX_BYTES} bytes")
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"at most {MAX_BYTES} bytes")
        return content

    # ------------------------------------------------------------------------------------------------ accounts, repos

    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> dict:
        user = TOKENS.get(_token(request) or "")
        if user is None:
            raise HTTPException(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    @app.post("/api/repos/create")
    async def create(request: Request) -> JSONResponse:
        wish, user = json.loads(await body(request)), TOKENS.get(_token(request) or "")
        if user is None:
            raise HTTPException(401, "Invalid username or password.")
        repo_id = f"{wish.get('organization') or user}/{wish['name']}"
        if repo_id.split("/")[0] != user:
            raise HTTPException(403, f"You don't have the rights to create a model under {repo_id.split('/')[0]}")
        reply = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with hub.lock:
            if repo_id in hub.repos:
                return JSONResponse({"error": "You already created this model repo", **reply}, 409)
            if len(hub.repos) >= MAX_REPOS:
                raise HTTPException(429, f"at most {MAX_REPOS} repositories")
            hub.repos[repo_id] = Repository(private=wish.get("visibility") == "private" or bool(wish.get("private")))
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            hub.repos[repo_id].commit("main", {".gitattributes": Blob(attributes.encode(), False)}, "initial commit")
        return JSONResponse(reply)

    @app.delete("/api/repos/delete")
    async def delete(request: Request) -> dict:
        wish = json.loads(await body(request))
        repo_id = f"{wish.get('organization') or TOKENS.get(_token(request) or '')}/{wish['name']}"
        hub.repo(repo_id, _token(request), write=True)
        del hub.repos[repo_id]
        return {}

    @app.get(api)
    @app.get(api + "/revision/{revision}")
    async def info(namespace: str, name: str, request: Request, revision: str = "main") -> dict:
        repo_id = f"{namespace}/{name}"
        sha, files = hub.files(repo_id, revision, _token(request))
        match = REGEX_YAML_BLOCK.search(files["README.md"].content.decode()) if "README.md" in files else None
        card = yaml.safe_load(match.group(2)) if match else None
        return {
            "_id": sha[:24], "id": repo_id, "modelId": repo_id, "author": namespace, "sha": sha, "cardData": card,
            "private": hub.repos[repo_id].private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "tags": [], "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }  # fmt: skip

    @app.post(api + "/branch/{branch}")
    async def create_branch(namespace: str, name: str, branch: str, request: Request) -> JSONResponse:
        repo, wish = (
            hub.repo(f"{namespace}/{name}", _token(request), write=True),
            json.loads(await body(request) or "{}"),
        )
        if branch in repo.branches:
            return JSONResponse({"error": f"Reference already exists: {branch}"}, 409)
        repo.branches[branch] = repo.branches[wish.get("startingPoint", "main")]
        return JSONResponse({})

    # ------------------------------------------------------------------------------------------------ reading

    def entry(path: str, blob: Blob) -> dict[str, Any]:
        reply = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            reply["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
        return reply

    @app.get(api + "/tree/{revision}")
    @app.get(api + "/tree/{revision}/{folder:path}")
    async def tree(namespace: str, name: str, revision: str, request: Request, folder: str = "") -> JSONResponse:
        _, files = hub.files(f"{namespace}/{name}", revision, _token(request))
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(f"{folder}/".lstrip("/"))}
        if folder and not inside:
            raise _error(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        depth, entries = len(folder.split("/")) if folder else 0, {}
        for path, blob in inside.items():
            parts = path.split("/")
            for end in range(depth + 1, len(parts)):
                parent = "/".join(parts[:end])
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
            entries[path] = entry(path, blob)
        if request.query_params.get("recursive", "false").lower() != "true":
            entries = {path: reply for path, reply in entries.items() if path.count("/") == depth}
        start, listed = int(request.query_params.get("cursor", 0)), list(entries.values())
        headers = {}
        if start + PAGE < len(listed):
            headers["Link"] = f'<{request.url.include_query_params(cursor=start + PAGE)}>; rel="next"'
        return JSONResponse(listed[start : start + PAGE], headers=headers)

    @app.post(api + "/paths-info/{revision}")
    async def paths_info(namespace: str, name: str, revision: str, request: Request) -> list:
        _, files = hub.files(f"{namespace}/{name}", revision, _token(request))
        form = json.loads(await body(request))
        return [entry(path, files[path]) for path in form["paths"] if path in files]

    @app.api_route(repo + "/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(namespace: str, name: str, revision: str, path: str, request: Request) -> Response:
        sha, files = hub.files(f"{namespace}/{name}", revision, _token(request))
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            raise _error(404, "EntryNotFound", "Entry not found", **headers)
        blob = files[path]
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            return RedirectResponse(f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{blob.sha256}", 302, headers)
        headers["ETag"] = f'"{blob.oid}"'
        return Response(blob.content, headers=headers, media_type="application/octet-stream")

    @app.get("/cdn/{oid}")
    async def cdn(oid: str, request: Request) -> Response:
        if "authorization" in request.headers:
            hub.leaks.append(str(request.url))
        return Response(hub.objects[oid], headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream")

    # ------------------------------------------------------------------------------------------------ writing

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> JSONResponse:
        match = REGEX_YAML_BLOCK.search(json.loads(await body(request))["content"])
        try:
            metadata = yaml.safe_load(match.group(2)) if match else {}
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, 400)
        wrong = [f'"{name}" must be a {kind.__name__}' for name, kind in _METADATA.items()
                 if name in metadata and not isinstance(metadata[name], kind)]  # fmt: skip
        return JSONResponse({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)

    @app.post(api + "/preupload/{revision}")
    async def preupload(namespace: str, name: str, revision: str, request: Request) -> dict:
        hub.repo(f"{namespace}/{name}", _token(request), write=True)
        _, files = hub.files(f"{namespace}/{name}", revision, _token(request))
        wish, answers = json.loads(await body(request)), []
        ignored = [line for line in wish.get("gitIgnore", "").splitlines() if line]
        for file in wish["files"]:
            present = files.get(file["path"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20
            oid = None if present is None else present.sha256 if present.lfs else present.oid
            mode = "lfs" if lfs else "regular"
            ignore = any(_is_named(line, file["path"]) for line in ignored)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return {"files": answers}

    @app.post(repo + ".git/info/lfs/objects/batch")
    async def batch(namespace: str, name: str, request: Request) -> dict:
        hub.repo(f"{namespace}/{name}", _token(request), write=True)
        reply = []
        for wanted in json.loads(await body(request))["objects"]:
            oid = wanted["oid"]
            reply.append({"oid": oid, "size": wanted["size"], "authenticated": True})
            if oid not in hub.objects:
                actions = {"upload": {"href": f"{hub.url}/lfs/{oid}"}}
                actions["verify"] = {"href": f"{hub.url}/{namespace}/{name}.git/info/lfs/verify"}
                reply[-1]["actions"] = actions
        return {"transfer": "basic", "objects": reply}

    @app.put("/lfs/{oid}")
    async def put(oid: str, request: Request) -> dict:
        if "authorization" in request.headers:
            hub.leaks.append(str(request.url))
        content = await body(request)
        if hub.hold_after is not None and len(hub.puts) >= hub.hold_after:
            hub.held.set()
            while hub.hold_after is not None:
                if await request.is_disconnected():
                    hub.cut.set()
                    raise HTTPException(400, "The upload was cut off")
                await anyio.sleep(0.02)
        if hashlib.sha256(content).hexdigest() != oid:
            raise HTTPException(400, "The content has another hash")
        hub.objects[oid] = content
        hub.puts[oid] += 1
        return {}

    @app.post(repo + ".git/info/lfs/verify")
    async def verify(namespace: str, name: str, request: Request) -> dict:
        hub.repo(f"{namespace}/{name}", _token(request), write=True)
        reply = json.loads(await body(request))
        if len(hub.objects.get(reply["oid"], b"")) != reply["size"]:
            raise HTTPException(404, "There is no such object")
        return {}

    @app.post(api + "/commit/{revision}")
    async def commit(namespace: str, name: str, revision: str, request: Request) -> dict:
        repo = hub.repo(f"{namespace}/{name}", _token(request), write=True)
        lines = [json.loads(line) for line in (await body(request)).splitlines()]
        with hub.lock:
            if revision not in repo.branches:
                raise _error(404, "RevisionNotFound", f"There is no branch {revision}")
            head = repo.branches[revision]
            files, header = dict(repo.commits[head]), lines[0]["value"]
            if not head.startswith(header.get("parentCommit", "")):
                raise HTTPException(412, "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                kind, value = line["key"], line["value"]
                if kind == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                elif kind == "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise HTTPException(400, f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = Blob(hub.objects[value["oid"]], True)
                elif kind == "deletedFile":
                    del files[value["path"]]
                else:
                    raise HTTPException(400, f"{kind} is not known here")
            sha = repo.commit(revision, files, header["summary"])
        return {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{namespace}/{name}/commit/{quote(sha)}"}

    return app


def _is_named(line: str, path: str) -> bool:
    """Whether a line of a `.gitignore` that begins with `/`, a file's or a folder's, names a path."""
    return f"/{path}" == line or (line.endswith("/") and f"/{path}".startswith(line))


# the types that the Hub's metadata check insists on, of the fields that the cards here have
_METADATA = {"license": str, "tags": list, "pipeline_tag": str, "library_name": str, "base_model_relation": str,
             "datasets": list, "model-index": list}  # fmt: skip


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub on a free port of the loopback device, in a thread that ends with the block or after `MAX_SECONDS`."""
    hub = Hub()
    config = uvicorn.Config(hub.app, host="127.0.0.1", port=0, log_level="warning", limit_max_requests=MAX_REQUESTS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    end = threading.Timer(MAX_SECONDS, setattr, (server, "should_exit", True))
    end.daemon = True
    thread.start()
    end.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the test Hub did not start")
            time.sleep(0.01)
        hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield hub
    finally:
        end.cancel()
        server.should_exit = True
        thread.join(timeout=10)


def start_client(hub: Hub, home: Path, *command: object, token: str | None = "token-of-me") -> subprocess.Popen:
    """A Python process of somebody whose Hub this is; `home` is their cache, `token` their login."""
    dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    if token is not None:  # as `hf auth login` leaves it
        home.mkdir(parents=True, exist_ok=True)
        (home / "token").write_text(token)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(
    hub: Hub, home: Path, *command: object, token: str | None = "token-of-me", timeout: float = 900
) -> subprocess.CompletedProcess:
    """As [`start_client`], to its end; one that hangs is killed, and an error."""
    with start_client(hub, home, *command, token=token) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
