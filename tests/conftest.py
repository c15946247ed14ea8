"""Eight simulated devices for every test: set before jax starts, since its backend is made once."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {"xla_force_host_platform_device_count": "8"}
# Programs this small take longer to compile than to run, and longest in these; another jaxlib may not know the flags.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()

# Tests compile the same small programs again and again, also in processes of their own.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="steppe-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Little optimization, for the same reason. Tests that look at what XLA makes of a program ask for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Tracing makes and drops many small objects: collecting them as often as Python does is one twentieth of the time.
gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests of a file go to one worker: its fixtures train and measure once, not once a worker."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Whole commands first, small parts last: a worker that is given a long file at the end leaves the other idle."""
    if hasattr(config, "workerinput"):  # xdist hides from its workers how files are dealt out
        items.sort(key=lambda item: str(item.path), reverse=True)


@pytest.fixture
def optimized(monkeypatch):
    """Programs compiled as users get them, in this process and in its children."""
    import jax  # here, after the environment above is set

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def one_device():
    """A module on a machine of one device, but for the runs whose mesh asks for more."""
    from helpers import lm_runs

    with lm_runs.devices(1):
        yield


@pytest.fixture(scope="module")
def float64():
    """A module in double precision."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem(float64):
    from helpers import optim_problems

    return optim_problems.Problem()


@pytest.fixture(scope="module")
def matrices(problem):
    """Dense Hessian, GGN and NME of the problem."""
    return problem.matrices()
