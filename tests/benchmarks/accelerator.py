"""Collection and LoRA on an accelerator: a model of Llama 3 8B's shape, random weights, and the card's rate.

    python -m tests.benchmarks.accelerator            # one 80 GB GPU
    python -m tests.benchmarks.accelerator tiny       # the same steps with a tiny model, anywhere

Prompts are random tokens with the lengths of MMLU at 5-shot (the shots of a subject, then its questions; five
subjects stand for all 57).
Prints the measured matrix-product rate, the engine's rate as a share of it, and what all 14,042 questions would take;
the reference study reports 32 minutes for Llama 3 8B on an A100. Then steps of fine-tuning in the study's setting
(LoRA of rank 64 on all projections, 16 questions a step), as a share of the same rate.
"""

import dataclasses
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxscape.collect import collect
from jaxscape.models.architecture import Architecture
from jaxscape.models.decoder import Decoder
from jaxscape.models.families import from_hf_config
from jaxscape.models.pretrained import Pretrained
from jaxscape.models.sharding import make_mesh
from tests.benchmarks.limits import attention_flops, block_weights, median_seconds

# Tokens of MMLU's 5-shot prompts by the packaged tokenizer: shots and header of a subject (10th, 30th, 50th, 70th, 90th
# percentile of the subjects), and one question (of the questions).
SHOT_TOKENS, QUESTION_TOKENS = (330, 430, 520, 700, 1300), (50, 65, 85, 120, 220)
QUESTIONS, SUBJECTS = 14_042, 57
LLAMA3_8B = from_hf_config({
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
})  # fmt: skip
TINY = dataclasses.replace(LLAMA3_8B, vocab_size=512, width=128, num_layers=2, num_heads=2, num_kv_heads=1,
                           mlp_width=256)  # fmt: skip


def random_model(arch: Architecture) -> Pretrained:
    """Random weights in bfloat16, made where they stay."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(arch, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    mesh = make_mesh()
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def fill(number, leaf):
        draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype), out_shardings=everywhere)
        return draw(jax.random.key(number))

    leaves, tree = jax.tree.flatten(params)
    return Pretrained(arch, graphdef, jax.tree.unflatten(tree, [fill(i, leaf) for i, leaf in enumerate(leaves)]), None)


def matrix_rate(size: int) -> float:
    """Floating point operations a second of a square product in bfloat16."""
    x, product = jnp.ones((size, size), jnp.bfloat16), jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: product(x, x), 20)


def prompts(arch: Architecture, subjects: int, each: int) -> tuple[list[list[int]], SimpleNamespace]:
    """Random tokens with MMLU's lengths; and how many tokens and attention operations they are at least."""
    draw, rows, tokens, flops = np.random.default_rng(0), [], 0, 0.0
    for subject in range(subjects):
        shots = draw.integers(0, arch.vocab_size, SHOT_TOKENS[subject % 5]).tolist()
        tokens, flops = tokens + len(shots), flops + attention_flops(1, len(shots), arch)
        for question in range(each):
            own = draw.integers(0, arch.vocab_size, QUESTION_TOKENS[question % 5]).tolist()
            rows.append(shots + own)
            tokens, flops = tokens + len(own), flops + attention_flops(1, len(own), arch, len(shots))
    return rows, SimpleNamespace(tokens=tokens, attention=flops * arch.num_layers)


def lora_step_flops(arch: Architecture, tokens: int, rows: int, rank: int) -> float:
    """Operations that a LoRA step takes at least: of every kernel the product and the gradient of its input, of every
    adapter two products forward and four backward; the head likewise, of the last tokens; attention aside."""
    kv = arch.num_kv_heads * arch.head_dim
    sides = 4 * arch.width + 2 * (arch.width + kv) + 3 * (arch.width + arch.mlp_width)
    blocks = arch.num_layers * tokens * (4 * block_weights(arch) + 6 * rank * sides)
    return blocks + 4 * rows * arch.width * arch.vocab_size


def lora_steps(model: Pretrained, rate: float, tiny: bool) -> None:
    """Prints what a step takes, for each way to save memory."""
    from jaxscape.finetune.config import FinetuneConfig
    from jaxscape.finetune.dataset import TrainingSet
    from jaxscape.finetune.trainer import TrainingRun
    from jaxscape.models.lora import LoraConfig

    rank, rows, length = (4, 4, 16) if tiny else (64, 16, 128)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.arch.vocab_size, (rows, length)).tolist()
    data = TrainingSet(tokens, [1] * rows, np.ones(rows, np.float32), [str(number) for number in range(rows)])
    flops = lora_step_flops(model.arch, rows * length, rows, rank)
    for remat in ("elementwise", "blocks"):
        run = TrainingRun(model, FinetuneConfig(
            method="lora", lora=LoraConfig(rank, 16.0, 0.1), dtype="bfloat16", optimizer="adamw", learning_rate=1e-4,
            steps=100, batch_size=rows, accumulation=1, warmup_ratio=0.05, final_ratio=0.01, clip_norm=1.0,
            remat=remat, packing=False, evaluations=0, checkpoints=1, save_every=100, keep=1, seed=0,
        ), data)  # fmt: skip
        taken = iter(range(100))
        seconds = median_seconds(lambda run=run, taken=taken: run.step(next(taken)), 10)
        print(f"LoRA step, {rows} x {length} tokens, rank {rank}, remat {remat}: {seconds:.3f} s, "
              f"{rows * length / seconds:.0f} tokens/s, {flops / seconds / rate:.0%} of the matrix rate, "
              f"{(run.temporary_bytes(0) or 0) / 1e9:.1f} GB beside the parameters")  # fmt: skip


def main() -> None:
    """Prints the figures."""
    tiny = "tiny" in sys.argv[1:]
    arch, budget = (TINY, 256) if tiny else (LLAMA3_8B, 8192)
    rate = matrix_rate(512 if tiny else 8192)
    print(f"{jax.devices()[0].device_kind}: {rate / 1e12:.1f} TFLOP/s of bfloat16 products")
    model = random_model(arch)
    rows, work = prompts(arch, subjects=5, each=10 if tiny else QUESTIONS // SUBJECTS)
    collect(model, rows, token_budget=budget, progress=False)  # compiles
    start = time.perf_counter()
    collect(model, rows, token_budget=budget, progress=False)
    seconds = time.perf_counter() - start
    flops = 2 * block_weights(arch) * arch.num_layers * work.tokens + work.attention
    print(f"{len(rows)} questions of 5 subjects in {seconds:.1f} s: {work.tokens / seconds:.0f} tokens/s run, "
          f"{flops / seconds / 1e12:.1f} TFLOP/s, {flops / seconds / rate:.0%} of the matrix rate")  # fmt: skip
    print(f"all {QUESTIONS} questions: {seconds * QUESTIONS / len(rows) / 60:.1f} minutes, projected")
    lora_steps(model, rate, tiny)


if __name__ == "__main__":
    main()
