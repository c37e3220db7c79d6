"""Whole experiments on the tiny model: interrupted anywhere, run again, fed with bad input."""

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxscape import experiment
from jaxscape.collect.store import Answers, Store
from jaxscape.experiment import Experiment
from jaxscape.finetune import trainer
from jaxscape.report import tables
from jaxscape.workspace import Workspace
from tests.launching import contents, differences, files_of, run_here, small_config, unbroken, watching

_PIECES = "while a piece is stored"
# A name -> the audit event just before which the disk is copied: event, path, how many-th time.
MOMENTS = {
    "before anything": ("open", r"/\.config\.json", 1),
    "with an empty stage": ("open", r"representations/\.0shot\.partial/\.inputs", 1),
    "before a piece is recorded": ("os.rename", r"representations/\.2shot\.partial/\.progress", 2),
    "before collect commits": ("os.rename", r"representations/\.2shot\.partial$", 1),
    "after collect committed": ("os.remove", r"representations/2shot/inputs", 1),
    "before the first state": ("os.mkdir", r"checkpoints/\.sft\.partial/state/2\.", 1),
    "before a checkpoint is in place": ("os.rename", r"kept/4\.[^/]*$", 1),
    "inside a state": ("open", r"state/4\.\S*/default\S*/_METADATA", 1),
    "before a state is in place": ("os.rename", r"state/4\.[^/]*$", 1),
    "before the old state goes": ("shutil.rmtree", r"state/2$", 1),
    "with the log ahead of the state": ("os.mkdir", r"state/6\.[^/]*$", 1),
    "before the last checkpoint is in place": ("os.rename", r"kept/8\.[^/]*$", 1),
    "before finetune commits": ("os.rename", r"checkpoints/\.sft\.partial$", 1),
    "before the adapter is in place": ("os.rename", r"checkpoints/sft/\.adapter", 1),
    "before a layer is in place": ("os.rename", r"landscape/\.2shot\.partial/\.layer-002", 1),
    "before landscape commits": ("os.rename", r"landscape/\.sft\.partial$", 1),
    "between two tables": ("os.rename", r"results/\.accuracy\.csv", 1),
}
OF_TRAINING = [name for name, (_, path, _) in MOMENTS.items() if "state/" in path or "kept/" in path]


_CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def copies(config, root: Path, folder: Path) -> None:
    """Runs an experiment and copies its folder at every moment: what a SIGKILL then would leave."""
    seen, still = dict.fromkeys(MOMENTS, 0), threading.RLock()

    def copy_what_is_there(source, target):
        with contextlib.suppress(FileNotFoundError):  # states are stored meanwhile: lock files come and go
            shutil.copy2(source, target)

    def copy(name):
        with still, contextlib.suppress(shutil.Error):  # a folder that was renamed just then
            shutil.copytree(root, folder / name, copy_function=copy_what_is_there)

    def look(event, arguments):
        if event not in _CHANGES or str(root) not in str(arguments[0]):
            return
        with still:  # other threads, which write checkpoints, wait while one copies
            for name, (wanted, path, times) in MOMENTS.items():
                if event == wanted and re.search(path, str(arguments[0])):
                    seen[name] += 1
                    if seen[name] == times:
                        copy(name)

    def write_in_two(store, questions, states, answers):
        half = len(questions) // 2
        write(store, questions[:half], states[:, :half], Answers(*(part[:half] for part in answers))).result()
        if "2shot" in str(store.folder) and not (folder / _PIECES).exists():
            copy(_PIECES)
        return write(store, questions, states, answers)

    write = Store.write
    with watching(look), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", write_in_two)
        run_here(config, root)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Method -> folder of copies of an experiment's folder, one for each moment."""
    made = {}

    def of(method):
        if method not in made:
            unbroken(tmp_path_factory, method)  # fills the cache of compiled programs
            made[method] = tmp_path_factory.mktemp(method)
            copies(small_config(finetune__method=method), tmp_path_factory.mktemp("run") / "workdir", made[method])
        return made[method]

    return of


@pytest.mark.parametrize(
    ("method", "moment"), [*(("lora", m) for m in [*MOMENTS, _PIECES]), *(("full", m) for m in OF_TRAINING)]
)
def test_killed_at_a_moment_and_run_again_gives_the_same_bits(method, moment, interrupted, tmp_path, tmp_path_factory):
    root = shutil.copytree(interrupted(method) / moment, tmp_path / "workdir")
    run_here(small_config(finetune__method=method), root)
    assert differences(contents(root), contents(unbroken(tmp_path_factory, method))) == []


@pytest.mark.parametrize("moment", ["before a piece is recorded", "before the old state goes"])
def test_goes_on_from_the_last_finished_piece(moment, interrupted, tmp_path, monkeypatch):
    root = shutil.copytree(interrupted("lora") / moment, tmp_path / "workdir")
    pieces, steps = [], []
    write, step = Store.write, trainer.TrainingRun.step
    monkeypatch.setattr(Store, "write", lambda self, *rest: pieces.append(1) or write(self, *rest))
    monkeypatch.setattr(trainer.TrainingRun, "step", lambda self, n: steps.append(n) or step(self, n))
    run_here(small_config(), root, ["collect", "finetune"])
    expected = {"before a piece is recorded": (4, 8), "before the old state goes": (1, 4)}  # of 5 writes
    assert (len(pieces), len(steps)) == expected[moment]


def test_finished_experiment_makes_nothing_but_the_report(tmp_path_factory, monkeypatch):
    root = unbroken(tmp_path_factory)
    before, found = files_of(root), contents(root)
    monkeypatch.setattr(experiment.Experiment, "model", lambda *_: pytest.fail("a model was loaded"))
    run_here(small_config(), root, figures=True)
    changed = {name for name, time in files_of(root).items() if before.get(name) != time}
    assert {name.split("/")[0] for name in changed} == {".lock", "results", "report"}
    assert differences(found, contents(root)) == []


@pytest.mark.parametrize(
    ("stages", "missing"),
    [("report", "landscape"), ("landscape", "collect"), ("landscape,report", "collect")],
)
def test_stage_without_what_it_needs_says_so(stages, missing, tmp_path, raises_input_error):
    with raises_input_error("--stages", f"'{missing}'", "'0shot'"):
        run_here(small_config(), tmp_path / "workdir", stages.split(","))


def test_collect_alone_keeps_what_it_can_and_asks_for_finetune(tmp_path, raises_input_error):
    root = tmp_path / "workdir"
    with raises_input_error("--stages", "'sft'", "'finetune'"):
        run_here(small_config(), root, ["collect"])
    assert sorted(path.name for path in (root / "representations").iterdir()) == ["0shot", "2shot"]


def test_stages_one_by_one_equal_all_at_once(tmp_path, tmp_path_factory):
    root = tmp_path / "workdir"
    for stages in (["finetune"], ["collect"], ["landscape"], ["report"]):
        run_here(small_config(), root, stages)
    assert differences(contents(root), contents(unbroken(tmp_path_factory))) == []


def test_unknown_stage_is_named(tmp_path, raises_input_error):
    with raises_input_error("--stages", "colect", "collect,finetune,landscape,report"):
        run_here(small_config(), tmp_path / "workdir", ["colect"])


def bank_file(folder: Path, name: str = "rivers", choices=("Africa", "America", "Asia", "Europe"), suffix="") -> Path:
    """A bank of one subject; ``suffix`` changes every item."""
    items = "\n".join(f'{c} = {json.dumps([f"{c} river {i}{suffix}" for i in range(24)])}' for c in choices)
    folder.mkdir(exist_ok=True)
    templates = '["Where is {item}?", "On what continent does {item} flow?"]'
    text = f'subject = "{name}"\nchoices = {json.dumps(list(choices))}\ntemplates = {templates}\n[items]\n{items}\n'
    (folder / f"{name}.toml").write_text(text)
    return folder


def test_stage_made_from_other_questions_is_made_again(tmp_path, raises_input_error):
    root, stages = tmp_path / "workdir", ["collect", "landscape", "report"]
    config = small_config(
        data__source=f"bank:{bank_file(tmp_path / 'bank')}", data__subjects=(), data__test_per_subject=36,
        conditions=("0shot",),
    )  # fmt: skip
    run_here(config, root, stages)
    first = contents(root, ["0shot"])
    bank_file(tmp_path / "bank", suffix="b")
    with raises_input_error("'report'", "'landscape'", "'0shot'"):
        run_here(config, root, ["report"])
    assert "0shot states" not in differences(first, contents(root, ["0shot"]))  # refused, not removed
    run_here(config, root, stages)
    second = contents(root, ["0shot"])
    assert {"0shot states", "0shot logits", "layers.csv"} <= set(differences(first, second))
    bank_file(tmp_path / "bank")
    run_here(config, root, stages)
    assert differences(first, contents(root, ["0shot"])) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__subjects": ("astrology",)}, ("no such subject", "astrology", "animals")),
        ({"data__subjects": (3,)}, ("no such subject: 3",)),
        ({"data__source": "bonk"}, ("config.data.source", "bonk", "bank:FOLDER")),
        ({"data__source": "bank:nowhere"}, ("nowhere", "no such folder")),
        ({"data__test_per_subject": -1}, ("per_subject", "-1")),
        ({"conditions": ("0shot", "fewshot")}, ("config.conditions", "fewshot", "<k>shot")),
        ({"conditions": (1,)}, ("config.conditions", "1", "<k>shot")),
        ({"conditions": ()}, ("config.conditions", "at least one")),
        ({"conditions": ("sft", "sft")}, ("config.conditions", "each once")),
        ({"conditions": ("99shot",)}, ("dev questions", "99 shots")),
        ({"landscape__k": 18}, ("config.landscape.k = 18", "at most 17", "36 questions")),
        ({"landscape__k": 0}, ("config.landscape.k = 0", "at least 1")),
        ({"landscape__max_rank": 1}, ("config.landscape.max_rank = 1", "at least 2")),
        ({"compare__neighbors": 17}, ("config.compare.neighbors = 17", "at most 16")),
        ({"collect__site": "logits"}, ("config.collect.site", "residual, input_norm")),
        ({"collect__tokens": "first"}, ("config.collect.tokens", "last, question_mean")),
        ({"collect__layers": "some"}, ("config.collect.layers 'some'", "'every 4'")),
        ({"collect__layers": "2,5"}, ("config.collect.layers '2,5'", "4 layers")),
        ({"collect__layers": "1", "collect__site": "final_norm"}, ("config.collect.layers", "one final norm")),
        ({"collect__dtype": "int8"}, ("config.collect.dtype", "float32, bfloat16, float16")),
        ({"collect__token_budget": 0}, ("config.collect.token_budget = 0",)),
        ({"seed": -1}, ("config.seed = -1",)),
        ({"finetune__method": "prefix"}, ("config.finetune.method", "lora, full")),
        ({"finetune__remat": "all"}, ("config.finetune.remat", "elementwise")),
        ({"finetune__steps": 0}, ("config.finetune.steps = 0",)),
        ({"finetune__targets": ("q", "x")}, ("targets", "'x'", "gate")),
        ({"finetune__rank": 0}, ("rank 0",)),
        ({"finetune__dropout": 1.0}, ("dropout 1.0",)),
        ({"model__source": "nowhere"}, ("config.model.source", "nowhere")),
        ({"model__dtype": "float64"}, ("config.model.dtype", "float64", "bfloat16")),
        ({"mesh__tensor": 64}, ("config.mesh", "64", "device")),
        ({"landscape__z": -1.0}, ("config.landscape.z = -1.0",)),
        ({"landscape__z": float("nan")}, ("config.landscape.z = nan",)),
        ({"finetune__optimizer": "adamw(beta2=0.9)"}, ("config.finetune.optimizer", "beta2", "b2")),
        ({"finetune__trackers": ("paper",)}, ("config.finetune.trackers", "'paper'", "tensorboard")),
        ({"finetune__splits": ("test",)}, ("config.finetune.splits", "'test'")),
        ({"finetune__splits": ("validation",)}, ("config.finetune.splits", "'validation'", "train")),
        ({"finetune__validation": "held_out"}, ("config.finetune.validation 'held_out'", "evaluations = 0")),
        ({"finetune__epochs": -1.0}, ("config.finetune.epochs = -1.0",)),
        ({"finetune__batch_size": 0, "finetune__epochs": 1.0}, ("config.finetune.batch_size = 0",)),
        ({"finetune__adapter": "nowhere"}, ("config.finetune.adapter 'nowhere'", "adapter_config.json")),
        ({"finetune__adapter": "x", "conditions": ("sft@3",)}, ("'sft@3'", "config.finetune.adapter")),
        ({"conditions": ("sft@3",)}, ("config.conditions", "'sft@3' is not kept", "2, 4, 8")),
        ({"conditions": ("sft@all", "sft")}, ("config.conditions", "'sft@2', 'sft@4', 'sft', 'sft'", "each once")),
        ({"finetune__alpha": -3.0}, ("alpha -3.0",)),
        ({"data__mask": "nowhere.npy"}, ("config.data.mask", "nowhere.npy", "mmlu:FOLDER")),
        ({"report__dendrogram_condition": "0shto"}, ("config.report.dendrogram_condition", "0shto")),
        ({"report__dendrogram_layer": -1}, ("config.report.dendrogram_layer = -1",)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_wrong_value_in_the_configuration_is_named(changes, words, tmp_path, raises_input_error):
    with raises_input_error(*words):
        run_here(small_config(**changes), tmp_path / "workdir")


def test_bank_with_three_choices_is_refused(tmp_path, raises_input_error):
    folder = bank_file(tmp_path / "bank", choices=("Africa", "Asia", "Europe"))
    with raises_input_error("rivers.toml", "choices has 3", "exactly 4"):
        run_here(small_config(data__source=f"bank:{folder}", data__subjects=()), tmp_path / "workdir")


def model_folder(tiny_llama: Path, folder: Path, **fields) -> Path:
    """A copy of the tiny model, with fields of its configuration changed."""
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", None, ("model.safetensors", "no such file")),
        ("model.safetensors", b"nothing like it", ("model.safetensors", "not a readable safetensors file")),
        ("config.json", None, ("config.json", "config.model.source")),
        ("config.json", b"{", ("config.json", "not readable JSON")),
        ("config.json", b'{"model_type": "mamba"}', ("config.json", "mamba", "llama")),
        ("tokenizer.json", b"[]", ("tokenizer",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_model_is_named(file, content, words, tiny_llama, tmp_path, raises_input_error):
    folder = model_folder(tiny_llama, tmp_path / "model")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with raises_input_error(str(folder), *words):
        run_here(small_config(model__source=str(folder)), tmp_path / "workdir")


def test_prompt_longer_than_the_model_takes_is_named_before_anything_runs(tiny_llama, tmp_path, raises_input_error):
    folder, root = model_folder(tiny_llama, tmp_path / "model", max_position_embeddings=128), tmp_path / "workdir"
    with raises_input_error("condition 2shot", "question bank/", "takes 128", "fewer shots"):
        run_here(small_config(model__source=str(folder)), root)
    assert list((root / "representations").iterdir()) == []  # said before anything ran
    folder = model_folder(tiny_llama, tmp_path / "shorter", max_position_embeddings=16)
    with raises_input_error("fine-tuning", "question bank/", "takes 16"):
        run_here(small_config(model__source=str(folder)), tmp_path / "other", ["finetune"])


def flip_bit(root):
    chunk = next(p for p in (root / "representations/2shot/states.zarr/c/1").rglob("0") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)


def lose_array(root):
    shutil.rmtree(root / "representations/2shot/states.zarr/c/1")


def lose_logits(root):
    shutil.rmtree(root / "representations/2shot/logits.zarr")


def break_landscape(root):
    (root / "landscape/2shot/layer-003.npz").write_bytes(b"PK\x03\x04 no zip")


def empty_landscape(root):
    (root / "landscape/2shot/layer-003.npz").write_bytes(b"")


def lose_last_layer(root):
    (root / "landscape/2shot/layer-004.npz").unlink()


def break_adapters(root):
    for file in (root / "checkpoints/sft/kept/8").rglob("*"):
        if file.is_file():
            file.write_bytes(b"abc")


def shorten_adapters(root):
    files = [path for path in (root / "checkpoints/sft/kept/8").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def break_manifest(root):
    (root / "landscape/2shot/manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("breaking", "folder", "again"),
    [
        (flip_bit, "representations/2shot", ["landscape/2shot"]),
        (lose_array, "representations/2shot", ["landscape/2shot"]),
        (lose_logits, "representations/2shot", []),
        (break_landscape, "landscape/2shot", []),
        (empty_landscape, "landscape/2shot", []),
        (lose_last_layer, "landscape/2shot", []),
        (break_adapters, "checkpoints/sft", ["representations/sft"]),
        (shorten_adapters, "checkpoints/sft", ["representations/sft"]),
        (break_manifest, "landscape/2shot/manifest.json", []),
    ],
)
def test_damaged_file_is_named_and_made_again_once_deleted(
    breaking, folder, again, tmp_path, tmp_path_factory, raises_input_error
):
    root = shutil.copytree(unbroken(tmp_path_factory), tmp_path / "workdir")
    breaking(root)
    for name in again:  # the stage that reads what was damaged
        shutil.rmtree(root / name)
    with raises_input_error(str(root / folder), "delete", "run again"):
        run_here(small_config(), root)
    damaged = root / folder
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    run_here(small_config(), root)
    assert differences(contents(root), contents(unbroken(tmp_path_factory))) == []


def test_dendrogram_of_a_layer_that_is_not_there_is_refused(tmp_path, tmp_path_factory, raises_input_error):
    root = shutil.copytree(unbroken(tmp_path_factory), tmp_path / "workdir")
    config = small_config(report__dendrogram_layer=9)
    (root / "config.json").unlink()
    with raises_input_error("config.report.dendrogram_layer = 9", "1, 2, 3, 4"):
        run_here(config, root, ["report"], figures=True)


def test_permuted_shots_are_the_same_shots_in_other_orders(tmp_path):
    config = small_config(conditions=("2shot", "2shot_permuted"))
    experiment = Experiment(config, Workspace(tmp_path / "workdir", config.to_dict()))
    fixed, permuted = (experiment.prompts[name] for name in config.conditions)
    assert [p.question for p in permuted] == [p.question for p in fixed]
    assert all(sorted(a.prefix) == sorted(b.prefix) for a, b in zip(fixed, permuted, strict=True))
    changed = sum(a.prefix != b.prefix for a, b in zip(fixed, permuted, strict=True))
    assert 0 < changed < len(fixed)  # of two shots half stay in order


def test_means_of_questions_at_some_layers_are_mapped_under_their_numbers(tmp_path):
    root = tmp_path / "workdir"
    config = small_config(conditions=("2shot",), collect__site="post_attention_norm", collect__tokens="question_mean",
                          collect__layers="every 2")  # fmt: skip
    run_here(config, root)
    store = Store.open(root / "representations/2shot")
    assert store.layers == (2, 4) and store.states.shape == (2, 36, 32)
    assert sorted(file.name for file in (root / "landscape/2shot").glob("*.npz")) == ["layer-002.npz", "layer-004.npz"]
    rows = tables.read_table(root / "results" / "layers.csv")
    assert [row["layer"] for row in rows] == [2, 4] and all(row["intrinsic_dim"] > 0 for row in rows)
    text = (root / "report" / "index.html").read_text()
    assert "post_attention_norm, mean over the question tokens, layers: every 2" in text


def test_final_norm_is_the_last_layer(tmp_path):
    root = tmp_path / "workdir"
    run_here(small_config(conditions=("0shot",), collect__site="final_norm"), root)
    assert [row["layer"] for row in tables.read_table(root / "results" / "layers.csv")] == [4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_in_half_precision_are_mapped_too(dtype, tmp_path, tmp_path_factory):
    root = tmp_path / "workdir"
    run_here(small_config(conditions=("0shot", "2shot"), collect__dtype=dtype), root)
    half, whole = contents(root, ["2shot"]), contents(unbroken(tmp_path_factory), ["2shot"])
    assert half["2shot states"].dtype == dtype
    assert half["2shot states"].tobytes() == whole["2shot states"].astype(dtype).tobytes()
    assert np.isfinite(half["2shot layer 4 log_density"]).all()
