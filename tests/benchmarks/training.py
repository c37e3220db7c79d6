"""A fine-tuning step on the CPU: beside transformers + PEFT on PyTorch, and beside the matrix products it is made of.

    python -m tests.benchmarks.training

SmolLM2-135M's shape, float32, 16 questions of 100 tokens, AdamW; LoRA of rank 64 on all seven projections with the
study's dropout (0.1) and without, and all weights. Every program runs in a process of its own, so that its peak memory
is its own, and they take their steps in turns. Where torch or peft is not installed their columns are empty.
"""

import importlib.util
import math
import os
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.models.sources import resolve
from tests.benchmarks.limits import median_seconds

ROWS, LENGTH, RANK, ALPHA = 16, 100, 64, 16.0
ROUNDS = 6
CASES = {"LoRA, dropout 0.1": ("lora", 0.1), "LoRA, no dropout": ("lora", 0.0), "all weights": ("full", 0.0)}


def ours(method: str, dropout: float):
    """``step()`` of jaxscape on the packaged model."""
    from jaxscape.finetune.config import FinetuneConfig
    from jaxscape.finetune.dataset import TrainingSet
    from jaxscape.finetune.trainer import TrainingRun
    from jaxscape.models import load_model
    from jaxscape.models.lora import LoraConfig

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49000, (ROWS, LENGTH)).tolist()
    data = TrainingSet(tokens, rng.integers(0, 49000, ROWS), np.ones(ROWS, np.float32), [str(n) for n in range(ROWS)])
    config = FinetuneConfig(
        method=method, lora=LoraConfig(RANK, ALPHA, dropout), dtype="float32", optimizer="adamw", learning_rate=1e-4,
        steps=100, batch_size=ROWS, accumulation=1, warmup_ratio=0.05, final_ratio=0.01, clip_norm=1.0,
        remat="elementwise", packing=False, evaluations=0, checkpoints=1, save_every=100, keep=1, seed=0,
    )  # fmt: skip
    run = TrainingRun(load_model("smollm2-135m-instruct"), config, data)
    taken = iter(range(100))
    return lambda: float(run.step(next(taken)).loss)


def theirs(method: str, dropout: float):
    """``step()`` of transformers on PyTorch, with PEFT's adapters for LoRA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True))  # fmt: skip
    if method == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    tokens = torch.randint(0, 49000, (ROWS, LENGTH))
    labels = torch.full((ROWS, LENGTH), -100)
    labels[:, -1] = tokens[:, -1]

    def step() -> float:
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def serve(who: str, case: str) -> None:
    """Takes a step for every line of the standard input; says how long it took and the peak memory so far."""
    step = {"ours": ours, "theirs": theirs}[who](*CASES[case])
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)


def product_seconds(method: str, tokens: int) -> float:
    """Seconds that the matrix products of a step take alone, each measured by itself.

    Of every kernel: forward, and the gradient of its input; its own gradient where all weights are trained. Of every
    adapter: two products forward, and the gradients of both halves and of their inputs.
    """
    width, kv, wide = 576, 192, 1536
    kernels = {(width, width): 2, (width, kv): 2, (width, wide): 2, (wide, width): 1}
    rng = np.random.default_rng(0)

    def seconds(a: tuple, b: tuple, sides: tuple) -> float:
        x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (a, b))
        product = jax.jit(lambda x, y: jax.lax.dot_general(x, y, (sides, ((), ()))))
        return median_seconds(lambda: product(x, y), 10)

    total = 0.0
    for (inputs, outputs), count in kernels.items():
        here = seconds((tokens, inputs), (inputs, outputs), ((1,), (0,)))
        here += seconds((tokens, outputs), (inputs, outputs), ((1,), (1,)))
        if method == "full":
            here += seconds((tokens, inputs), (tokens, outputs), ((0,), (0,)))
        else:
            for side in (inputs, outputs):  # A is [rank, inputs], B [rank, outputs]
                here += seconds((tokens, side), (RANK, side), ((1,), (1,)))  # x A^T; g B^T
                here += seconds((tokens, RANK), (RANK, side), ((1,), (0,)))  # h B; (g B^T) A
                here += seconds((tokens, RANK), (tokens, side), ((0,), (0,)))  # gradients of A and of B
        total += count * here
    return 30 * total


def _start(who: str, case: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.benchmarks.training", who, case]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def main() -> None:
    """Prints one line a case."""
    resolve("smollm2-135m-instruct")  # fetched here, as what it says is not a worker's answer
    known = all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))
    print(f"{ROWS} x {LENGTH} tokens; seconds a step (best of {ROUNDS}), tokens/s, peak memory of the process")
    for case, (method, _) in CASES.items():
        limit = product_seconds(method, ROWS * LENGTH)
        workers = {who: _start(who, case) for who in (("ours", "theirs") if known else ("ours",))}
        best, peak = dict.fromkeys(workers, math.inf), dict.fromkeys(workers, 0.0)
        for number in range(ROUNDS + 1):
            for who, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds, peak[who] = map(float, worker.stdout.readline().split())
                if number:  # the first one compiles, or touches its memory for the first time
                    best[who] = min(best[who], seconds)
        for worker in workers.values():
            worker.communicate()
        print(f"{case}: the products alone {limit:.2f} s")
        for who, name in (("ours", "jaxscape"), ("theirs", "PyTorch")):
            if who in best:
                print(f"  {name}: {best[who]:.2f} s, {ROWS * LENGTH / best[who]:.0f} tokens/s, {peak[who]:.1f} GB, "
                      f"{best[who] / limit:.2f} x the products", flush=True)  # fmt: skip
        if known:
            speed, memory = best["theirs"] / best["ours"], peak["ours"] / peak["theirs"]
            print(f"  {speed:.2f} x the speed, {memory:.2f} of the memory")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(*sys.argv[1:])
    else:
        main()
