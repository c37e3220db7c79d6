"""For the model's tests: full float32 products on every device, as the launcher sets them, and one way to run rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxscape.data.batches import BatchShape, pack
from jaxscape.models.decoder import Prefix


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


@functools.partial(jax.jit, static_argnames=("graphdef", "sites"))
def _forward(graphdef, params, batch, prefix, *, sites, pool_from=None, row_lengths=None):
    model = nnx.merge(graphdef, params)
    out = model(batch, prefix, sites=sites, pool_from=pool_from, row_lengths=row_lengths)
    return out.states, model.logits(out.hidden).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _prefix(graphdef, params, batch, row_lengths=None):
    out = nnx.merge(graphdef, params)(batch, keep_keys=True, row_lengths=row_lengths)
    return Prefix(out.keys, out.values, batch.last[0] + 1)


@pytest.fixture(scope="session")
def run_rows():
    """``run_rows(model, rows)`` -> states [L, rows, D] at one site and logits [rows, V].

    Keywords: ``shape`` of the batch (default: no padding at all), ``shared`` tokens of a prefix run once and padded
    to ``room``, ``site`` (a tuple of sites gives a dict of states), ``pool_from``: place in each row, prefix left out.
    """

    def run(model, rows, *, shape=None, shared=0, room=None, site="residual", pool_from=None):
        prefix, lengths = None, np.array([len(row) for row in rows], np.int32)
        if shared:
            room = room or shared
            packed = pack([rows[0][:shared]], BatchShape(room, 1, room))
            prefix = _prefix(model.graphdef, model.params, packed, lengths[:1])
        rows = [row[shared:] for row in rows]
        shape = shape or BatchShape(sum(map(len, rows)), len(rows), max(map(len, rows)))
        batch, count = pack(rows, shape), len(rows)
        lengths = np.pad(lengths, (0, shape.rows - count))
        if pool_from is not None:
            pool_from = np.pad(np.asarray(pool_from, np.int32), (0, shape.rows - count))
        sites = (site,) if isinstance(site, str) else tuple(site)
        states, logits = _forward(model.graphdef, model.params, batch, prefix, sites=sites, pool_from=pool_from,
                                  row_lengths=lengths)
        states = {name: np.asarray(value)[:, :count] for name, value in states.items()}
        return states[site] if isinstance(site, str) else states, np.asarray(logits)[:count]

    return run
