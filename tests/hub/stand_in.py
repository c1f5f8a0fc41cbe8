"""A small stand-in of the Hugging Face Hub on this machine: the requests that a push and a download really make.

It knows the routes of `huggingface_hub` for creating a repository or branch, preupload, LFS and regular upload,
commit, resolve, tree and info, and keeps everything in memory. A request it does not know is answered 404 and kept in
`unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, OWNER = "hf_right", "me"
LFS_ENDINGS = (".safetensors", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class StandIn(ThreadingHTTPServer):
    """Repositories: id -> branch -> path -> bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.private, self.objects, self.commits = {}, {}, {}, []
        self.unknown, self.downloads, self.cards = [], [], []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


def sha(files):
    """A commit id made of the content."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + content)
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<branch>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<branch>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<branch>[^/]+))?", "info"),
        ("HEAD", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *words):
        pass

    def handle_any(self):
        self.body = self.read_body()
        path = urlsplit(self.path).path
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path) if method == self.command else None
            if match:
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**parts)
        self.server.unknown.append(f"{self.command} {path}")
        return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def may_write(self, owner):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif owner != OWNER:
            self.answer(403, {"error": "You have no right to create a model under this namespace"})
        else:
            return True
        return False

    def files(self, repo, branch="main"):
        """The files of a branch or commit; None after a 404 was sent."""
        branches = self.server.repos.get(repo)
        if branches is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        found = branches.get(branch) or next((f for f in branches.values() if sha(f) == branch), None)
        if found is None and branch not in branches:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return found if found is not None else branches[branch]

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or OWNER
        if self.may_write(owner):
            repo = f"{owner}/{wanted['name']}"
            url = {"url": f"{self.server.endpoint}/{repo}"}
            if repo in self.server.repos:
                return self.answer(409, {"error": "You already created this model repo", **url})
            self.server.repos[repo] = {"main": {}}
            self.server.private[repo] = wanted.get("visibility") == "private"
            self.answer(200, url)
        return None

    def validate(self):
        card = json.loads(self.body)["content"]
        self.server.cards.append(card)
        metadata = yaml.safe_load(card.split("---\n")[1])
        errors = [] if isinstance(metadata, dict) else [{"message": "no mapping at the head"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, repo, branch):
        if self.may_write(repo.split("/")[0]):
            branches = self.server.repos[repo]
            status = 409 if branch in branches else 200
            branches.setdefault(branch, dict(branches["main"]))
            self.answer(status, {})

    def preupload(self, repo, branch):
        if self.may_write(repo.split("/")[0]) and self.files(repo, branch) is not None:
            paths = [entry["path"] for entry in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_ENDINGS) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.answer(200, {"files": files})

    def lfs_batch(self, repo):
        if self.may_write(repo.split("/")[0]):
            objects = json.loads(self.body)["objects"]
            for entry in objects:
                if entry["oid"] not in self.server.objects:
                    entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another sha256"})
        self.server.objects[oid] = self.body
        return self.answer(200)

    def commit(self, repo, branch):
        files = self.files(repo, branch) if self.may_write(repo.split("/")[0]) else None
        if files is None:
            return
        kinds = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            kinds[value.get("path", "header")] = entry["key"]
        self.server.commits.append((repo, branch, kinds))
        oid = sha(files)
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, repo, branch="main"):
        files = self.files(repo, branch)
        if files is not None:
            siblings = [{"rfilename": path} for path in sorted(files)]
            private = self.server.private[repo]
            self.answer(200, {"id": repo, "sha": sha(files), "siblings": siblings, "private": private, "tags": []})

    def tree(self, repo, branch, folder=""):
        files = self.files(repo, branch)
        if files is not None:
            inside = {path: content for path, content in files.items() if path.startswith(folder and folder + "/")}
            if folder and not inside:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(inside.items())
            ]
            return self.answer(200, entries)
        return None

    def resolve(self, repo, branch, path):
        files = self.files(repo, branch)
        if files is None:
            return None
        commit = {"X_Repo_Commit": sha(files)}
        if path not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)
        if self.command == "GET":
            self.server.downloads.append(path)
        return self.answer(200, files[path], ETag=f'"{hashlib.sha256(files[path]).hexdigest()}"', **commit)
