"""The process of a command: its exit on bad input and its settings before jax starts. It does not import jax."""

import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from steppe.configs import packages
from steppe.configs.read import UsageError
from steppe.data import files
from steppe.lm.keep.exits import REFUSALS, REFUSED, STORAGE
from steppe.lm.track import waiting


def say(text: object, stream: TextIO | None = None) -> None:
    """Prints a text that may hold names of files, runs and metrics, or sampled text: control characters are escaped."""
    waiting.heard()
    print(files.visible(str(text)), file=stream, flush=True)


def warn(text: object) -> None:
    """As say, on standard error, for who waits: standard output is a command's result."""
    say(text, sys.stderr)


def fail(message: object) -> int:
    """Prints one line on standard error and returns the exit status for bad input, 2."""
    warn(" ".join(str(message).split()))
    return 2


def refusing(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Wraps a command's main: bad input of any kind gives one line and status 2, failing storage one line and status
    74."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        gc.set_threshold(50_000)  # imports, traces and figures make many small objects that stay: a tenth of their time
        try:
            return main(argv)
        except (UsageError, *REFUSALS) as error:
            return fail(error)
        except ImportError as error:
            if not (said := packages.explain(error)):
                raise
            return fail(said)
        except BrokenPipeError:  # cli.main handles it
            raise
        except OSError as error:
            fail(error if error.errno is None else f"{error.filename or 'storage'}: {error.strerror or error}")
            return REFUSED if error.errno in NO_NAME else STORAGE

    return guarded


NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)  # the path itself is wrong


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
COMPILED = 2 << 30  # bytes of the cache of compiled programs; the least recently used go first


def ready_to_compute() -> None:
    """Call before jax starts: keeps freed memory within the process and compiled programs across processes."""
    keep_memory()
    keep_programs()


def keep_programs() -> None:
    """Makes jax cache compiled programs in the user's cache, by processor model. JAX_COMPILATION_CACHE_DIR overrides
    the directory; empty, it disables the cache."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:  # a program may not run on another processor model than the one it was compiled on
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
    """Removes cached programs that a kill or a full disk left incomplete.

    jax writes a program, then a file with the time of its last use. It never replaces a program it cannot read, and
    writes nothing more if a time is missing.
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
    """Makes glibc's malloc keep freed memory for the next step, unless MALLOC_* or GLIBC_TUNABLES are set.

    XLA's CPU client allocates the temporaries of every execution with malloc. By default malloc returns blocks above
    32 MiB, and all memory of secondary arenas, to the kernel: each step would then pay for new, zeroed pages.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc, or it cannot be opened
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
