"""The one error that means "the input is wrong, not the program"; what a run is ended by from outside; a full disk."""

_FULL = ("No space left", "quota exceeded")


class InputError(ValueError):
    """A mistake in a file, a flag or a config that the user gave; says what is wrong, where and what to do.

    The launcher prints it as one line and exits non-zero; any other exception keeps its traceback.
    """


def disk_is_full(error: Exception) -> bool:
    """Whether an error says so, be it the system's or a library's that passes it on."""
    return any(text in str(error) for text in _FULL)


class Terminated(KeyboardInterrupt):
    """The run was asked to end (SIGTERM) and ended in order: the same command goes on from there."""

    exit_code = 128 + 15  # as the shell reports a process that the signal ended
