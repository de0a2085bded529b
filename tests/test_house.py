"""How the house stands: which way imports go, and that every room is shipped."""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import dpbridge
import dpkernels

ROOT = Path(__file__).parent.parent
SOURCES = {"dpbridge": ROOT / "bridge" / "dpbridge", "dpkernels": ROOT / "kernels" / "dpkernels"}


PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
IMPORT_ALL = """
import importlib, json, os, pkgutil, sys, jax
before = dict(jax.config.values)
package = importlib.import_module({package!r})
# Parts of JAX that are imported on demand bring settings of their own, such as Pallas.
changed = [name for name in before if jax.config.values[name] != before[name]]
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name != "dpbridge.lightning":
        importlib.import_module(module.name)
preallocate = os.environ.get({preallocate!r})
jax.config.update("jax_platforms", "nowhere")
try:
    jax.devices()
except RuntimeError:
    has_started = False
else:
    has_started = True
print(
    json.dumps(
        dict(
            modules=list(sys.modules),
            changed=changed,
            preallocate=preallocate,
            has_started=has_started,
        )
    )
)
"""


def import_all(package):
    """What a fresh process holds once it has imported all of a package."""
    code = IMPORT_ALL.format(package=package, preallocate=PREALLOCATE)
    kept = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept,
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bridge():
    return import_all("dpbridge")


@pytest.fixture(scope="module")
def kernels():
    return import_all("dpkernels")


def test_kernels_never_import_torch(kernels):
    assert "dpkernels.clipping" in kernels["modules"]
    assert not {"torch", "dpbridge"} & set(kernels["modules"])


@pytest.mark.parametrize("package", ["bridge", "kernels"])
def test_importing_does_not_start_jax(package, request):
    """Where it is started before its settings are, it takes the GPU, and forks are unsafe."""
    assert not request.getfixturevalue(package)["has_started"]


def test_the_bridge_imports_lightning_in_one_place_alone(bridge):
    assert "dpbridge.optimizer" in bridge["modules"]
    assert not {"lightning", "pytorch_lightning"} & set(bridge["modules"])


def test_importing_leaves_the_settings_of_jax_alone(bridge):
    assert not bridge["changed"]


def test_importing_keeps_jax_from_taking_the_whole_gpu(bridge):
    assert bridge["preallocate"] == "false"


def test_importing_leaves_what_the_user_set_about_the_gpu(monkeypatch):
    monkeypatch.setenv(PREALLOCATE, "true")
    importlib.reload(dpbridge)
    assert os.environ[PREALLOCATE] == "true"


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only glibc is asked")
@pytest.mark.slow
@pytest.mark.parametrize(("keep", "is_kept"), [("1", True), ("0", False)])
def test_memory_that_a_step_frees_is_kept_for_the_next(keep, is_kept):
    code = """
import resource, dpbridge, jax, jax.numpy as jnp

@jax.jit
def step(x):
    return x + 1

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.ones(2**24)
for _ in range(40):
    step(x).block_until_ready()
before = faults()
for _ in range(10):
    step(x).block_until_ready()
print(faults() - before)
"""
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=kept | {"DPBRIDGE_KEEP_MEMORY": keep}, check=True, stdout=subprocess.PIPE
    )
    pages = 10 * 4 * 2**24 / resource.getpagesize()
    assert (int(done.stdout) < pages / 4) == is_kept


def test_every_package_is_in_the_distribution():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    found = [
        ".".join([name, *folder.relative_to(root).parts])
        for name, root in SOURCES.items()
        for folder in (root, *root.rglob("*"))
        if (folder / "__init__.py").exists()
    ]
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("package", [dpbridge, dpkernels])
def test_public_names_exist_and_are_documented(package):
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@pytest.mark.parametrize("root", SOURCES.values(), ids=SOURCES)
def test_public_api_alone_is_used(root):
    private = re.compile(r"jax\._src|jax\.interpreters\.xla|torch\._(?!C\b)[a-z]")
    for path in root.rglob("*.py"):
        found = private.search(path.read_text())
        assert not found, f"{path.name}: {found.group() if found else ''}"


def test_the_version_is_the_distributions():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == dpbridge.__version__
