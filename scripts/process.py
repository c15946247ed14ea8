"""The process of a command: how it ends on bad input, and what it sets before jax starts, which it does not import."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from steppe.configs import packages
from steppe.configs.read import UsageError
from steppe.data import files
from steppe.lm.keep.exits import REFUSALS, REFUSED, STORAGE


def fail(message: object) -> int:
    """Prints one line on standard error and returns the exit status for bad input, 2."""
    print(files.visible(" ".join(str(message).split()), sys.stderr), file=sys.stderr, flush=True)
    return 2


def refusing(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command's main that answers bad input of any kind, of the line or of what it names, with one line and 2, and
    storage that fails with one line and 74."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except (UsageError, *REFUSALS) as error:
            return fail(error)
        except ImportError as error:
            if not (said := packages.explain(error)):
                raise
            return fail(said)
        except BrokenPipeError:  # whoever reads the output has seen enough: cli.main knows
            raise
        except OSError as error:
            fail(error if error.errno is None else f"{error.filename or 'storage'}: {error.strerror or error}")
            return REFUSED if error.errno in NO_NAME else STORAGE

    return guarded


NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)  # of names that are no such file


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
COMPILED = 2 << 30  # bytes of compiled programs that are kept, those that were used last


def ready_to_compute() -> None:
    """What a process does before jax starts: memory and compiled programs are kept from one use to the next."""
    keep_memory()
    keep_programs()


def keep_programs() -> None:
    """Has jax keep what it compiles in the user's cache, by kind of processor, unless JAX_COMPILATION_CACHE_DIR is set:
    to another place, or to nothing."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:  # a program is only sure to run on the kind of processor that it was compiled on
        said = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        kind = "\n".join(line for line in said if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        kind = socket.gethostname()
    place = Path(files.user_cache()) / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]
    _drop_unfinished(place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _drop_unfinished(place: Path) -> None:
    """Removes programs of which a kill or a full disk left a part.

    jax writes a program, then the time of its use. It never replaces one that it cannot read, and writes no more where
    a time is missing.
    """
    if not place.is_dir():
        return
    import filelock

    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(place / ".lockfile", timeout=0):
        for program in place.glob("*-cache"):
            time_of_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not time_of_use.is_file() or time_of_use.stat().st_size != 8:
                program.unlink()


def keep_memory() -> None:
    """Has glibc's malloc keep what a step frees for the next step, unless MALLOC_* or GLIBC_TUNABLES say otherwise.

    XLA's CPU client takes the temporaries of every execution from malloc, which hands back to the kernel whatever is
    larger than 32 MiB, and all of an arena that is not the first: each step would pay for new, zeroed pages.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc, or none that can be opened
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
