"""The preconditioned cells of the study again, this gradient in D (`precond_moment=fresh`), and AdamW with them.

    steppe sweep --config=study --sweep=configs/studies/first/preconditioned.py --out=runs/preconditioned --order=listed

The best rho of seed 0 is the same in every cell that has further seeds, so BEST of spec.py serves for these runs too.
"""

import runpy
from pathlib import Path


def get_spec():
    spec = runpy.run_path(str(Path(__file__).with_name("spec.py")))["get_spec"]()
    methods = {"adamw", "precond_sam", "precond_functional_sam"}
    return [block for block in spec if block["set"]["optim.method"] in methods]
