"""A process of eight host devices: every family on several meshes, and what XLA made of it. Prints one line of JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.on_meshes
"""

import json
import math
import operator
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxscape.data.batches import BatchShape, TokenBatch, pack
from jaxscape.models.architecture import Architecture, LayerKind, Rotary
from jaxscape.models.decoder import SITES, Decoder, Prefix, abstract_decoder
from jaxscape.models.sharding import MeshShape, lanes_sharding, make_mesh, place

FREQUENCIES = (1.0, 0.3, 0.1, 0.03)
TURN = LayerKind(None, Rotary(FREQUENCIES))
BASE = dict(
    vocab_size=64, width=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8, mlp_width=64, norm_eps=1e-5,
    tie_embeddings=False, max_positions=64, kinds=(TURN,),
)  # fmt: skip
LONG = Rotary(FREQUENCIES, 1.1, tuple(f / 4 for f in FREQUENCIES), 20)
FAMILIES: Mapping[str, Mapping] = {
    "llama": {"num_kv_heads": 8},
    "llama, heads that no axis divides": {"num_heads": 9, "num_kv_heads": 3},
    "mistral": {"kinds": (LayerKind(7, Rotary(FREQUENCIES)),)},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": "head", "head_dim": 16, "kinds": (LayerKind(None, Rotary(FREQUENCIES * 2)),)},
    "gemma2": {"kinds": (LayerKind(7, Rotary(FREQUENCIES)), TURN), "layer_kinds": (0, 1, 0), "post_norms": True,
               "norm_offset": 1.0, "activation": "gelu_tanh", "attention_softcap": 5.0, "final_softcap": 3.0,
               "embedding_scale": 32**0.5, "tie_embeddings": True},
    "gemma3": {"kinds": (LayerKind(7, Rotary(FREQUENCIES)), LayerKind(None, Rotary((0.5, 0.2, 0.1, 0.02)))),
               "layer_kinds": (0, 0, 1), "post_norms": True, "norm_offset": 1.0, "activation": "gelu_tanh",
               "qk_norm": "head", "attention_scale": 0.2, "embedding_scale": 32**0.5, "tie_embeddings": True},
    "phi3": {"kinds": (LayerKind(None, LONG),), "num_kv_heads": 8},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": "width"},
    "smollm3": {"kinds": (TURN, LayerKind()), "layer_kinds": (0, 0, 1)},
    "gpt_neox": {"kinds": (LayerKind(None, Rotary(FREQUENCIES[:2])),), "num_kv_heads": 8, "norm": "layer",
                 "parallel": True, "gated": False, "activation": "gelu", "qkv_bias": True, "out_bias": True,
                 "mlp_bias": True},
    "gpt2": {"kinds": (LayerKind(),), "num_kv_heads": 8, "norm": "layer", "gated": False, "activation": "gelu_tanh",
             "qkv_bias": True, "out_bias": True, "mlp_bias": True, "learned_positions": 64, "tie_embeddings": True},
}  # fmt: skip
SHAPE, SHARED = BatchShape(64, 3, 24), 11


class Outcome(NamedTuple):
    """What leaves a lane: states by site, and logits."""

    states: dict
    logits: jax.Array


def architecture(family: str) -> Architecture:
    """A tiny one."""
    return Architecture(**(BASE | FAMILIES[family]), family=family.split(",")[0])


def meshes(arch: Architecture) -> list[MeshShape]:
    """What the family runs on, beside one device: three meshes of eight devices."""
    fit = arch.num_kv_heads % 8 == 0
    return [MeshShape(1, 8, 1), MeshShape(1, 1, 8) if fit else MeshShape(1, 2, 4), MeshShape(2, 2, 2)]


def random_values(arch: Architecture) -> tuple[nnx.GraphDef, nnx.State, dict[tuple, np.ndarray]]:
    """A decoder's static half, its abstract state, and values far from how it starts."""
    graphdef, abstract = abstract_decoder(arch)
    rng, values = np.random.default_rng(0), {}
    for path, leaf in abstract.flat_state():
        shape = leaf.get_value().shape
        spread = shape[-2] ** -0.5 if path[-1] == "kernel" else 0.3
        start = 1 - arch.norm_offset if path[-1] == "scale" else 0
        values[path] = (start + spread * rng.normal(size=shape)).astype(np.float32)
    return graphdef, abstract, values


def batches() -> tuple[TokenBatch, TokenBatch]:
    """Eight lanes of prefixes of one row, and of rows after them."""
    rng = np.random.default_rng(1)
    rows = [[rng.integers(1, 64, n).tolist() for n in rng.integers(1, 25, 3)] for _ in range(8)]
    shared = [[rng.integers(1, 64, n).tolist()] for n in rng.integers(3, SHARED + 1, 8)]
    rows = [pack(lane, SHAPE) if sum(map(len, lane)) <= 64 else pack(lane[:2], SHAPE) for lane in rows]
    shared = [pack(lane, BatchShape(SHARED, 1, SHARED)) for lane in shared]
    return tuple(jax.tree.map(lambda *leaves: np.stack(leaves), *lanes) for lanes in (shared, rows))


def run_lane(model: Decoder, shared: TokenBatch, rows: TokenBatch, sites, sharding=None) -> Outcome:
    """A prefix and the rows after it; LongRoPE's long side, whatever their lengths."""
    lengths = jnp.full(SHAPE.rows, 30)
    first = model(shared, keep_keys=True, row_lengths=lengths[:1])
    out = model(rows, Prefix(first.keys, first.values, shared.last[0] + 1), sites=sites, row_lengths=lengths)
    return Outcome(out.states, model.logits(out.hidden))


def on_mesh(arch: Architecture, shape: MeshShape, parts, lanes: tuple[TokenBatch, TokenBatch]):
    """Outcomes of as many lanes as the mesh has, and the compiled program."""
    graphdef, abstract, values = parts
    mesh = make_mesh(*shape)
    state = nnx.State.from_flat_path({p: v.replace(place(p, values[p], mesh)) for p, v in abstract.flat_state()})
    lanes = jax.device_put(jax.tree.map(lambda x: x[: shape.lanes], lanes), lanes_sharding(mesh))
    sites = sites_of(arch)
    run = jax.jit(lambda state, lanes: jax.vmap(lambda *b: run_lane(nnx.merge(graphdef, state), *b, sites))(*lanes))
    compiled = run.lower(state, lanes).compile()
    return jax.device_get(compiled(state, lanes)), compiled.as_text()


def sites_of(arch: Architecture) -> tuple[str, ...]:
    """All that the family has."""
    return SITES if arch.pre_norms else ("residual", "final_norm")


def collectives(text: str) -> list[dict]:
    """Kind, largest result in numbers, and whether in a loop, of every collective of a compiled program."""
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    calls: dict[str, set[str]] = {}
    found, inside = [], ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = head[2]
        calls.setdefault(inside, set()).update(re.findall(r"(?:calls|to_apply|computations?)=\{?%([\w.\-]+)", line))
        if kind := re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", line):
            results = re.findall(r"\w+\[([\d,]*)\]", kind[1])
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in results]
            found.append({"kind": kind[2], "size": max(sizes), "in": inside})
    reached, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += calls.get(name, ())
    return [{"kind": c["kind"], "size": c["size"], "looped": c["in"] in reached} for c in found]


def worst(found: Outcome, expected: Outcome) -> float:
    """Largest error of a vector over its length."""
    def error(a, b):
        return float(np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))

    return max(jax.tree.leaves(jax.tree.map(error, found, expected)))


def report(family: str) -> dict:
    """What a family's meshes gave, by mesh."""
    arch, lanes = architecture(family), batches()
    parts = random_values(arch)
    state = nnx.State.from_flat_path({p: v.replace(jnp.asarray(parts[2][p])) for p, v in parts[1].flat_state()})
    alone = jax.jit(lambda state, *b: run_lane(nnx.merge(parts[0], state), *b, sites_of(arch)))
    one_by_one = (jax.tree.map(operator.itemgetter(i), lanes) for i in range(8))
    expected = [jax.device_get(alone(state, *lane)) for lane in one_by_one]
    expected = jax.tree.map(lambda *lane: np.stack(lane), *expected)
    found = {}
    for shape in meshes(arch):
        outcome, text = on_mesh(arch, shape, parts, lanes)
        found[",".join(map(str, shape))] = {
            "error": worst(outcome, jax.tree.map(operator.itemgetter(slice(shape.lanes)), expected)),
            "spread": float(np.std(outcome.logits)),
            "collectives": collectives(text),
        }
    return found


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    with jax.default_matmul_precision("float32"):
        print(json.dumps({family: report(family) for family in FAMILIES}))
