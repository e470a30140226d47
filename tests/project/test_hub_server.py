"""The tests' own Hub, asked by the `huggingface_hub` that is installed: what the upload's tests rest on."""

import json
import socket

import pytest
from hub_server import run_client, start_client


def ask(hub, home, code: str, token: str | None = "token-of-me"):
    """What `code` leaves in `told`, run by a client of the Hub; `told` may be an exception's name."""
    program = f"""
import json
from huggingface_hub import HfApi, CommitOperationAdd, CommitOperationDelete, hf_hub_download, snapshot_download
api, told = HfApi(), None
{code}
print(json.dumps(told))
"""
    finished = run_client(hub, home, "-c", program, token=token)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


FAILS = """
def fails(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
"""


def test_a_repository_from_its_beginning_to_its_end(hub, tmp_path):
    told = ask(hub, tmp_path, FAILS + """
folder = __import__("pathlib").Path(__import__("tempfile").mkdtemp())
(folder / "sub").mkdir()
for n in range(30):
    (folder / "sub" / f"{n}.txt").write_text(f"text {n}")
(folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\nHello.")
(folder / "empty.txt").write_text("")
repo = api.create_repo("whole")
again = api.create_repo("me/whole", exist_ok=True)
first = api.upload_folder(repo_id=repo.repo_id, folder_path=folder)
info = api.model_info("me/whole")
tree = {file.path: file for file in api.list_repo_tree("me/whole", recursive=True)}
verified = api.verify_repo_checksums("me/whole", local_dir=folder)
operations = [CommitOperationDelete("empty.txt"), CommitOperationAdd("model.safetensors", b"new")]
second = api.create_commit("me/whole", operations, commit_message="second", parent_commit=first.oid)
old = hf_hub_download("me/whole", "model.safetensors", revision=first.oid)
new = hf_hub_download("me/whole", "model.safetensors")
snapshot = __import__("pathlib").Path(snapshot_download("me/whole"))
more, wrong = CommitOperationAdd("a", b"a"), CommitOperationAdd("README.md", b"---\\nlicense: [a]\\n---\\n")
stale = fails(api.create_commit, "me/whole", [more], commit_message="x", parent_commit=first.oid)
bad = fails(api.create_commit, "me/whole", [wrong], commit_message="x")
told = {
    "user": api.whoami()["name"], "ids": [repo.repo_id, again.repo_id], "exists": api.repo_exists("me/whole"),
    "license": info.card_data.license, "sha": info.sha == first.oid, "count": len(info.siblings),
    "folder": type(tree["sub"]).__name__, "lfs": tree["model.safetensors"].lfs.size, "entries": len(tree),
    "verified": [verified.checked_count, verified.mismatches, verified.missing_paths, verified.extra_paths],
    "sizes": [len(open(path, "rb").read()) for path in (old, new)],
    "snapshot": len([path for path in snapshot.rglob("*") if path.is_file()]),
    "missing": api.file_exists("me/whole", "empty.txt"), "revision": api.revision_exists("me/whole", "nothing"),
    "entry": fails(hf_hub_download, "me/whole", "nothing.txt"), "stale": stale, "bad": bad,
}
api.create_branch("me/whole", branch="next")
api.create_commit("me/whole", [CommitOperationAdd("a.txt", b"a")], commit_message="x", revision="next")
told["branch"] = [api.file_exists("me/whole", "a.txt"), api.file_exists("me/whole", "a.txt", revision="next")]
api.delete_repo("me/whole")
told["after"] = api.repo_exists("me/whole")
""")  # fmt: skip
    assert told == {
        "user": "me",
        "ids": ["me/whole"] * 2,
        "exists": True,
        "license": "mit",
        "sha": True,
        "count": 34,
        "folder": "RepoFolder",
        "lfs": 10240,
        "entries": 35,
        "verified": [33, [], [".gitattributes"], []],
        "sizes": [10240, 3],
        "snapshot": 33,
        "missing": False,
        "revision": False,
        "entry": ["RemoteEntryNotFoundError", 404],
        "stale": ["HfHubHTTPError", 412],
        "bad": ["ValueError", None],
        "branch": [False, True],
        "after": False,
    }
    assert not hub.leaks


@pytest.mark.slow
def test_a_private_repository_is_its_owners(hub, tmp_path):
    code = FAILS + """
told = [fails(api.model_info, "me/secret"), fails(hf_hub_download, "me/secret", "a.txt"),
        fails(api.create_commit, "me/secret", [CommitOperationAdd("a", b"a")], commit_message="x"),
        fails(api.create_repo, "me/another"), api.repo_exists("me/secret")]
"""  # fmt: skip
    made = """
api.create_repo("me/secret", private=True)
api.create_commit("me/secret", [CommitOperationAdd("a.txt", b"a")], commit_message="x")
told = [open(hf_hub_download("me/secret", "a.txt")).read(), api.model_info("me/secret").private]
"""
    assert ask(hub, tmp_path / "me", made) == ["a", True]
    for token, status in ((None, 401), ("token-of-them", 404)):
        told = ask(hub, tmp_path / str(token), code, token=token)
        assert told[0] == ["RepositoryNotFoundError", status]
        assert told[1][0] in ("RepositoryNotFoundError", "LocalEntryNotFoundError")
        assert told[2] == ["RepositoryNotFoundError", status]
        assert told[3] == ["HfHubHTTPError", 401 if token is None else 403]
        assert told[4] is False
    assert ask(hub, tmp_path / "wrong", FAILS + "told = fails(api.whoami)", token="wrong") == ["HfHubHTTPError", 401]


UPLOAD = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
api.create_repo("me/cut", exist_ok=True)
files = [CommitOperationAdd(f"{n}.safetensors", bytes([n]) * 1000) for n in range(3)]
api.create_commit("me/cut", files, commit_message="all", num_threads=1)
"""


@pytest.mark.slow
def test_an_upload_that_was_cut_off_goes_on(hub, tmp_path):
    hub.hold(after=1)
    with start_client(hub, tmp_path, "-c", UPLOAD) as process:
        try:
            assert hub.held.wait(60), "no second object came"
            process.kill()
            assert hub.cut.wait(60), "the Hub does not see that its client is gone"
        finally:
            process.kill()
            hub.hold_after = None
    (first,) = hub.puts
    repo = hub.repos["me/cut"]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes"}
    finished = run_client(hub, tmp_path, "-c", UPLOAD)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes", *(f"{n}.safetensors" for n in range(3))}
    assert (hub.puts[first], len(hub.puts)) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("parent", [None, "the first commit"])
def test_two_clients_at_once(hub, tmp_path, parent):
    name = "me/both-careful" if parent else "me/both"
    ask(hub, tmp_path, f'api.create_repo("{name}")')
    head = hub.repos[name].branches["main"]
    program = f"""
from huggingface_hub import CommitOperationAdd, HfApi
import sys
api = HfApi()
files = [CommitOperationAdd(f"{{sys.argv[1]}}-{{n}}.safetensors", bytes([n]) * 5000) for n in range(4)]
api.create_commit("{name}", files, commit_message="x", parent_commit={head if parent else None!r})
"""
    processes = [start_client(hub, tmp_path, "-c", program, word) for word in ("one", "two")]
    ends = []
    for process in processes:
        with process:
            process.communicate(timeout=60)
        ends.append(process.returncode)
    files = hub.repos[name].commits[hub.repos[name].branches["main"]]
    assert len(hub.repos[name].commits) == (2 if parent else 3)
    assert len(files) == 1 + 4 * (1 if parent else 2)
    assert sorted(ends) == ([0, 1] if parent else [0, 0])


def test_it_listens_on_the_loopback_device_alone(hub):
    assert hub.url.startswith("http://127.0.0.1:")
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in (address for address in own if not address.startswith("127.")):
        with socket.socket() as caller:
            caller.settimeout(2)
            assert caller.connect_ex((address, int(hub.url.rpartition(":")[2])))
