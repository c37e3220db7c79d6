import os
import subprocess
import sys

import jax
import pytest

from jaxscape import runtime
from jaxscape.checking import finetune_config
from jaxscape.data.prompts import Prompt
from jaxscape.models.mesh import Devices
from tests.launching import ROOT, environment, small_config
from tests.models.on_meshes import architecture


def run(code: str, *arguments: str, env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env=env)  # fmt: skip


def test_configure_sets_up_cache_precision_and_memory(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from jaxscape import runtime; runtime.configure(Path(sys.argv[1]))\n"
        "import jax, jax.numpy as jnp\n"
        "print(jax.config.jax_default_matmul_precision, jax.config.jax_compilation_cache_dir)\n"
        "print(os.environ['XLA_CLIENT_MEM_FRACTION'])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))"
    )
    cache = tmp_path / "a" / "compiled"
    done = run(code, str(cache), env=environment(tmp_path))
    assert done.communicate()[0].split() == ["float32", str(cache), "0.9"]
    assert list(cache.iterdir())


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_memory_that_is_set_stays(name, tmp_path, monkeypatch):
    for other in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "0.5")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    runtime.configure(tmp_path / "compiled")
    assert {key: value for key, value in os.environ.items() if "MEM_FRACTION" in key} == {name: "0.5"}


def test_cache_that_cannot_be_made_is_named(tmp_path, raises_input_error):
    (tmp_path / "file").write_text("")
    with raises_input_error(str(tmp_path / "file"), "JAXSCAPE_CACHE"):
        runtime.configure(tmp_path / "file" / "compiled")


def test_mesh_of_an_experiment_is_chosen_from_its_texts(raises_input_error):
    arch = architecture("llama")
    prompts = {"0shot": [Prompt("", "word " * 20)] * 4, "2shot": [Prompt("shot " * 20, "word " * 20)] * 4}
    config = small_config(mesh__data=0, mesh__fsdp=0, mesh__tensor=0)
    devices = Devices(8, 8, 10**9, "Abacus")
    assert runtime.choose_mesh(arch, config, prompts, devices=devices).shape == (8, 1, 1)
    tight = devices._replace(bytes=6 * 10**6)
    collecting = runtime.choose_mesh(arch, config, prompts, devices=tight)
    assert collecting.memory.optimizer == 0
    config.finetune.method = "full"
    config.finetune.batch_size = 1000
    training = runtime.choose_mesh(arch, config, prompts, ["word " * 20], finetune_config(config), devices)
    assert training.memory.optimizer > 0 and training.memory.total > collecting.memory.total
    config.mesh.fsdp = 16
    with raises_input_error("config.mesh", "fsdp 16"):
        runtime.choose_mesh(arch, config, prompts, devices=devices)
    config.model.dtype = "float8"
    with raises_input_error("config.model.dtype 'float8'", "bfloat16"):
        runtime.choose_mesh(arch, config, prompts, devices=devices)


@pytest.mark.parametrize("name", ["python", "jax", "flax", "optax", "numpy", "devices"])
def test_describe_names_versions_and_devices(name):
    assert runtime.describe()[name]
    assert runtime.describe()["jax"] == jax.__version__
    assert runtime.describe()["devices"].startswith(f"{len(jax.devices())} x ")
