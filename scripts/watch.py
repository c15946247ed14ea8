"""Follow a run or sweep in this terminal, wherever it runs: steps, losses, tokens/s, time left.

steppe watch DIR [--every=SECONDS] [--once]
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steppe.configs import keys
from steppe.data import files
from steppe.data.errors import DataError
from steppe.lm.keep.exits import STATUSES
from steppe.lm.track import lines
from steppe.lm.track.waiting import clock_face, columns
from steppe.scripts import command, process, results

SILENT = 120  # seconds without a new line after which a run is shown as silent
LEFT_OUT = "left out"  # the state of a run that cannot be read
MOST = 40  # runs shown, the most recently changed ones


class Row(NamedTuple):
    """The cells shown of a run. seconds: since its last line; NaN before the first."""

    name: str
    state: str
    step: str
    loss: str
    held_out: str
    rate: str
    left: str
    seconds: float


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Shows the runs until all have ended or the user interrupts; returns the exit status."""
    parser = command.parser("watch", command.headline(__doc__), config=False)
    parser.add_argument("directory", metavar="DIR", help="a sweep's directory, or a workdir")
    parser.add_argument(
        "--every", type=keys.number(above=0), default=2.0, metavar="S", help="seconds between updates (default 2)"
    )
    parser.add_argument("--once", action="store_true", help="print the table once and exit")
    options = command.options_of(argv, parser)
    rows(options.directory)
    if options.once:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
        print(table(rows(options.directory), width))
        return 0
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(auto_refresh=False) as live:
            while True:
                found = rows(options.directory)
                live.update(Text(table(found, live.console.width)), refresh=True)
                if all(row.state in (*STATUSES[:4], LEFT_OUT) for row in found):
                    return 0
                time.sleep(options.every)
    except KeyboardInterrupt:
        return 0


def rows(directory: str) -> list[Row]:
    """A Row per run, the most recently changed first; for a damaged run, why it is left out. Reads only the ends of
    the files."""
    places, found = results.places(directory), []
    for name, place, _ in places:
        try:
            found.append(_row(name, place))
        except (DataError, results.ResultsError) as error:
            if len(places) == 1:
                raise
            found.append(Row(f"{name}: {error}", LEFT_OUT, "", "", "", "", "", math.nan))
    return sorted(found, key=lambda row: (math.isnan(row.seconds), row.seconds))


def _row(name: str, place: Path) -> Row:
    found, path = lines.latest(place), place / lines.METRICS
    about, train, evaluation = (found.get(kind, {}) for kind in ("run", "train", "evaluate"))
    step, steps = train.get("step", 0), about.get("steps", 0)
    since = time.time() - path.stat().st_mtime if path.exists() else math.nan
    outcome = results.read_json(place / results.OUTCOME, results.Outcome)
    ended = evaluation.get("step") == steps > 0
    state = outcome.get("status") or ("finished" if ended else "waiting" if not found else "running")
    if state == "running" and since > SILENT:
        state = f"silent for {clock_face(since)}"
    pace = train.get("tokens_per_second", 0.0)
    per_step = about.get("tokens_per_step", 0)
    left = (steps - step) * per_step / pace if pace and math.isfinite(pace) and state == "running" else math.nan
    return Row(
        name, state, f"{step:,}/{steps:,}" if steps else "", _shown(train.get("loss")), _shown(evaluation.get("loss")),
        f"{pace:,.0f}" if pace else "", clock_face(left) if left == left else "", since,
    )  # fmt: skip


def table(found: list[Row], width: float) -> str:
    """The rows as text of this width, below the number of each kind."""
    counts = {state: sum(row.state.startswith(state) for row in found) for state in ("running", "silent", "waiting")}
    ended = len(found) - sum(counts.values())
    said = ", ".join(f"{count} {state}" for state, count in [*counts.items(), ("ended", ended)] if count)
    heads = ("run", "state", "step", "loss", "held-out", "tokens/s", "left")
    shown = [said, columns([heads, *(tuple(map(files.visible, row[:-1])) for row in found[:MOST])], width)]
    return "\n".join(shown + [f"and {len(found) - MOST} more"] * (len(found) > MOST))


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
