"""Print versions, devices, kernels and missing packages, with the command that installs each.

    steppe doctor

Attach its output to every bug report. The exit status is 0 if `steppe train` can run here, else 1. It imports only the
standard library until it has printed what is missing.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steppe.configs import packages

# What each extra is for.
PURPOSES = {
    "gpu": "NVIDIA GPUs, CUDA 13",
    "gpu12": "NVIDIA GPUs, CUDA 12",
    "tpu": "TPUs",
    "plan": "plans for TPUs",
    "seqio": "seqio tasks and TFDS corpora",
    "wandb": "Weights & Biases",
    "tensorboard": "TensorBoard",
    "site": "the documentation as a site",
    "slurm": "sweeps on SLURM",
    "corpus": "data sets and vocabularies of the Hugging Face hub, Parquet",
    "hub": "export, import, lm-eval, quantisation",
}
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the state of this machine; returns the exit status."""
    if argv in (["-h"], ["--help"]):
        print(f"usage: steppe doctor [--help]\n\n{__doc__}")
        return 0
    if argv:
        print(f"{argv[0]}: must be left out; steppe doctor takes no arguments", file=sys.stderr)
        return 2
    declared = packages.requirements()
    core = [each for each in declared if not each.extra]
    absent = [each for each in core if not each.present]
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    versions = {name: packages.Requirement(name, "", "").version for name in _SHOWN}
    _say("steppe", f"{packages.Requirement(packages.OWN, '', '').version}, Python {platform.python_version()}, "
         f"{platform.platform(terse=True)} {platform.machine()}, {os.cpu_count()} cores, {memory}")  # fmt: skip
    _say("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    if absent:
        names = ", ".join(f"{each.distribution}{each.wanted}" for each in absent)
        _say("missing", f"{names}: {packages.remedy(*(each.module for each in absent))}")
    ready = _devices() and _trains()
    for extra in dict.fromkeys(each.extra for each in declared):
        if not extra or extra in packages.DEVELOPERS:
            continue
        lacking = [each for each in declared if each.extra == extra and not each.present]
        brought = ", ".join(each.distribution for each in lacking)
        python = max(map(packages.python_for, lacking), default="")
        needed = f"{python}pip install 'steppe[{extra}]' brings {brought}" if lacking else "installed"
        _say(extra, f"{PURPOSES.get(extra, extra)}: {needed}")
    _say("storage", f"{_free(Path.home() / '.cache')} free for caches in ~/.cache, {_free(Path.cwd())} here")
    _say("verdict", "steppe train runs here" if ready else "steppe train cannot run here; see missing and devices")
    return 0 if ready else 1


def _devices() -> bool:
    """Prints the devices jax finds; returns whether they multiply correctly."""
    try:
        import jax
        import jax.numpy as jnp

        begun = time.monotonic()
        devices = jax.devices()
        backend = jax.default_backend()
        for device in devices:
            ones = jax.device_put(jnp.ones((512, 512), jnp.bfloat16), device)
            if float(jnp.sum((ones @ ones).astype(jnp.float32))) != 512**3:
                _say("devices", f"{device}: a product of matrices of ones is wrong")
                return False
    except Exception as error:  # jax, plugins and drivers raise many types; print whichever it is
        _say("devices", f"jax cannot compute: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
        return False
    kinds = sorted({device.device_kind for device in devices})
    _say("devices", f"{len(devices)} x {', '.join(kinds)} ({backend}), a product took {time.monotonic() - begun:.1f} s")
    plugins = ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")
    found = [f"{name} {version}" for name in plugins if (version := packages.Requirement(name, "", "").version)]
    _say("plugins", ", ".join(found) or "none: jax computes on the CPU")
    try:
        from steppe.lm.model.attention import choose
        from steppe.lm.parts.chips import chip_of
    except ImportError as error:
        _say("kernels", packages.explain(error) or str(error))
        return False
    once, twice = (
        choose("auto", backend, 1024, "bfloat16", segmented=False, second_order=again) for again in (False, True)
    )
    _say("kernels", f"attention over 1,024 tokens in bfloat16: {once}; for a method with second derivatives: {twice}")
    chip = chip_of(devices[0], len(devices))
    _say("chip", f"{chip.name}: {chip.memory / 1e9:.0f} GB, {chip.flops / 1e12:.3g} TFLOP/s bfloat16, "
         f"{chip.bandwidth / 1e9:.0f} GB/s")  # fmt: skip
    return True


def _trains() -> bool:
    """Whether the imports of training succeed; prints the one that does not."""
    try:
        import steppe.data.loader
        import steppe.lm.run.train  # noqa: F401
    except ImportError as error:
        _say("train", packages.explain(error) or f"{type(error).__name__}: {error}")
        return False
    return True


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB"


def _say(what: str, said: str) -> None:
    print(f"{what:<12}{said}", flush=True)
