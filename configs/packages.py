"""Finds the distribution that provides a module and its install command, from Steppe's own metadata. Also lists the
modules of a package that define a function.

Imports only the standard library, so that it can report missing packages when nothing else is installed.
"""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

OWN = "steppe"
# Modules whose name differs from their distribution's in more than - and _.
_OTHERWISE = {"orbax": "orbax-checkpoint"}
# The distributions that jax's extras install; Steppe imports none of them.
_BROUGHT = {"jax[cuda13]": "jax-cuda13-plugin", "jax[cuda12]": "jax-cuda12-plugin", "jax[tpu]": "libtpu"}
DEVELOPERS = ("test", "parity", "all")  # extras that messages to users do not name


class Requirement(NamedTuple):
    """A distribution that Steppe can use. extra: the extra that installs it, "" if every run needs it. below: the first
    version of Python, such as 3.14, for which it has no release, "" for none."""

    distribution: str
    wanted: str
    extra: str
    below: str = ""

    @property
    def module(self) -> str:
        modules = {distribution: module for module, distribution in _OTHERWISE.items()}
        return modules.get(self.distribution, self.distribution.replace("-", "_"))

    @property
    def present(self) -> bool:
        return present(self.module)

    @property
    def version(self) -> str | None:
        """The installed version, None if it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def requirements() -> list[Requirement]:
    """Every requirement in Steppe's metadata, in its order."""
    parsed = []
    for line in importlib.metadata.requires(OWN) or ():
        what, _, condition = line.partition(";")
        match = re.match(r"([\w.\-]+)(\[.*?\])?\s*(.*)", what)
        assert match, f"invalid metadata: {line}"
        name, of, wanted = match.groups()
        extra = re.search(r"extra == ['\"](.+?)['\"]", condition)
        if name != OWN:
            brought = _BROUGHT.get(f"{name}{of}")
            name = re.sub(r"[-_.]+", "-", name)
            below = re.search(r"python_version < ['\"](.+?)['\"]", condition)
            least = "" if brought else wanted.strip()
            parsed.append(Requirement(brought or name, least, extra[1] if extra else "", below[1] if below else ""))
    return parsed


def present(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def of_module(module: str) -> Requirement:
    """The Requirement that provides a module, given by its full name. Undeclared: a distribution of the same name."""
    root = module.partition(".")[0]
    name = _OTHERWISE.get(root, root.replace("_", "-"))
    known = [each for each in requirements() if each.distribution.lower() == name.lower()]
    users = [each for each in known if each.extra not in DEVELOPERS]
    return (users or [Requirement(name, "", "")])[0]


def remedy(*modules: str) -> str:
    """The pip command that installs these modules."""
    wanted = [of_module(module) for module in modules]
    names = dict.fromkeys(f"'{OWN}[{each.extra}]'" if each.extra else each.distribution for each in wanted)
    return f"{max(map(python_for, wanted), default='')}pip install {' '.join(names)}"


def python_for(wanted: Requirement) -> str:
    """Words that ask for an older Python where this one is too new for a distribution, else ""."""
    new = wanted.below and sys.version_info >= tuple(map(int, wanted.below.split(".")))
    return f"with Python below {wanted.below}, " if new else ""


def lacking(*modules: str) -> str:
    """A message if any of these modules is missing, else ""."""
    absent = [module for module in modules if not present(module)]
    return f"needs {', '.join(absent)}: {remedy(*absent)}" if absent else ""


def explain(error: ImportError) -> str | None:
    """One line for a package that is missing or incompatible; None for an error inside Steppe."""
    root = (error.name or "").partition(".")[0]
    if not root or root == OWN:
        return None
    if not present(root):
        return f"needs {root}, which is not installed: {remedy(root)}"
    known = of_module(root)
    wanted = f"Steppe needs {known.distribution}{known.wanted}" if known.wanted else remedy(root)
    return f"{known.distribution} {known.version or ''}: {error}; {wanted}"


def folder_of(package: str) -> Path:
    """The folder of one of Steppe's packages, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def ready(package: str, function: str) -> list[str]:
    """The modules of a package that define a function, without importing them."""
    return sorted(
        file.stem
        for file in folder_of(package).glob("*.py")
        if re.search(rf"^def {function}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
