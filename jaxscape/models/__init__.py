"""Flax ports of causal language models: one decoder, shaped by the checkpoint's own configuration."""

import os


def load_model(source, dtype: str = "float32", mesh=None):
    """Loads a checkpoint, ready for ``collect.collect``.

    Args:
      source: "smollm2-135m-instruct" (packaged), a hub-format folder, a GGUF file, or "hub:org/name[@revision]", of a
        family in README.md. A folder without a tokenizer takes token ids only.
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      mesh: where the parameters go, see ``sharding.make_mesh``; None: one device.

    Returns:
      A ``pretrained.Pretrained``: architecture, decoder, parameters, tokenizer.

    Raises:
      InputError: nothing is there, it can't be fetched, or anything about it is unreadable or not implemented.
    """
    from jaxscape.models import pretrained, sharding, sources  # JAX and Flax are not needed to name a model

    path = sources.resolve(os.fspath(source))
    return pretrained.load_pretrained(path, sharding.make_mesh() if mesh is None else mesh, dtype)
