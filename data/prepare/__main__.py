"""`python -m steppe.data.prepare RECIPE_JSON DIRECTORY [PARENT]`, which data/cache.py starts.

Ends when the process PARENT ends. Users call steppe prepare_data instead.
"""

import functools
import json
import sys
import time
from collections.abc import Iterable

from steppe.data.errors import DataError, StorageError, to_json
from steppe.data.prepare import REFUSED, prepare
from steppe.data.prepare.shards import Recipe
from steppe.data.prepare.workers import follow

TOLD = 30.0  # seconds between lines that say how far a preparation is


def main(arguments: Iterable[str]) -> int:
    """Prepares DIRECTORY and returns the exit status."""
    recipe, directory, *parent = arguments
    log = functools.partial(print, flush=True)
    if parent:
        follow(int(parent[0]))
    told = time.monotonic()

    def report(state: dict) -> None:
        nonlocal told
        if time.monotonic() - told > TOLD:
            told = time.monotonic()
            log(f"{state['documents']:,} documents, {state['tokens']:,} tokens so far")

    try:
        prepare(Recipe(**json.loads(recipe)), directory, log=log, report=report, wait=True)
    except (DataError, StorageError) as error:
        print(json.dumps(to_json(error), default=str), file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
