"""Sizes of an installation by extra: what pip downloads, and what lies on disk.

    python tests/bench/install.py [--pins=.ci/pins.txt] [EXTRA ...]

Each extra is installed into an environment of its own, with the core. `library` is what `import steppe.optim` needs,
without the rest of the core. A download is the sum of the sizes of the wheels that `pip install --report` names.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from steppe.scripts import command

ROOT = Path(__file__).parents[2]
EXTRAS = ("library", "core", "corpus", "seqio", "wandb", "hub", "all")
LIBRARY = ("jax", "optax")  # checked below by importing it


def main() -> None:
    parser = command.parser("tests/bench/install.py", __doc__, config=False)
    parser.add_argument("--pins", default=ROOT / ".ci" / "pins.txt", help="pip constraints")
    parser.add_argument("extras", nargs="*", default=EXTRAS, metavar="EXTRA", help="by default those of README")
    options = command.options_of(sys.argv[1:], parser)
    print("| packages | download, MB | installed, MB | packages |\n|---|---|---|---|")
    for extra in options.extras:
        with tempfile.TemporaryDirectory() as folder:
            print(
                "| {} | {:,.0f} | {:,.0f} | {} |".format(extra, *sizes(Path(folder), extra, options.pins)), flush=True
            )


def sizes(folder: Path, extra: str, pins: Path) -> tuple[float, float, int]:
    """(megabytes downloaded, megabytes on disk, number of packages) of an extra."""
    python, report = folder / "venv" / "bin" / "python", folder / "report.json"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    before = on_disk(folder / "venv")
    named = {"library": LIBRARY, "core": (ROOT,)}.get(extra, (f"{ROOT}[{extra}]",))
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", pins, "--report", report, *named]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    if extra == "library":
        subprocess.run([*command[:6], "--no-deps", ROOT], check=True, stderr=subprocess.DEVNULL)
        subprocess.run([python, "-P", "-c", "import steppe.optim"], check=True, cwd=folder)
    wheels = [each["download_info"]["url"] for each in json.loads(report.read_text())["install"]]
    size = sum(map(length, wheels))
    return size / 1e6, (on_disk(folder / "venv") - before) / 1e6, len(wheels)


def length(address: str) -> int:
    """The size of a file at an address; 0 for a directory, which is our own tree."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "file":
        path = urllib.parse.unquote(parts.path)
        return os.path.getsize(path) if os.path.isfile(path) else 0
    with urllib.request.urlopen(urllib.request.Request(address, method="HEAD")) as answer:
        return int(answer.headers["Content-Length"])


def on_disk(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() or path.is_symlink())


if __name__ == "__main__":
    main()
