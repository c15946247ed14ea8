"""What may be imported: nothing of tensorflow outside preparation, and none of the rooms that build on this one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTRIES = [path for path in (ROOT / "data").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
MODULES = sorted(path.stem for path in ENTRIES if path.stem != "__init__")


def test_grain_and_every_module_leave_the_heavy_packages_and_the_other_rooms_alone():
    imports = f"import sys, grain\nfrom steppe.data import {', '.join(MODULES)}"
    code = imports + "\nprint({'.'.join(m.split('.')[: 1 + m.startswith('steppe.')]) for m in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'grain'" in result.stdout
    for package in (
        "tensorflow",
        "seqio",
        "tensorflow_datasets",
        *(f"steppe.{room}" for room in ("lm", "optim", "scripts")),
    ):
        assert f"'{package}'" not in result.stdout
