"""The process's JAX: compilation cache, matmul precision, what runs where."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxscape.errors import InputError

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "tokenizers", "gguf", "numpy",
)
# JAX takes three quarters of a GPU's memory unless told; ``models.mesh`` counts on nine tenths.
_GPU_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def configure(cache: Path, matmul_precision: str = "float32") -> None:
    """Sets up JAX once, before its first array.

    Args:
      cache: folder of the compilation cache; compiled programs are kept there between runs.
      matmul_precision: of every product that does not state its own ("float32": no TF32 by accident).

    Raises:
      InputError: the folder cannot be made.
    """
    if not any(name in os.environ for name in _GPU_MEMORY):
        os.environ[_GPU_MEMORY[0]] = "0.9"
    import jax

    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{cache}: cannot make this folder ({error.strerror}); set JAXSCAPE_CACHE") from None
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # a dozen shapes of 0.3 s each add up
    jax.config.update("jax_default_matmul_precision", matmul_precision)


def choose_mesh(arch, config, prompts: Mapping[str, Sequence], training: Sequence[str] = (), finetuning=None,
                devices=None):
    """The mesh of an experiment, by memory: a ``models.mesh.MeshChoice``.

    Its prompts are not tokenised yet, so that the batches are an estimate from their texts.

    Args:
      arch: the model's ``Architecture``.
      config: ``mesh`` has the axes that are set (0: to be chosen), ``collect`` the token budget.
      prompts: ``Prompt``s of each condition.
      training: texts of fine-tuning; () where there is none.
      finetuning: its ``FinetuneConfig``.
      devices: ``models.mesh.Devices``; None: those that JAX has.

    Raises:
      InputError: the model doesn't fit, or the axes that are set don't fit the devices.
    """
    from jaxscape.models import memory, mesh
    from jaxscape.models.pretrained import DTYPES
    from jaxscape.models.sharding import MeshShape

    if config.model.dtype not in DTYPES:
        raise InputError(f"config.model.dtype {config.model.dtype!r}: choose from {', '.join(DTYPES)}")
    everything = [prompt for of_condition in prompts.values() for prompt in of_condition]
    texts, prefixes = [prompt.text for prompt in everything], [prompt.prefix for prompt in everything]
    work, step = memory.rough_work(texts, prefixes, config.collect.token_budget, arch), None
    if training:
        longest = memory.rough_tokens(training, arch)
        step = training_step(arch, finetuning, longest, longest)
    needs = mesh.Needs(arch, DTYPES[config.model.dtype], work, step)
    return mesh.choose_shape(needs, devices or mesh.local_devices(), MeshShape(**config.mesh))


def training_step(arch, finetuning, longest: int, mean: float):
    """What a step of fine-tuning asks of the devices: a ``models.memory.Training``.

    Args:
      arch: the model's ``Architecture``.
      finetuning: ``FinetuneConfig``.
      longest: tokens of the longest question.
      mean: tokens of a question of the fullest step.
    """
    import jax

    from jaxscape.finetune.optimizers import optimizer
    from jaxscape.models import memory

    adapters = finetuning.lora if finetuning.method == "lora" else None
    trained = memory.trained_shapes(arch, adapters)
    state = jax.tree.leaves(jax.eval_shape(optimizer(finetuning).init, trained))
    rows = -(-finetuning.batch_size // finetuning.accumulation)
    return memory.Training(
        round(rows * mean), rows, longest, adapters, finetuning.remat, finetuning.accumulation,
        sum(leaf.size for leaf in state) / sum(leaf.size for leaf in trained.values()),
    )  # fmt: skip


def describe() -> dict[str, str]:
    """Versions and devices, for manifests and the report."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    devices = jax.devices()
    return {"python": platform.python_version(), **versions, "devices": f"{len(devices)} x {devices[0].device_kind}"}
