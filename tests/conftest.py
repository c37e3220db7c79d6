"""What several test files share: the tiny model, what PyTorch computed with it, and the same weights as a GGUF file."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 - safetensors reads bfloat16 by its dtype
import numpy as np
import pytest

from jaxscape.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Every program XLA compiles for the CPU holds a few memory maps, of which a process may have 65,530."""
    yield
    import jax

    jax.clear_caches()


class Golden(NamedTuple):
    """One prompt through PyTorch: last token's states [L, D] at each site, and its logits [V]."""

    text: str
    tokens: list[int]
    states: Mapping[str, np.ndarray]
    logits: np.ndarray


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Hub-format folder of a Llama of four layers, made by fixtures/make_tiny_llama.py."""
    return Path(__file__).parent / "fixtures" / "tiny_llama"


@pytest.fixture(scope="session")
def tiny_model(tiny_llama):
    from jaxscape.models.pretrained import load_pretrained
    from jaxscape.models.sharding import make_mesh

    return load_pretrained(tiny_llama, make_mesh())


@pytest.fixture(scope="session")
def golden(tiny_llama) -> list[Golden]:
    arrays = np.load(tiny_llama / "golden.npz")
    texts = json.loads((tiny_llama / "prompts.json").read_text())
    return [
        Golden(text, arrays[f"tokens_{i}"].tolist(),
               {site: arrays[f"{site}_{i}"] for site in ("residual", "input_norm")}, arrays[f"logits_{i}"])
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def tiny_tensors(tiny_llama) -> dict[str, np.ndarray]:
    """The tiny model's weights by their names on the hub."""
    from safetensors.numpy import load_file

    return load_file(tiny_llama / "model.safetensors")


@pytest.fixture(scope="session")
def on_eight_devices() -> Callable[..., dict]:
    """``on_eight_devices("-m", "module")``: the JSON that a Python process of eight host devices prints last."""
    # what takes the time is to compile; unoptimised code does, these models are tiny
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def run(*arguments: str) -> dict:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def raises_input_error():
    """``with raises_input_error("word", ...):`` wants an InputError of one line that has all the words."""

    @contextlib.contextmanager
    def expect(*words: str):
        with pytest.raises(InputError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message, message
        assert [word for word in words if word not in message] == [], message

    return expect


@pytest.fixture(scope="session")
def write_gguf(tiny_llama, tiny_tensors) -> Callable[..., Path]:
    """Writes the tiny model as llama.cpp's converter would.

    ``write_gguf(path, tensors=..., quantization="F32", metadata={...}, config={...})``: hub-named tensors; None in
    ``metadata`` leaves that key out; ``config`` has fields that differ from the tiny model's.
    """
    tiny_config = json.loads((tiny_llama / "config.json").read_text())
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    defaults = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
    }

    def write(path, *, tensors=None, quantization="F32", metadata=None, config=None):
        from tests import gguf_writer

        tensors = tiny_tensors if tensors is None else tensors
        keys = defaults | (metadata or {})
        return gguf_writer.write(path, tiny_config | (config or {}), tensors, keys, quantization)

    return write
