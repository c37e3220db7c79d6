"""SIGINT and SIGTERM as wishes that a loop grants between two steps."""

import os
import signal
import threading

from jaxscape.errors import Terminated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is noted only; a second one does what it did before.

    One that came when nothing was left to be stopped ends the program on the way out.

    Signals that are ignored stay ignored (a job under nohup), and other threads than the main one change nothing.

    Attributes:
      received: the signal's number; None as long as there was none.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            # None: a handler that is not Python's, and could not be put back
            self._before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, kind, *_) -> None:
        self._put_back()
        if kind is None and self.received is not None:
            raise self.error()

    def error(self) -> KeyboardInterrupt:
        """What to raise for the signal that was received."""
        return Terminated() if self.received == signal.SIGTERM else KeyboardInterrupt()

    def _note(self, number, _) -> None:
        self.received = number
        self._put_back()
        # not print: the signal may have come in the middle of one
        os.write(2, b"\ninterrupted: the step is finished and its state saved first; once more to stop at once\n")

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
