"""Which distribution brings a module, and the command that installs it: read from this package's own metadata; and
which of our modules define a function, read from their files.

Imports the standard library alone, so that it can speak where nothing else is installed.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

OWN = "steppe"
# Modules that are not called as their distribution is, but for - and _.
_OTHERWISE = {"orbax": "orbax-checkpoint"}
# What jax's own extras bring; their names are no modules that we import.
_BROUGHT = {"jax[cuda13]": "jax-cuda13-plugin", "jax[cuda12]": "jax-cuda12-plugin", "jax[tpu]": "libtpu"}
DEVELOPERS = ("test", "parity", "all")  # extras that no user is pointed to


class Requirement(NamedTuple):
    """A distribution that Steppe can use. extra: the extra that brings it, "" for what every run needs."""

    distribution: str
    wanted: str
    extra: str

    @property
    def module(self) -> str:
        found = {distribution: module for module, distribution in _OTHERWISE.items()}
        return found.get(self.distribution, self.distribution.replace("-", "_"))

    @property
    def present(self) -> bool:
        return present(self.module)

    @property
    def version(self) -> str | None:
        """The installed one, None where there is none."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def requirements() -> list[Requirement]:
    """Everything that the package's metadata names, in its order."""
    found = []
    for line in importlib.metadata.requires(OWN) or ():
        what, _, condition = line.partition(";")
        found_name = re.match(r"([\w.\-]+)(\[.*?\])?\s*(.*)", what)
        assert found_name, f"metadata that installers refuse: {line}"
        name, of, wanted = found_name.groups()
        extra = re.search(r"extra == ['\"](.+?)['\"]", condition)
        if name != OWN:
            brought = _BROUGHT.get(f"{name}{of}")
            name = re.sub(r"[-_.]+", "-", name)
            found.append(Requirement(brought or name, "" if brought else wanted.strip(), extra[1] if extra else ""))
    return found


def present(module: str) -> bool:
    """Whether a module is there to be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def of_module(module: str) -> Requirement:
    """The Requirement that brings a module, by its full name; a distribution of that name where none is declared."""
    root = module.partition(".")[0]
    name = _OTHERWISE.get(root, root.replace("_", "-"))
    known = [each for each in requirements() if each.distribution.lower() == name.lower()]
    users = [each for each in known if each.extra not in DEVELOPERS]
    return (users or [Requirement(name, "", "")])[0]


def remedy(*modules: str) -> str:
    """The command that installs what brings these modules."""
    wanted = [of_module(module) for module in modules]
    names = dict.fromkeys(f"'{OWN}[{each.extra}]'" if each.extra else each.distribution for each in wanted)
    return f"pip install {' '.join(names)}"


def lacking(*modules: str) -> str:
    """What to say where any of these modules is missing, "" where all are there."""
    absent = [module for module in modules if not present(module)]
    return f"needs {', '.join(absent)}: {remedy(*absent)}" if absent else ""


def explain(error: ImportError) -> str | None:
    """One line for a package that is missing or has another interface; None for a fault of our own."""
    root = (error.name or "").partition(".")[0]
    if not root or root == OWN:
        return None
    if not present(root):
        return f"needs {root}, which is not installed: {remedy(root)}"
    known = of_module(root)
    wanted = f"Steppe needs {known.distribution}{known.wanted}" if known.wanted else remedy(root)
    return f"{known.distribution} {known.version or ''}: {error}; {wanted}"


def folder_of(package: str) -> Path:
    """Where the modules of a package of ours lie, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def ready(package: str, function: str) -> list[str]:
    """The modules of a package that define a function, read without importing them."""
    return sorted(
        file.stem
        for file in folder_of(package).glob("*.py")
        if re.search(rf"^def {function}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
