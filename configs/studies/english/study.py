"""The whole study as one sweep: the runs of this folder's other files, in the order in which they were made.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/study.py --out=runs/english --order=listed \
      --config.average.weights=ema

Runs that several of them list are run once. What comes first says most: a study that is cut short is one still.
"""

import pathlib
import runpy

PARTS = ("one_pass", "two_pass", "seeds", "few_bits", "overtrained", "bfloat16", "sizes", "larger")


def get_spec() -> list[dict]:
    files = [pathlib.Path(__file__).with_name(f"{part}.py") for part in PARTS]
    return [block for file in files for block in runpy.run_path(str(file))["get_spec"]()]
