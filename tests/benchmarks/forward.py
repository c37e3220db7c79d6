"""The forward pass on the CPU: tokens a second beside transformers on PyTorch and beside the matrix products alone.

    python -m tests.benchmarks.forward

Equal batches (rows x tokens), all states of the last tokens kept, side by side in turns; where torch is not installed
its columns are empty. Then whole collection on the packaged model, 0-shot and 5-shot, against transformers asked one
prompt at a time, as in the reference study. Then the cold start.
"""

import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from flax import nnx

from jaxscape.collect import collect
from jaxscape.data.bank import load_bank
from jaxscape.data.batches import BatchShape, pack
from jaxscape.data.prompts import build_prompts
from jaxscape.models import load_model
from tests.benchmarks.limits import attention_flops, block_product_seconds, block_weights

PACKAGED = "smollm2-135m-instruct"
BATCHES = ((1, 100), (8, 100), (1, 600))
ROUNDS = 8


def theirs_by_transformers(arch):
    """``run(rows, tokens)`` of the same shape of model in PyTorch, random weights; None without torch."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=arch.vocab_size, hidden_size=arch.width, intermediate_size=arch.mlp_width,
        num_hidden_layers=arch.num_layers, num_attention_heads=arch.num_heads, num_key_value_heads=arch.num_kv_heads,
        max_position_embeddings=arch.max_positions, tie_word_embeddings=True)).eval()  # fmt: skip

    def run(tokens: np.ndarray) -> None:
        with torch.no_grad():
            out = model(torch.from_numpy(tokens).long(), output_hidden_states=True, logits_to_keep=1)
        [state[:, -1] for state in out.hidden_states]

    return run


def ours_by_jaxscape(model):
    """``run(tokens)``: states of every layer's last token and the logits of the vocabulary."""

    @jax.jit
    def forward(params, batch):
        decoder = nnx.merge(model.graphdef, params)
        out = decoder(batch, sites=("residual",))
        return out.states, decoder.logits(out.hidden)

    def run(tokens: np.ndarray) -> None:
        rows, longest = tokens.shape
        batch = pack(tokens.tolist(), BatchShape(tokens.size, rows, longest))
        jax.block_until_ready(forward(model.params, batch))

    return run


def in_turns(runs, *arguments) -> list[np.ndarray]:
    """Seconds of each run, ROUNDS times in turn, so that a slow moment of the machine hits all alike."""
    times = [[] for _ in runs]
    for run in runs:
        run(*arguments)
    for _ in range(ROUNDS):
        for taken, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run(*arguments)
            taken.append(time.perf_counter() - start)
    return [np.asarray(taken) for taken in times]


def equal_batches(model) -> None:
    """Prints a line a batch."""
    draw, arch = np.random.default_rng(0), model.arch
    ours, theirs = ours_by_jaxscape(model), theirs_by_transformers(arch)
    for rows, length in BATCHES:
        tokens = draw.integers(0, arch.vocab_size, (rows, length)).astype(np.int32)
        mine, *other = in_turns([ours] + ([theirs] if theirs else []), tokens)
        limit = block_product_seconds(rows * length, arch) * arch.num_layers
        share = attention_flops(rows, length, arch) / (2 * block_weights(arch) * rows * length)
        n = tokens.size
        line = f"{rows} x {length}: {n / mine.min():.0f} tokens/s (median {n / np.median(mine):.0f})"
        if other:
            line += f", PyTorch {n / other[0].min():.0f} ({n / np.median(other[0]):.0f})"
            line += f": {other[0].min() / mine.min():.2f} x (medians {np.median(other[0]) / np.median(mine):.2f} x)"
        print(f"{line}; {mine.min() / limit:.2f} x the products with weights, "
              f"{mine.min() / (limit * (1 + share)):.2f} x those and attention's")  # fmt: skip


def whole_collection(model) -> None:
    """Prints a line a condition: questions a second of the engine, and of transformers one prompt at a time."""
    questions = load_bank()
    dev = [q for q in questions if q.split == "dev"]
    test = [q for q in questions if q.split == "test" and q.subject in ("animals", "cities", "writers")]
    theirs = theirs_by_transformers(model.arch)
    for shots in (0, 5):
        rows = model.tokenizer.encode([prompt.text for prompt in build_prompts(test, dev, shots)])
        collect(model, rows, progress=False)  # compiles
        start = time.perf_counter()
        collect(model, rows, progress=False)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, rows))
        line = f"{shots}-shot: {len(rows) / seconds:.1f} questions/s ({tokens / seconds:.0f} tokens of prompts/s)"
        if theirs:
            sample = [np.asarray([row], np.int32) for row in rows[:: len(rows) // 12]]
            theirs(sample[0])
            start = time.perf_counter()
            for one in sample:
                theirs(one)
            each = (time.perf_counter() - start) / len(sample)
            line += f", PyTorch one at a time {1 / each:.1f}: {each * len(rows) / seconds:.1f} x"
        print(line)


_COLD = """
import time; start = time.perf_counter()
from jaxscape import runtime
from pathlib import Path
runtime.configure(Path({cache!r}))
from jaxscape.collect import collect
from jaxscape.models import load_model
imported = time.perf_counter()
model = load_model({source!r})
loaded = time.perf_counter()
collect(model, ["Question: what is 1 + 1?\\nAnswer:"] * 2 + ["Answer:"], progress=False)
print(f"import {{imported - start:.1f}} + load {{loaded - imported:.1f}} + compile and run "
      f"{{time.perf_counter() - loaded:.1f}} = {{time.perf_counter() - start:.1f}} s")
"""


def cold_start() -> None:
    """Prints what a new process takes until the first states are there: nothing compiled yet, then everything."""
    with tempfile.TemporaryDirectory() as cache:
        for label in ("nothing compiled", "compilation cache"):
            code = _COLD.format(cache=cache, source=PACKAGED)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                  env={**os.environ, "JAX_PLATFORMS": "cpu"})  # fmt: skip
            print(f"cold start, {label}: {done.stdout.strip()}")


def main() -> None:
    """Prints all of it."""
    jax.config.update("jax_default_matmul_precision", "float32")
    model = load_model(PACKAGED)
    equal_batches(model)
    whole_collection(model)
    cold_start()


if __name__ == "__main__":
    main()
