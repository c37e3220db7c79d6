"""A checkpoint on disk -> a decoder ready to run, with its tokenizer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxscape.errors import InputError
from jaxscape.models import sharding, tokenizer
from jaxscape.models.architecture import Architecture
from jaxscape.models.decoder import abstract_decoder
from jaxscape.models.families import from_hf_config
from jaxscape.models.gguf import GgufFile
from jaxscape.models.lora import LoraConfig, init_adapter, merge_adapter
from jaxscape.models.tensor_names import ParamPath
from jaxscape.models.weights import SafetensorsFolder, TensorFile, load_params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Pretrained(NamedTuple):
    """A decoder and its tokenizer.

    Attributes:
      arch: shape and constants.
      graphdef: static half of the split ``Decoder``.
      params: its state, on the mesh.
      tokenizer: of the checkpoint.
    """

    arch: Architecture
    graphdef: nnx.GraphDef
    params: nnx.State
    tokenizer: tokenizer.PromptTokenizer


def load_pretrained(path: Path, mesh: Mesh, dtype: str = "float32") -> Pretrained:
    """Loads a hub-format folder or a GGUF file.

    Weights without a tokenizer that can be read load too: token ids run, and the first text raises what is wrong.

    Args:
      path: see ``sources.resolve``.
      mesh: where the parameters go.
      dtype: of the parameters and the computation, a name in ``DTYPES``.

    Raises:
      InputError: anything about the configuration or the weights is unreadable or not implemented.
    """
    if dtype not in DTYPES:
        raise InputError(f"config.model.dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    file, arch, read_tokenizer = _open(path)
    try:
        tokens = read_tokenizer()
    except InputError as error:
        tokens = tokenizer.unreadable(error)
    graphdef, abstract = abstract_decoder(arch, dtype=DTYPES[dtype])
    wanted = {name: leaf.get_value() for name, leaf in abstract.flat_state()}
    arrays = load_params(file, arch, wanted, mesh)
    return Pretrained(arch, graphdef, with_values(abstract, arrays), tokens)


def read_architecture(path: Path) -> Architecture:
    """What the decoder of a folder or a GGUF file looks like, without its weights.

    Raises:
      InputError: the configuration is unreadable or not implemented.
    """
    return _read_folder(path) if path.is_dir() else GgufFile(path).architecture()


def _open(path: Path) -> tuple[TensorFile, Architecture, Callable[[], tokenizer.PromptTokenizer]]:
    """(tensors, architecture, what reads the tokenizer) of a checkpoint."""
    if path.is_dir():
        arch = _read_folder(path)
        return SafetensorsFolder(path), arch, lambda: tokenizer.from_folder(path)
    file = GgufFile(path)
    return file, file.architecture(), lambda: tokenizer.from_gguf(file)


def _read_folder(path: Path) -> Architecture:
    return from_hf_config(_read_config(path / "config.json"), str(path / "config.json"))


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; config.model.source wants a hub-format folder") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a configuration (no JSON object); fetch it again")
    return config


def with_values(state: nnx.State, values: Mapping[ParamPath, jax.Array]) -> nnx.State:
    """The same state with other arrays, by path."""
    return nnx.State.from_flat_path({path: leaf.replace(values[path]) for path, leaf in state.flat_state()})


def values_of(state: nnx.State) -> dict[ParamPath, jax.Array]:
    """Parameter path -> array."""
    return {path: leaf.get_value() for path, leaf in state.flat_state()}


def attach_adapters(model: Pretrained, lora: LoraConfig, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, state) of the decoder with fresh adapters: the same function until they are trained.

    Args:
      model: the decoder; its arrays are shared, not copied.
      lora: which adapters.
      seed: of their random halves.

    Raises:
      InputError: the decoder has none of the configuration's targets.
    """
    values = values_of(model.params)
    embedding = values[("embedding",)]
    graphdef, abstract = abstract_decoder(model.arch, dtype=embedding.dtype, lora=lora)
    if len(abstract.flat_state()) == len(values):
        raise InputError(f"LoRA targets {', '.join(lora.targets)}: {model.arch.family} has none of these projections")
    key, mesh = jax.random.key(seed), embedding.sharding.mesh
    for number, (path, leaf) in enumerate(abstract.flat_state()):
        if path not in values:
            kernel = values[(*path[:-2], "kernel")]
            first = init_adapter(path[-1], leaf.get_value().shape, jax.random.fold_in(key, number), kernel)
            values[path] = sharding.place(path, first, mesh)
    return graphdef, with_values(abstract, values)


def fold_adapters(
    model: Pretrained, lora: LoraConfig, adapters: Mapping[ParamPath, np.ndarray], *, donate: bool = False
) -> Pretrained:
    """The decoder with trained adapters added into its kernels.

    Args:
      model: the decoder.
      lora: the adapters' configuration.
      adapters: path (..., "adapter", "a", "b" or "m") -> array.
      donate: give up the kernels of ``model`` that change, instead of holding both.
    """
    values = values_of(model.params)
    mesh = values[("embedding",)].sharding.mesh
    for path in [path for path in adapters if path[-1] == "a"]:
        parts = {part: (*path[:-1], part) for part in ("a", "b", "m")}
        adapter = {part: sharding.place(name, adapters[name], mesh) for part, name in parts.items() if name in adapters}
        kernel = (*path[:-2], "kernel")
        values[kernel] = merge_adapter(values[kernel], adapter, lora.scale, donate=donate)
    return model._replace(params=with_values(model.params, values))
