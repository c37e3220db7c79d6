"""A process of eight host devices: a few training steps on several meshes. Prints one line of JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.finetune.on_meshes
"""

import dataclasses
import json

import jax
import numpy as np

from jaxscape.finetune.progress import memory_lines
from jaxscape.finetune.trainer import TrainingRun
from jaxscape.models.lora import LoraConfig
from jaxscape.models.pretrained import fold_adapters, load_pretrained, values_of
from jaxscape.models.sharding import MeshShape, make_mesh
from tests.finetune.runs import CONFIG, FULL, TINY, training_set

STEPS = 3
METHODS = {
    "lora": dataclasses.replace(CONFIG, lora=LoraConfig(4, 8.0), batch_size=8),
    "full": dataclasses.replace(FULL, batch_size=8, remat="blocks"),
}
MESHES = {"lora": (MeshShape(), MeshShape(8, 1, 1), MeshShape(2, 2, 2)),
          "full": (MeshShape(), MeshShape(1, 8, 1), MeshShape(2, 2, 2))}  # fmt: skip


def folded(model, run) -> dict:
    """How large each folded kernel is, and those that no longer lie where the kernel did."""
    trained = {path: np.asarray(value) for path, value in values_of(run.trainable).items()}
    merged, before = values_of(fold_adapters(model, run.config.lora, trained).params), values_of(model.params)
    kernels = [path for path in merged if path[-1] == "kernel"]
    moved = [path for path in kernels if not merged[path].sharding.is_equivalent_to(before[path].sharding, 3)]
    return {"folded": [float(np.linalg.norm(np.asarray(merged[path]))) for path in kernels], "moved": moved}


def main() -> None:
    """Takes the steps; says each one's loss and gradient norm, and what a device holds."""
    found = {}
    for method, meshes in MESHES.items():
        for shape in meshes:
            model = load_pretrained(TINY, make_mesh(*shape))
            run = TrainingRun(model, METHODS[method], training_set(16))
            metrics = [run.step(step) for step in range(STEPS)]
            parts = {"trained": run.trainable, "frozen": run.frozen, "optimizer": run.opt_state}
            found[f"{method} {shape}"] = {
                "loss": [float(m.loss) for m in metrics], "gradient_norm": [float(m.gradient_norm) for m in metrics],
                "memory": list(memory_lines(parts, None)),
                "on_a_device": {name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))
                                for name, part in parts.items()},
            }  # fmt: skip
            if method == "lora":
                found[f"{method} {shape}"] |= folded(model, run)
    print(json.dumps(found))


if __name__ == "__main__":
    with jax.default_matmul_precision("float32"):
        main()
