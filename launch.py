"""Runs an experiment: absl flags -> one configuration in one folder.

    python launch.py                                             # the quickstart
    python launch.py --config=configs/mmlu10_smollm2.py --workdir=workdirs/mmlu10
    python launch.py --config.collect.site=input_norm --workdir=workdirs/norm --stages=collect,landscape
    python launch.py --dry_run --config.model.source=FOLDER --assume_kind=H100 --assume_devices=8
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import quickstart
from jaxscape.errors import InputError, Terminated, disk_is_full

_HERE = Path(__file__).resolve().parent
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment; default: workdirs/<name of the config>.")
_STAGES = flags.DEFINE_list("stages", ["collect", "finetune", "landscape", "report"], "What to run, if not yet done.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan: memory, batches, time. Nothing is loaded or written.")
_ASSUME_KIND = flags.DEFINE_string("assume_kind", None, "With --dry_run: plan for this device, say H100.")
_ASSUME_DEVICES = flags.DEFINE_integer("assume_devices", 1, "With --assume_kind: how many there are.")
_ASSUME_MEMORY = flags.DEFINE_float("assume_memory_gb", 0.0, "With --assume_kind: memory of one; 0: as it is sold.")
_TFLOPS = flags.DEFINE_float("device_tflops", 0.0, "With --dry_run: 10^12 operations a second of one device; 0: known.")


def main(argv: list[str]) -> None:
    """Runs the stages asked for."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; flags begin with --")
    started = time.perf_counter()
    logging.set_verbosity(logging.WARNING)  # JAX reports every accelerator it did not find
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # nor is PyTorch missed
    from jaxscape import runtime
    from jaxscape.experiment import Experiment
    from jaxscape.models.sources import cache_folder
    from jaxscape.workspace import Workspace

    config = flags.FLAGS.config
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workspace = Workspace(Path(_WORKDIR.value or Path("workdirs") / name), config.to_dict())
    runtime.configure(cache_folder() / "compiled")
    experiment = Experiment(config, workspace)
    if _DRY_RUN.value:
        experiment.limit(_STAGES.value)
        print(_plan(experiment))
        return
    experiment.checkpoint()  # a mistaken path must not claim the folder for its configuration
    with workspace.locked():
        experiment.run(_STAGES.value)
    print(f"done in {time.perf_counter() - started:.0f} s, workdir {workspace.root}")


def _check_plan_flags() -> None:
    """Refuses flags that would be ignored."""
    for flag, needed in ((_ASSUME_KIND, _DRY_RUN), (_TFLOPS, _DRY_RUN), (_ASSUME_DEVICES, _ASSUME_KIND),
                         (_ASSUME_MEMORY, _ASSUME_KIND)):  # fmt: skip
        if flag.present and not needed.value:
            raise InputError(f"--{flag.name} goes with --{needed.name}")
    if _TFLOPS.value < 0:
        raise InputError(f"--device_tflops={_TFLOPS.value}: must be positive")


def _plan(experiment) -> str:
    from jaxscape import dry_run
    from jaxscape.models.mesh import local_devices

    if _ASSUME_KIND.value:
        devices = dry_run.assumed_devices(_ASSUME_KIND.value, _ASSUME_DEVICES.value, _ASSUME_MEMORY.value)
    else:
        devices = local_devices()
    return dry_run.describe(experiment, devices, _TFLOPS.value)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in them ends with one line."""
    default = str(_HERE / "configs" / "quickstart.py")
    try:
        config_flags.DEFINE_config_file("config", default, "The experiment; --config.FIELD=VALUE changes it.")
        rest = flags.FLAGS(argv)
        _check_plan_flags()
        _check_fields(flags.FLAGS.config, quickstart.get_config())  # a file not loaded says so only when it is used
        return rest
    except (KeyError, AttributeError) as error:
        said = str(error.args[0]).replace("\\n", ". ").replace("\\", "").replace("'", "").strip('"')
        _fail(f"flags: the configuration has no field {said}; see the file that --config names")
    except (flags.Error, InputError, TypeError, ValueError, OSError) as error:
        _fail(f"flags: {error}")
    except Exception as error:  # whatever the user's file raises
        _fail(f"flags: the file that --config names does not load: {type(error).__name__}: {error}")


def _check_fields(config: ConfigDict, known: ConfigDict, path: str = "config") -> None:
    """Refuses a file with fields other than the quickstart's, or values of another type."""
    for name in sorted({*config, *known}):
        field = f"{path}.{name}"
        if name not in known or name not in config:
            raise InputError(f"{field}: {'no such field' if name in config else 'missing'}; see configs/quickstart.py")
        if isinstance(known[name], ConfigDict) and isinstance(config[name], ConfigDict):
            _check_fields(config[name], known[name], field)
        kind = type(known[name])
        if type(config[name]) not in {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,)):
            raise InputError(f"{field} = {config[name]!r}: must be of type {kind.__name__}")


def _fail(message: str) -> None:
    print(f"jaxscape: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(1)


def _keep_interrupts(ignored) -> None:
    """Sends an interruption again that hit where Python ignores exceptions.

    JAX runs a callback at every garbage collection; a Ctrl-C during a long compilation is often raised there, and lost.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(ignored.exc_type, Terminated) else signal.SIGINT
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(ignored)


def _terminate(*_) -> None:
    raise Terminated


def _run(argv: list[str]) -> None:
    sys.unraisablehook = _keep_interrupts
    if (before := signal.getsignal(signal.SIGTERM)) == signal.SIG_DFL:  # what is ignored stays ignored
        signal.signal(signal.SIGTERM, _terminate)
    try:
        main(argv)
    except KeyboardInterrupt as stop:
        print("\njaxscape: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Terminated) else 130)
    except InputError as error:
        _fail(error)
    except Exception as error:
        if not disk_is_full(error):
            raise
        _fail(f"the disk is full ({error}); make room and run the same command again: what is finished is kept")
    finally:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    app.run(_run, flags_parser=_parse)
