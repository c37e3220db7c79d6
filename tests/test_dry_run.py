"""The plan: of published models from config.json alone, its numbers against counting by hand."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from jaxscape import dry_run
from jaxscape.collect.planning import plan_collection, plan_facts
from jaxscape.dry_run import assumed_devices, collection_flops, describe, duration, linear_flops, pairs, rate_of
from jaxscape.experiment import Experiment
from jaxscape.models import memory
from jaxscape.models.families import from_hf_config
from jaxscape.models.lora import LoraConfig
from jaxscape.models.mesh import Devices
from jaxscape.workspace import Workspace
from tests.launching import small_config
from tests.models.on_meshes import architecture
from tests.published import LLAMA_3_8B, LLAMA_3_70B


@pytest.fixture
def plan_of(tiny_llama, tmp_path):
    """``plan_of(config.json, devices, field=value, ...)`` -> the plan's lines, by their first words.

    The model is a folder with that config.json and a tokenizer, and nothing else.
    """

    def plan(config, devices, tflops=0.0, **changes):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        for file in tiny_llama.glob("tokenizer*"):
            shutil.copy(file, folder)
        fields = {"mesh__data": 0, "mesh__fsdp": 0, "mesh__tensor": 0, "model__dtype": "bfloat16"} | changes
        fields = small_config(model__source=str(folder), **fields)
        root = tmp_path / "workdir"
        text = describe(Experiment(fields, Workspace(root, fields.to_dict())), devices, tflops)
        assert not root.exists()
        return text.splitlines()

    return plan


def line(lines: list[str], start: str) -> str:
    (found,) = (text for text in lines if text.startswith(start))
    return found


def test_8b_on_one_device_of_80_gb(plan_of):
    lines = plan_of(LLAMA_3_8B, assumed_devices("H100", 1, 0), conditions=("0shot", "2shot"))
    assert "8,030,261,248 parameters, 16.1 GB in bfloat16" in line(lines, "model:")
    assert "data 1 x fsdp 1 x tensor 1 on 1 x H100" in line(lines, "mesh:")
    memory = line(lines, "memory")
    assert "parameters 16.1 GB" in memory and "of 80.0 GB" in memory
    assert 16.1 <= float(re.search(r"in all ([\d.]+) GB", memory)[1]) < 20
    assert "50% of the 989 TFLOP/s of a H100" in line(lines, "estimate:")
    spent, seconds = re.search(r"([\d,]+) TFLOP, ([\d.]+) s", line(lines, "collect 0shot + 2shot")).groups()
    assert float(seconds) == pytest.approx(int(spent.replace(",", "")) / (0.5 * 989), abs=0.1)
    assert line(lines, "estimate:").startswith(f"estimate: {seconds} s")


@pytest.mark.parametrize(
    ("count", "gigabytes", "mesh", "parameters"),
    [
        (8, 80, "data 2 x fsdp 1 x tensor 4", "35.3 GB"),
        (8, 40, "data 1 x fsdp 1 x tensor 8", "17.6 GB"),
        (16, 40, "data 2 x fsdp 1 x tensor 8", "17.6 GB"),
    ],
)
def test_70b_on_many_devices(count, gigabytes, mesh, parameters, plan_of):
    lines = plan_of(LLAMA_3_70B, assumed_devices("H100", count, gigabytes), conditions=("0shot", "2shot"))
    assert "70,553,706,496 parameters, 141 GB in bfloat16" in line(lines, "model:")
    assert f"{mesh} on {count} x H100" in line(lines, "mesh:")
    assert f"parameters {parameters}" in line(lines, "memory")
    assert f"{count} device(s)" in line(lines, "estimate:")


def test_70b_on_8_devices_as_one_copy(plan_of):
    lines = plan_of(LLAMA_3_70B, assumed_devices("H100", 8, 80), conditions=("0shot",), mesh__tensor=8)
    assert "data 1 x fsdp 1 x tensor 8 on 8 x H100" in line(lines, "mesh:")
    assert "parameters 17.6 GB" in line(lines, "memory")


def test_what_does_not_fit_is_one_line(plan_of, raises_input_error):
    with raises_input_error("does not fit 1 x H100", "141 GB", "use 4 such devices"):
        plan_of(LLAMA_3_70B, assumed_devices("H100", 1, 80), conditions=("0shot",))


def test_prompt_longer_than_the_model_takes_is_one_line(plan_of, raises_input_error):
    with raises_input_error("tokens, the model takes 64", "fewer shots"):
        plan_of(LLAMA_3_8B | {"max_position_embeddings": 64}, assumed_devices("H100", 1, 80))


def test_batches_and_operations_of_a_plan_are_those_of_the_run(plan_of, tiny_llama):
    """The numbers printed against the planner's and a count by hand, and the time against the rate."""
    config = json.loads((tiny_llama / "config.json").read_text())
    lines = plan_of(config, assumed_devices("H100", 1, 80), tflops=1e-3, conditions=("0shot", "2shot", "sft"),
                    collect__token_budget=512)  # fmt: skip
    found = re.findall(r"([\d,.]+) (prompts|tokens,|run|passes)", line(lines, "collect 0shot + 2shot"))
    numbers = {unit: int(number.replace(",", "")) for number, unit in found}
    assert numbers["prompts"] == 2 * 36
    assert numbers["run"] < numbers["tokens,"]
    batches = [text for text in lines[lines.index(line(lines, "collect 0shot")) + 1 :] if text.startswith("  ")]
    batches = batches[: next(i for i, text in enumerate(batches) if "memory" in text)]
    of_pretrained = sum(text.startswith("  ") for text in lines[: lines.index(line(lines, "collect sft"))])
    assert sum(int(text.split()[0]) for text in batches[:of_pretrained]) == numbers["passes"]
    assert "0.001 TFLOP/s a device (--device_tflops)" in line(lines, "estimate:")
    assert "8 steps of 4 questions, 0 evaluations;" in line(lines, "fine-tuning (lora)")
    assert "optimizer" in lines[lines.index(line(lines, "fine-tuning")) + 1]


def test_training_that_is_followed(plan_of, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    arch = from_hf_config(config)
    followed = {"finetune__validation": "held_out", "finetune__validation_share": 0.25, "finetune__evaluations": 2,
                "finetune__epochs": 2.0, "finetune__accumulation": 2}  # fmt: skip
    one = plan_of(config, assumed_devices("H100", 1, 80), conditions=("sft",), **followed)
    text = line(one, "fine-tuning (lora)")
    trained, held_out = 3 * 72, 3 * 24  # 96 questions a subject, of which the items are parted
    numbers = sum(np.prod(leaf.shape) for leaf in memory.trained_shapes(arch, LoraConfig(4, 32.0)).values())
    for words in (f"{numbers:,} parameters, {trained} questions shown 2.0 times", "108 steps of 4 questions in 2 parts",
                  f"3 evaluations of {held_out} questions"):  # fmt: skip
        assert words in text, text
    kept = one[one.index(text) + 2]
    assert kept.startswith("  kept after steps 2, 15, 108: ")
    assert f"{memory.readable(3 * 4 * numbers)} on disk; states to resume from: {memory.readable(24 * numbers)}" in kept
    assert f"parameters {memory.readable(4 * (memory.parameter_count(arch) / 2 + numbers))}" in one[one.index(text) + 1]


def test_checkpoints_are_collected_one_after_another(plan_of, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    one, all_of_them = (plan_of(config, assumed_devices("H100", 1, 80), tflops=1e-6, conditions=(asked,))
                        for asked in ("sft", "sft@all"))  # fmt: skip
    units = {"s": 1, "min": 60, "h": 3600}
    found = [re.search(r"TFLOP, ([\d.]+) (\w+)", line(lines, "collect sft")) for lines in (one, all_of_them)]
    times = [float(number) * units[unit] for number, unit in (match.groups() for match in found)]
    assert times[1] == pytest.approx(3 * times[0], rel=0.1)
    assert line(all_of_them, "collect sft").startswith("collect sft@2, sft@4, sft: 3 x 36 prompts")


def test_lanes_share_a_step(plan_of):
    alone, four = (plan_of(LLAMA_3_8B, assumed_devices("H100", count, 80), conditions=("sft",), finetune__batch_size=16)
                   for count in (1, 4))  # fmt: skip
    times = [float(re.search(r"TFLOP, ([\d.]+) s", line(lines, "fine-tuning"))[1]) for lines in (alone, four)]
    assert times[0] == pytest.approx(4 * times[1], rel=0.02)


def brute_force_flops(arch, plan) -> float:
    """Every product of every token computed, one by one."""
    d, f, h, k = arch.width, arch.head_dim, arch.num_heads, arch.num_kv_heads
    token = 2 * (d * h * f + 2 * d * k * f + h * f * d + (3 if arch.gated else 2) * d * arch.mlp_width)
    total = token * arch.num_layers * plan_facts(plan)["tokens_computed"]
    rows = [(0, length) for job in plan.jobs for length in job.lengths]
    for job in plan.jobs:
        for wave in (wave for piece in job.pieces for wave in piece):
            for depth, lane in zip(wave.depths, wave.rows, strict=True):
                rows += [(depth, len(plan.tokens[row]) - depth) for row in lane]
    for layer in range(arch.num_layers):
        window = arch.kinds[arch.kind_of_layer[layer]].window
        for depth, length in rows:
            for place in range(depth, depth + length):
                total += 2 * 2 * h * f * min(place + 1, window or place + 1)  # scores, and the values they weigh
    return total + 2 * d * arch.vocab_size * len(plan.tokens)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_operations_of_collection_are_those_counted_one_by_one(family, lanes):
    rng, arch = np.random.default_rng(0), architecture(family)
    shared = rng.integers(0, 64, 40).tolist()
    tokens = [shared + rng.integers(0, 64, n).tolist() for n in rng.integers(3, 20, 24)]
    plan = plan_collection(tokens, 128, lanes=lanes, pass_cost=1.0)
    assert any(job.room for job in plan.jobs)
    assert collection_flops(arch, plan) == brute_force_flops(arch, plan)


def test_operations_of_a_published_model():
    norms_and_tables = 2 * 128_256 * 4096 + 65 * 4096
    assert linear_flops(from_hf_config(LLAMA_3_8B)) == 2 * (8_030_261_248 - norms_and_tables)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("depth", "length"), [(0, 1), (0, 9), (3, 4), (12, 30)])
def test_pairs_are_those_of_the_mask(depth, length, window):
    query, key = np.arange(depth, depth + length)[:, None], np.arange(depth + length)
    seen = (key <= query) & (key > query - (window or 10**6))
    assert pairs(depth, length, window) == seen.sum()


@pytest.mark.parametrize(
    ("method", "remat", "passes"),
    [("full", "none", 3), ("full", "elementwise", 3), ("full", "blocks", 4), ("lora", "none", 2),
     ("lora", "blocks", 3)],
)  # fmt: skip
def test_operations_of_training(method, remat, passes):
    arch = from_hf_config(LLAMA_3_8B)
    finetune = SimpleNamespace(method=method, remat=remat, steps=10, batch_size=4)
    head = 2 * 4096 * 128_256 * 40
    found = dry_run.training_flops(arch, [10, 30], finetune)
    assert found == passes * (linear_flops(arch) * 10 * 4 * 20 + head)


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [("NVIDIA H100 80GB HBM3", "bfloat16", 989), ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
     ("NVIDIA A10G", "bfloat16", 125), ("TPU v5 lite", "bfloat16", 197), ("TPU v5", "bfloat16", 459),
     ("NVIDIA L4", "bfloat16", 121), ("NVIDIA L40S", "bfloat16", 362), ("NVIDIA H200", "float32", 67)],
)  # fmt: skip
def test_rate_of_known_devices_is_half_their_peak(kind, dtype, tera):
    assert rate_of(Devices(1, 1, 1, kind), dtype).flops == 0.5e12 * tera


def test_rate_of_other_devices(raises_input_error):
    assert rate_of(Devices(1, 1, 1, "Abacus"), "float32", 2.5).flops == 2.5e12
    with raises_input_error("Abacus", "--device_tflops"):
        rate_of(Devices(1, 1, 1, "Abacus"), "float32")
    here = rate_of(Devices(2, 2, 1, "cpu"), "float32")
    assert 1e8 < here.flops < 1e13 and "measured" in here.why


def test_assumed_devices(raises_input_error):
    assert assumed_devices("H100", 16, 0) == Devices(16, 8, 80 * 10**9, "H100")
    assert assumed_devices("Abacus", 1, 0.5) == Devices(1, 1, 5 * 10**8, "Abacus")
    with raises_input_error("--assume_kind=Abacus", "--assume_memory_gb", "h100"):
        assumed_devices("Abacus", 1, 0)
    for count, gigabytes in ((0, 80), (1, -1)):
        with raises_input_error("must be positive"):
            assumed_devices("H100", count, gigabytes)


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (90, "90.0 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text
