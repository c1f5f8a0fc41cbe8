"""A small stand-in of the Hugging Face Hub on this machine: the requests that a push and a download really make.

It speaks the routes of `huggingface_hub` for whoami, creating a repository or branch, preupload, LFS in one part or
several with its verification, commit, tree, info and resolve, and keeps everything in memory. As on the Hub, a file
of LFS can only be committed after its bytes were received, hashed and verified, it is served by a redirect to another
address, and what may be written or read depends on the token. A request it does not know is answered 404 and kept in
`unknown`. Xet, the Hub's newer storage, is not spoken: clients must run with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

from hub.card_rules import card_problems

OWNER, TOKEN, READ_TOKEN = "me", "hf_right", "hf_read"
ROLES = {TOKEN: "write", READ_TOKEN: "read"}
LFS_ENDINGS = (".safetensors", ".png", ".bin")
PART_SIZE = 100_000  # of an upload in several parts, which objects above this size need
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class StandIn(ThreadingHTTPServer):
    """Repositories: id -> branch -> path -> bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        # Another host to the client, which keeps to itself what the redirect to one says and sends no token there.
        self.storage = f"http://localhost:{self.server_address[1]}"
        self.repos, self.private, self.commits = {}, {}, []
        self.objects, self.parts, self.verified = {}, {}, set()  # of LFS: oid -> bytes, (oid, part) -> bytes, oids
        self.requests, self.unknown, self.downloads, self.cards = [], [], [], []
        self.broken = {}  # route -> status that it answers instead of doing anything

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


@contextmanager
def stand_in_of_the_hub(monkeypatch):
    """The stand-in, with `huggingface_hub` in this process logged in there; nothing reaches another machine."""
    with StandIn() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()  # a new one reads the variables again
        yield hub
        huggingface_hub.close_session()


def sha(files):
    """A commit id made of the content."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + content)
    return digest.hexdigest()


def is_lfs(path):
    return path.endswith(LFS_ENDINGS)


def object_id(path, content):
    """SHA-256 of an LFS file, of another one git's id of a blob."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<branch>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_part"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<branch>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<branch>[^/]+))?", "info"),
        ("HEAD", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "storage"),
    )

    def log_message(self, *words):
        pass

    def handle_any(self):
        self.body = self.read_body()
        path = urlsplit(self.path).path
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path) if method == self.command else None
            if match:
                self.server.requests.append(name)
                if name in self.server.broken:
                    return self.answer(self.server.broken[name], {"error": f"{name} is broken"})
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

    # --- who is asking -----------------------------------------------------------------------------------------------

    def role(self):
        return ROLES.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def may_write(self, owner):
        """Whether the token may; False after 401 or 403 was sent."""
        if self.role() is None:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif owner != OWNER or self.role() != "write":
            self.answer(403, {"error": "You have no right to write under this namespace with this token"})
        else:
            return True
        return False

    def whoami(self):
        if self.role() is None:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        token = {"role": self.role(), "displayName": "test"}
        user = {"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
        return self.answer(200, user)

    def files(self, repo, branch="main"):
        """The files of a branch or commit; None after a 404 was sent."""
        branches = self.server.repos.get(repo)
        if branches is None or (self.server.private.get(repo) and self.role() is None):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if branch in branches:
            return branches[branch]
        found = next((files for files in branches.values() if sha(files) == branch), None)
        if found is None:
            self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return found

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or OWNER
        if self.may_write(owner):
            repo = f"{owner}/{wanted['name']}"
            url = {"url": f"{self.server.endpoint}/{repo}"}
            if repo in self.server.repos:
                return self.answer(409, {"error": "You already created this model repo", **url})
            self.server.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
            self.server.private[repo] = wanted.get("visibility") == "private"
            self.answer(200, url)
        return None

    def validate(self):
        card = json.loads(self.body)["content"]
        self.server.cards.append(card)
        errors = [{"message": problem} for problem in card_problems(card)]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, repo, branch):
        if self.may_write(repo.split("/")[0]):
            branches = self.server.repos[repo]
            status = 409 if branch in branches else 200
            branches.setdefault(branch, dict(branches["main"]))
            self.answer(status, {})

    def preupload(self, repo, branch):
        files = self.files(repo, branch) if self.may_write(repo.split("/")[0]) else None
        if files is None:
            return
        answers = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            there = {"oid": object_id(path, files[path])} if path in files else {}
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        self.answer(200, {"files": answers})

    def lfs_batch(self, repo):
        if self.may_write(repo.split("/")[0]):
            objects = json.loads(self.body)["objects"]
            for entry in objects:
                address = f"{self.server.endpoint}/lfs/{entry['oid']}"
                upload = {"href": address}
                if entry["size"] > PART_SIZE:
                    numbers = range(1, ceil(entry["size"] / PART_SIZE) + 1)
                    parts = {f"{number:05d}": f"{address}/{number}" for number in numbers}
                    upload = {"href": f"{address}/complete", "header": {"chunk_size": str(PART_SIZE), **parts}}
                if entry["oid"] not in self.server.verified:
                    entry["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        return self.store(oid, self.body)

    def lfs_part(self, oid, part):
        self.server.parts[oid, int(part)] = self.body
        return self.answer(200, ETag=hashlib.md5(self.body).hexdigest())

    def lfs_complete(self, oid):
        listed = json.loads(self.body)["parts"]
        contents = [self.server.parts[oid, entry["partNumber"]] for entry in listed]
        if [entry["etag"] for entry in listed] != [hashlib.md5(content).hexdigest() for content in contents]:
            return self.answer(400, {"error": "a part has another etag"})
        return self.store(oid, b"".join(contents))

    def store(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another sha256"})
        self.server.objects[oid] = content
        return self.answer(200)

    def lfs_verify(self, oid):
        wanted = json.loads(self.body)
        content = self.server.objects.get(oid)
        if content is None or (wanted["oid"], wanted["size"]) != (oid, len(content)):
            return self.answer(400, {"error": "the object was not received whole"})
        self.server.verified.add(oid)
        return self.answer(200, {})

    def commit(self, repo, branch):
        there = self.files(repo, branch) if self.may_write(repo.split("/")[0]) else None
        if there is None:
            return None
        files, kinds = dict(there), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            path = value.get("path", "header")
            kinds[path] = entry["key"]
            if entry["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile" and path in files:
                del files[path]
            elif entry["key"] == "lfsFile" and value["oid"] in self.server.verified:
                files[path] = self.server.objects[value["oid"]]
            elif entry["key"] != "header":
                return self.answer(400, {"error": f"{path} cannot be committed"})
        self.server.repos[repo][branch] = files
        self.server.commits.append((repo, branch, kinds))
        oid = sha(files)
        return self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    # --- reading -----------------------------------------------------------------------------------------------------

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
        oid = object_id(path, files[path])
        if is_lfs(path):
            linked = {"X_Linked_Size": str(len(files[path])), "X_Linked_ETag": f'"{oid}"'}
            return self.answer(302, Location=f"{self.server.storage}/storage/{oid}", **linked, **commit)
        if self.command == "GET":
            self.server.downloads.append(path)
        return self.answer(200, files[path], ETag=f'"{oid}"', **commit)

    def storage(self, oid):
        content = self.server.objects.get(oid)
        if content is None or "Authorization" in self.headers:
            return self.answer(404, {"error": "no such object, or a token where none belongs"})
        self.server.downloads.append(oid)
        return self.answer(200, content)
