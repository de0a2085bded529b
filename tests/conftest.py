"""What every test runs under: the CPU, strict promotion, its own random numbers."""

import itertools
import os
import random
import tempfile
from collections.abc import Iterator

# Before jax is imported, and for the processes that tests start as well.
ON_GPU = os.environ.get("DPBRIDGE_TEST_GPU") == "1"
if not ON_GPU:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Every DPOptimizer compiles for itself, and a hundred tests make the same one. Each process has
    # a folder of its own, because JAX writes into it without a lock, and leaves nothing behind.
    _compiled = tempfile.TemporaryDirectory(prefix="dpbridge-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Two test processes share two cores: threads of their own for each compilation and product only
    # stand in each other's way, and a fifth of the suite's time goes there.
    _FLAGS = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

try:
    import torch
except ModuleNotFoundError:  # the kernels do without, and so do their tests
    torch = None

jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run; no deadline, because a first call compiles.
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=15, print_blob=True
)
# HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_unconfigure() -> None:
    if not ON_GPU:
        _compiled.cleanup()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not ON_GPU:
        pytest.skip("needs a GPU: set DPBRIDGE_TEST_GPU=1 where there is one")
    if torch is None or not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")


# Linux lets a process map 65530 pieces of memory. A program takes dozens, JAX keeps them all, and
# where there is no room for the next one the process dies of a segmentation fault.
_TESTS_BETWEEN_CLEARINGS = 200
_run = itertools.count(1)


def pytest_runtest_teardown() -> None:
    if next(_run) % _TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _forked_rng() -> Iterator[None]:
    """Starts each test from the same seeds, and leaves the process's generators as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    if torch is None:
        yield
    else:
        devices = range(torch.cuda.device_count()) if ON_GPU else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
