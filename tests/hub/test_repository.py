"""Opening and writing a repository with huggingface_hub's real client, and what is said where the Hub refuses."""

import hashlib

import pytest
from huggingface_hub import constants

from hf_maskformer.hub.repository import open_repository, upload
from hub.stand_in import PART_SIZE, READ_TOKEN

CARD = "---\nlibrary_name: transformers\n---\n\n# Title\n"


@pytest.fixture
def folder(tmp_path):
    """A card, a weight file that needs three parts, a picture, an empty file."""
    root = tmp_path / "folder"
    (root / "samples").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "model.safetensors").write_bytes(bytes(range(250)) * (2 * PART_SIZE // 250) + b"end of the weights")
    (root / "samples" / "step-00000004.png").write_bytes(b"picture")
    (root / "matcher.py").write_text("")
    return root


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hashes(files):
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items() if path != ".gitattributes"}


def test_a_repository_is_opened_and_nothing_is_written(hub):
    assert open_repository("fields", private=True) == "me/fields"
    assert open_repository("me/fields") == "me/fields"
    assert open_repository("me/fields", revision="trial") == "me/fields"
    assert hub.private == {"me/fields": True}
    assert set(hub.repos["me/fields"]) == {"main", "trial"}
    assert all(list(files) == [".gitattributes"] for files in hub.repos["me/fields"].values())
    assert (hub.commits, hub.objects, hub.unknown) == ([], {}, [])


@pytest.mark.parametrize("bad", ["a/b/c", "me/has space", "-x", "", "me/x--y"])
def test_a_bad_id_is_refused_before_the_hub_is_asked(hub, bad):
    with pytest.raises(ValueError, match=f"repository id '{bad}' cannot be used: it must be owner/name"):
        open_repository(bad)
    assert hub.requests == []


def test_no_login(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"publish me/new, not logged in .*: run `hf auth login` or set HF_TOKEN"):
        open_repository("me/new")
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="does not accept the token, me/new was not published: run `hf auth login`"):
        open_repository("me/new")
    assert hub.requests == ["whoami"]


def test_no_right_to_create(hub):
    with pytest.raises(ValueError, match="the token has no right to write other/new"):
        open_repository("other/new")
    assert hub.repos == {}


@pytest.mark.parametrize("token", [None, READ_TOKEN])
def test_no_right_to_write_what_exists(hub, monkeypatch, token):
    """The client's create_repo(exist_ok=True) succeeds here, so that it alone would let a run train for nothing."""
    repo = "other/public" if token is None else "me/fields"
    hub.repos[repo], hub.private[repo] = {"main": {}}, False
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=f"the token has no right to write {repo}"):
        open_repository(repo)
    assert hub.requests[-3:] == ["create", "info", "preupload"]


def test_a_hub_that_cannot_be_used(hub, monkeypatch):
    hub.broken["create"] = 418
    with pytest.raises(ValueError, match="refused me/new: "):
        open_repository("me/new")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9 could not be used .*: check the network, or HF_ENDPOINT"):
        open_repository("me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot publish me/new while HF_HUB_OFFLINE is set"):
        open_repository("me/new")


def test_the_files_arrive_unchanged_in_one_commit(hub, folder):
    repo = open_repository("me/fields")
    address = upload(folder, repo, message="All of it")
    assert address.startswith(f"{hub.endpoint}/me/fields/commit/")
    assert hashes(hub.repos["me/fields"]["main"]) == contents(folder)
    kinds = {"header": "header", "README.md": "file", "matcher.py": "file"}
    kinds |= {"model.safetensors": "lfsFile", "samples/step-00000004.png": "lfsFile"}
    assert hub.commits == [("me/fields", "main", kinds)]
    assert hub.requests.count("lfs_part") == 3
    assert hub.requests.count("lfs_upload") == 1
    assert hub.requests.count("lfs_verify") == 2
    assert hub.unknown == []


def test_unchanged_files_are_not_sent_again(hub, folder):
    repo = open_repository("me/fields")
    upload(folder, repo, message="first")
    hub.requests.clear()
    (folder / "matcher.py").write_text("changed = True\n")
    upload(folder, repo, message="second")
    assert not {"lfs_upload", "lfs_part"} & set(hub.requests)
    assert hub.commits[1][2] == {"header": "header", "matcher.py": "file"}


def test_what_a_push_replaces_is_deleted_and_the_rest_stays(hub, folder):
    """Old weights would be loaded instead of the new ones, and old pictures may be those that must not be shown."""
    repo = open_repository("me/fields")
    (folder / "notes.txt").write_text("mine")
    (folder / "samples" / "mine.png").write_bytes(b"mine")
    upload(folder, repo, message="first")
    for name in ("model.safetensors", "samples/step-00000004.png", "notes.txt", "samples/mine.png"):
        (folder / name).unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        (folder / name).write_bytes(name.encode())
    upload(folder, repo, message="second")
    left = {"README.md", "matcher.py", "notes.txt", "samples/mine.png", *shards}
    assert set(hashes(hub.repos["me/fields"]["main"])) == left
    assert [kind for kind in hub.commits[1][2].values() if kind == "deletedFile"] == ["deletedFile"] * 2


@pytest.mark.parametrize(("route", "status"), [("lfs_part", 403), ("lfs_verify", 400), ("commit", 412)])
def test_an_upload_that_breaks_off_changes_nothing(hub, folder, route, status):
    repo = open_repository("me/fields")
    before = dict(hub.repos["me/fields"]["main"])
    hub.broken[route] = status
    with pytest.raises(ValueError, match="me/fields"):
        upload(folder, repo, message="broken")
    assert hub.repos["me/fields"]["main"] == before
    del hub.broken[route]
    upload(folder, repo, message="again")
    assert hashes(hub.repos["me/fields"]["main"]) == contents(folder)


def test_a_card_that_the_hub_refuses_is_not_sent(hub, folder):
    (folder / "README.md").write_text("---\nlicense: my own\n---\n")
    repo = open_repository("me/fields")
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md.\n- "license" must be one of'):
        upload(folder, repo, message="refused")
    assert hub.commits == []
