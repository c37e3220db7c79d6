"""What the machine can do: the rate of the matrix products that a model is made of."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of ``run``, after one run that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def block_product_seconds(tokens: int, arch, repeats: int = 20) -> float:
    """Seconds that the matrix products of one block take alone, on ``tokens`` tokens: the limit of a forward pass."""
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes = [(arch.width, heads), (arch.width, kv), (arch.width, kv), (heads, arch.width)]
    shapes += [(arch.width, arch.mlp_width)] * (2 if arch.gated else 1) + [(arch.mlp_width, arch.width)]
    product = jax.jit(jnp.matmul)
    total = 0.0
    for inputs, outputs in shapes:
        x, w = jnp.ones((tokens, inputs)), jnp.ones((inputs, outputs))
        total += median_seconds(lambda x=x, w=w: product(x, w), repeats)
    return total


def block_weights(arch) -> int:
    """Weights of one block that every token is multiplied with."""
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return arch.width * (2 * heads + 2 * kv + (3 if arch.gated else 2) * arch.mlp_width)


def attention_flops(rows: int, length: int, arch, prefix: int = 0) -> float:
    """Floating point operations of one block's two attention products: what causality leaves of them."""
    seen = length * (length + 1) / 2 + length * prefix
    return 4 * rows * seen * arch.num_heads * arch.head_dim
