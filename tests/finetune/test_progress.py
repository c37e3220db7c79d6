import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscape.finetune import progress
from jaxscape.finetune.progress import Progress, bytes_by_device, memory_lines
from jaxscape.models.sharding import make_mesh


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass from one look at the clock to the next."""
    now, passing = [0.0], []

    def look():
        now[0] += passing.pop(0) if passing else 0.0
        return now[0]

    monkeypatch.setattr(progress.time, "perf_counter", look)
    return passing


def test_bytes_are_of_the_arrays_on_each_device():
    everywhere = NamedSharding(make_mesh(), PartitionSpec())
    tree = {"a": jax.device_put(jnp.zeros((100, 3)), everywhere), "b": jnp.zeros(7, jnp.bfloat16)}
    assert bytes_by_device(tree) == {jax.devices()[0]: 100 * 3 * 4 + 7 * 2}


def test_memory_is_a_line_for_a_kind_of_device():
    parts = {"trained": [jnp.zeros(1_000_000)], "frozen": [jnp.zeros(500_000), jnp.zeros(250_000)]}
    assert list(memory_lines(parts, 7_000_000)) == [
        "memory: the cpu device holds 4.0 MB trained, 3.0 MB frozen; a step needs 7.0 MB beside it"
    ]
    assert list(memory_lines({"trained": parts["trained"]}, None)) == ["memory: the cpu device holds 4.0 MB trained"]


def test_rates_leave_out_what_compiled_and_what_is_no_step(clock, capsys):
    with Progress("sft", 0, 4, 16) as bar:
        clock[:] = [30.0]
        assert bar.step(2.0, 400, compiled=True) is None and bar.tokens_per_second() is None
        clock[:] = [2.0]
        assert bar.step(1.0, 300, compiled=False) == 150.0
        clock[:] = [9.0]
        bar.go()  # an evaluation
        clock[:] = [4.0]
        assert bar.step(0.0, 300, compiled=False) == 75.0
        assert bar.tokens_per_second() == 100.0
    said = capsys.readouterr().err
    assert "finetune sft" in said and "3/4" in said and "mean loss 1.000, 5.3 questions/s, 100 tokens/s" in said
