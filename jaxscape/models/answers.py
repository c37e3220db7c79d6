"""What a model answers: the letter it gives most weight, and the token it would write."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def letter_table(spellings: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each letter's spellings as int32 [C, W]; a letter with fewer repeats its first.

    Args:
      spellings: for each letter its tokens, with and without the leading blank (``PromptTokenizer.letter_ids``).
    """
    width = max(map(len, spellings))
    return np.array([[*ids, *[ids[0]] * (width - len(ids))] for ids in spellings], np.int32)


def letter_logits(logits: jax.Array, table: jax.Array) -> jax.Array:
    """The logit of each letter's likelier spelling: [B, V] and [C, W] -> [B, C].

    The constrained prediction is the highest of them, as in the reference study (arXiv 2409.03662).
    """
    return jnp.max(logits[:, table], axis=-1)


def free_answers(tokens: np.ndarray, texts: Mapping[int, str], letters: str = "ABCD") -> np.ndarray:
    """The letter that the likeliest token is once it is decoded and stripped: int [N], -1 where it is none.

    Args:
      tokens: int [N].
      texts: of each token among them.
      letters: of the answers.
    """
    place = {letter: number for number, letter in enumerate(letters)}
    return np.array([place.get(texts[int(token)].strip(), -1) for token in tokens], int)
