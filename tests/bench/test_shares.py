"""Where epsilon lies with a vocabulary of 32,000 pieces, most of which a batch does not meet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

C4_MODEL = Path(__file__).parents[3] / "shared" / "t5_cc_all_32000_100extra.model"
KINDS = {"plain": "sam", **{kind: f"precond_functional_sam, {kind}" for kind in ("fresh", "stale", "stale, no floor")}}


@pytest.mark.exhaustive  # eight runs of twenty seconds
@pytest.mark.skipif(not C4_MODEL.exists(), reason="the C4 vocabulary is not next to the repository")
def test_preconditioning_leaves_the_layers_at_least_a_tenth_of_their_share():
    """Of |epsilon|^2 at step 5, against plain g; without the gradient in its moment and a floor they do not."""
    command = [sys.executable, str(Path(__file__).with_name("shares.py")), str(C4_MODEL), "--steps", "5"]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--directions", *KINDS.values()], env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    for tied in ("tied", "untied"):
        layers = {row[2]: float(row[5]) + float(row[6]) for row in rows if row[1] == tied}
        share = {kind: layers[name] for kind, name in KINDS.items()}
        assert share["fresh"] > 0.1 * share["plain"]
        assert share["stale"] > 0.1 * share["plain"]
        assert share["stale, no floor"] < 0.1 * share["plain"]
