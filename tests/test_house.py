"""How the house stands: which way imports go, and that every room is shipped."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import dpbridge
import dpkernels

ROOT = Path(__file__).parent.parent
SOURCES = {"dpbridge": ROOT / "bridge" / "dpbridge", "dpkernels": ROOT / "kernels" / "dpkernels"}


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_kernels_never_import_torch():
    run(
        "import sys, pkgutil, importlib, dpkernels\n"
        "for m in pkgutil.walk_packages(dpkernels.__path__, 'dpkernels.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert 'torch' not in sys.modules and 'dpbridge' not in sys.modules"
    )


def test_the_bridge_imports_lightning_in_one_place_alone():
    run(
        "import sys, pkgutil, importlib, dpbridge\n"
        "for m in pkgutil.walk_packages(dpbridge.__path__, 'dpbridge.'):\n"
        "    if m.name != 'dpbridge.lightning':\n"
        "        importlib.import_module(m.name)\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    )


def test_importing_leaves_the_settings_of_jax_alone():
    run(
        "import jax\n"
        "before = dict(jax.config.values)\n"
        "import dpbridge\n"
        # Parts of JAX that are imported on demand bring settings of their own, such as Pallas.
        "assert {name: jax.config.values[name] for name in before} == before"
    )


def test_importing_keeps_jax_from_taking_the_whole_gpu():
    check = "assert os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == "
    run("import os, dpbridge\n" + check + "'false'")
    set_first = "import os\nos.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'true'\nimport dpbridge\n"
    run(set_first + check + "'true'")


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
