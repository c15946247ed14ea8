"""The preconditioned cells of the study again, D with this gradient in it (`precond_moment=fresh`), and AdamW beside them.

    steppe sweep --config=study --sweep=optim/study/preconditioned.py --out=runs/preconditioned --order=listed

Run twice: BEST of spec.py, where the seeds 1 and 2 are, was read off the report of the first run's seed 0.
"""

import runpy
from pathlib import Path


def get_spec():
    spec = runpy.run_path(Path(__file__).with_name("spec.py"))["get_spec"]()
    methods = {"adamw", "precond_sam", "precond_functional_sam"}
    return [block for block in spec if block["set"]["optim.method"] in methods]
