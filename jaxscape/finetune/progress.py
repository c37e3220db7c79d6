"""What a user sees of a training run: what it holds in memory, how far it is, how fast it goes."""

import time
from collections import deque
from collections.abc import Iterable

import jax
from tqdm import tqdm

from jaxscape.models.memory import bytes_on_device, readable

_RECENT = 20  # steps that the bar's loss and rates are means of


def bytes_by_device(tree) -> dict[jax.Device, int]:
    """Bytes that a tree of arrays takes on each of this process's devices."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        size = bytes_on_device(leaf, leaf.sharding)
        for device in leaf.sharding.addressable_devices:
            held[device] = held.get(device, 0) + size
    return held


def memory_lines(parts: dict[str, object], temporary: int | None) -> Iterable[str]:
    """A line for each kind of device: what each of them holds.

    Args:
      parts: what it is -> a tree of arrays.
      temporary: bytes that a step needs beside them on a device; None: the backend does not tell.
    """
    held = {name: bytes_by_device(tree) for name, tree in parts.items()}
    devices = {device for of_part in held.values() for device in of_part}
    for kind in sorted({device.device_kind for device in devices}):
        like = [device for device in devices if device.device_kind == kind]
        most = {name: max(of_part.get(device, 0) for device in like) for name, of_part in held.items()}
        said = ", ".join(f"{readable(size)} {name}" for name, size in most.items())
        each = f"each of {len(like)} {kind} devices" if len(like) > 1 else f"the {kind} device"
        beside = "" if temporary is None else f"; a step needs {readable(temporary)} beside it"
        yield f"memory: {each} holds {said}{beside}"


class Progress:
    """The bar: loss, questions and tokens a second, time left; and the rate over the whole run."""

    def __init__(self, label: str, start: int, steps: int, batch_size: int):
        """Shows it.

        Args:
          label: name on the bar.
          start: step that the run goes on from.
          steps: of the whole run.
          batch_size: questions a step.
        """
        self._batch_size, self._losses, self._rates = batch_size, deque(maxlen=_RECENT), deque(maxlen=_RECENT)
        self._tokens, self._seconds, self._mark = 0, 0.0, time.perf_counter()
        self._bar = tqdm(total=steps, initial=start, desc=f"finetune {label}", unit="step", smoothing=0.05)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def go(self) -> None:
        """Starts the clock anew: what was done before is not a step's."""
        self._mark = time.perf_counter()

    def step(self, loss: float, tokens: int, compiled: bool) -> float | None:
        """Counts a step, from the last one or from ``go``.

        Args:
          loss: of the step.
          tokens: of its questions.
          compiled: its time counts for nothing, as a program was compiled for it.

        Returns:
          Tokens a second; None where the time counts for nothing.
        """
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._losses.append(loss)
        said = f"mean loss {sum(self._losses) / len(self._losses):.3f}"
        if not compiled:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
            self._rates.append((self._batch_size, tokens, seconds))
            questions, counts, times = map(sum, zip(*self._rates, strict=True))
            said += f", {questions / times:.1f} questions/s, {counts / times:.0f} tokens/s"
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update()
        return None if compiled else tokens / seconds

    def tokens_per_second(self) -> float | None:
        """Over all steps of this process; None where there was none that compiled nothing."""
        return self._tokens / self._seconds if self._seconds else None
