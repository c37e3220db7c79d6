import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscape.finetune.checkpoints import (
    KEPT,
    STATE,
    Checkpoints,
    abstract,
    apart,
    discard_states,
    load_trained,
    steps_in,
)
from tests.finetune.runs import files_of_at_most


@functools.partial(jax.jit, donate_argnums=0)
def advance(tree):
    return jax.tree.map(lambda x: x * 1.01 + 1, tree)


def tree(step=0, size=1000):
    """What ``step`` steps leave."""
    found = {"trainable": {"a.b": jnp.arange(size, dtype=jnp.float32)}, "opt_state": {"0000": jnp.zeros(size)}}
    for _ in range(step):
        found = advance(found)
    return found


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), left, right))


def save(folder, steps, keep=9):
    with Checkpoints(folder, keep, tree()) as checkpoints:
        for step in steps:
            checkpoints.keep(step, apart(tree(step))["trainable"])
            checkpoints.save(step, apart(tree(step)))


def restored(folder):
    with Checkpoints(folder, 9, tree()) as checkpoints:
        return checkpoints.newest(), checkpoints.restore(abstract(tree()))


def test_what_is_saved_is_of_its_step_though_its_arrays_are_reused_at_once(tmp_path):
    now = tree(size=1 << 20)  # 8 MB: long enough under way for later steps to run into it
    with Checkpoints(tmp_path, 20, now) as checkpoints:
        for step in range(1, 9):
            now = advance(now)
            if step % 2 == 0:
                checkpoints.keep(step, apart(now["trainable"]))
                checkpoints.save(step, apart(now))
            now = advance(advance(advance(now)))
            expected = advance(tree(4 * (step - 1), 1 << 20)) if step % 2 == 0 else None
            if expected is not None:
                checkpoints.wait()
                assert checkpoints.newest() == step and same(checkpoints.restore(abstract(expected)), expected)
                assert np.array_equal(load_trained(tmp_path, step)["a", "b"], expected["trainable"]["a.b"])


def test_array_of_more_than_a_gigabyte_is_written(tmp_path):
    """Orbax refuses an array of more bytes than it may have under way at once."""
    large = {"a.b": jnp.zeros(262_500_000)}
    with Checkpoints(tmp_path, 1, large) as checkpoints:
        checkpoints.keep(1, large)
    assert steps_in(tmp_path / KEPT) == [1]
    shutil.rmtree(tmp_path)  # pytest would leave it


def test_newest_states_stay_and_all_that_is_kept(tmp_path):
    save(tmp_path, range(1, 7), keep=2)
    assert steps_in(tmp_path / STATE) == [5, 6] and steps_in(tmp_path / KEPT) == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(load_trained(tmp_path)["a", "b"], tree(6)["trainable"]["a.b"])
    discard_states(tmp_path)
    assert restored_steps(tmp_path) == ([], 6)
    discard_states(tmp_path)  # twice is once


def restored_steps(folder):
    return steps_in(folder / STATE), len(steps_in(folder / KEPT))


@pytest.mark.parametrize("half", ["unnamed", "emptied", "begun", "half deleted"])
def test_half_written_state_is_never_taken_up(half, tmp_path):
    save(tmp_path, [2])
    name = "1" if half == "half deleted" else "4.orbax-checkpoint-tmp"  # as Orbax calls it until it is whole
    torn = shutil.copytree(tmp_path / STATE / "2", tmp_path / STATE / name)
    for file in [path for path in torn.rglob("*") if path.is_file()]:
        if half == "emptied":
            file.write_bytes(file.read_bytes()[:7])
        elif half != "unnamed":
            file.unlink()
    newest, found = restored(tmp_path)
    assert newest == 2 and same(found, tree(2))
    save(tmp_path, [4])
    assert same(restored(tmp_path)[1], tree(4))
    assert not (tmp_path / STATE / "4.orbax-checkpoint-tmp").exists()


def damage(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.write_bytes(b"abc")


def test_damaged_state_is_named_with_what_deleting_it_leaves(tmp_path, raises_input_error):
    save(tmp_path, [2, 4, 6])
    damage(tmp_path / STATE / "6")
    with raises_input_error(str(tmp_path / STATE / "6"), "delete it", "same command", "goes on from step 4"):
        restored(tmp_path)
    damage(tmp_path / STATE / "4")
    with raises_input_error("goes on from step 2"):
        restored(tmp_path)
    damage(tmp_path / STATE / "2")
    with raises_input_error(str(tmp_path / STATE / "6"), "begins anew"):
        restored(tmp_path)


@pytest.mark.parametrize("file", ["ocdbt.process_0", "d", "manifest.ocdbt"])
def test_missing_part_of_a_state_is_noticed(file, tmp_path, raises_input_error):
    save(tmp_path, [2])
    path = tmp_path / STATE / "2" / "default" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with raises_input_error(str(tmp_path / STATE / "2"), "unreadable", "begins anew"):
        restored(tmp_path)


def test_missing_and_damaged_parameters_are_named(tmp_path, raises_input_error):
    with raises_input_error(str(tmp_path / KEPT), "has none", "delete", "run again"):
        load_trained(tmp_path)
    save(tmp_path, [1, 3])
    with raises_input_error("no trained parameters of step 2", "has steps 1, 3"):
        load_trained(tmp_path, 2)
    damage(tmp_path / KEPT / "3")
    with raises_input_error(str(tmp_path / KEPT / "3"), "unreadable", "run again"):
        load_trained(tmp_path)
    assert np.array_equal(load_trained(tmp_path, 1)["a", "b"], tree(1)["trainable"]["a.b"])


def test_state_that_cannot_be_written_leaves_the_last_one_and_says_so(tmp_path, raises_input_error, caplog):
    save(tmp_path, [2], keep=1)
    words = (str(tmp_path / STATE / "4"), "could not be written", "File too large", "last good state is of step 2",
             "make room and run the same command again")  # fmt: skip
    with caplog.at_level(logging.INFO), files_of_at_most(3000), raises_input_error(*words):  # noqa: SIM117
        with Checkpoints(tmp_path, 1, tree()) as checkpoints:
            checkpoints.save(4, apart(tree(4)))  # fails in its own thread
            checkpoints.save(6, apart(tree(6)))
    assert steps_in(tmp_path / STATE) == [2] and same(restored(tmp_path)[1], tree(2))
    save(tmp_path, [4], keep=1)
    assert steps_in(tmp_path / STATE) == [4] and same(restored(tmp_path)[1], tree(4))


def test_last_state_that_cannot_be_written_is_reported_too(tmp_path, raises_input_error):
    with files_of_at_most(3000), raises_input_error("could not be written", "there is no state yet"):  # noqa: SIM117
        with Checkpoints(tmp_path, 1, tree()) as checkpoints:
            checkpoints.save(4, apart(tree(4)))


def test_full_disk_is_called_so(tmp_path):
    with Checkpoints(tmp_path, 1, tree()) as checkpoints:
        error = checkpoints.cannot_write("log.csv", OSError(28, "No space left on device"))
    assert str(error).startswith("the disk is full: log.csv could not be written")


def test_state_is_whole_only_after_what_was_kept_before_it(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, 9, tree()) as checkpoints:
        order = []
        for kind, manager in checkpoints._managers.items():
            wait = manager.wait_until_finished
            monkeypatch.setattr(manager, "wait_until_finished", lambda k=kind, w=wait: (order.append(k), w()))
        checkpoints.keep(1, apart(tree(1))["trainable"])
        order.clear()
        checkpoints.save(2, apart(tree(2)))
        assert order[0] == KEPT
        checkpoints.keep(3, apart(tree(3))["trainable"])
        order.clear()
        checkpoints.save(3, apart(tree(3)))  # can be made from the state itself: nothing to wait for
        assert KEPT not in order
