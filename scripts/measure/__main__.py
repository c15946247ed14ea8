"""Measures trained models from their checkpoints: `steppe NAME` is the module NAME of lm/measure with a measure_run.

Such a module declares its `Settings`, which are options of the command, and `TITLES`, the columns of the table. It may
have `refused`, `stages`, `note`, `draw` and `draw_training`, as lm.measure.curvature has. Its numbers go into
WORKDIR/NAME/STEP.json, `summary` first, where a report finds them and makes a section of them.
"""

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from steppe.configs.packages import ready
from steppe.data import files
from steppe.scripts import command, process

PACKAGE = "steppe.lm.measure"
OTHERS = ("retention", "coordinates")  # compare runs: commands of their own


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns the exit status: 1 if a checkpoint was passed over, 2 for bad input."""
    name, *rest = argv or [""]
    if name not in ready(PACKAGE, "measure_run"):
        return command.dispatch(argv, "python -m steppe.scripts.measure", "steppe.scripts.measure", OTHERS)
    measurement = importlib.import_module(f"{PACKAGE}.{name}")
    parser = command.parser(name, command.headline(measurement.__doc__), config=False)
    parser.add_argument(
        "--workdir", required=True, action="append", help="a run, a sweep, or a pattern of them; repeatable"
    )
    command.add_only(parser)
    parser.add_argument("--step", default="last", metavar="K|all", help="checkpoints to measure; default: the newest")
    command.add_settings(parser, measurement.Settings)
    parser.add_argument("--skip_done", action="store_true", help="leave out checkpoints whose file is there already")
    command.add_weights(parser)
    command.add_trust(parser)
    options = command.options_of(rest, parser)
    settings = command.settings_of(options, measurement.Settings)
    if said := getattr(measurement, "refused", lambda settings: "")(settings):
        return process.fail(said)
    if options.step not in ("last", "all") and not options.step.isdecimal():
        return process.fail(f"--step={options.step}: must be a number of steps, or all")

    process.ready_to_compute()
    from steppe.lm.keep import mirror
    from steppe.lm.keep.exits import REFUSALS
    from steppe.lm.track.lines import AVERAGES

    todo, rows, passed_over, programs = checkpoints(name, options), [], 0, {}
    with Progress(len(todo)) as progress:
        for directory, step in todo:
            try:
                rows.append((directory, step, examine(measurement, directory, step, options, programs, progress)))
            except REFUSALS as error:
                if len(todo) == 1:
                    raise
                progress.end(f"{directory} step {step} IS PASSED OVER: {error}")
                passed_over = 1
    for directory in dict.fromkeys(directory for directory, _, _ in rows):
        over_training(measurement, directory)
        mirror.add(directory, name if options.weights is None else AVERAGES)
    print(table(measurement.TITLES, rows))
    for directory, step, summary in rows:
        if said := getattr(measurement, "note", lambda summary: "")(summary):
            print(f"{Path(directory).resolve().name}:{step}  {said}")
    return passed_over


def checkpoints(name: str, options) -> list[tuple[str, int]]:
    """The (workdir, step) pairs asked for, what has none of them named. WorkdirError where there are none."""
    from steppe.lm.keep import saved
    from steppe.lm.keep.exits import REFUSALS, WorkdirError
    from steppe.scripts import results
    from steppe.scripts.sweep import spec

    once = {place.resolve(): place for _, place in results.places(options.workdir)}
    begun = [place for place in once.values() if (place / "config.json").exists()]
    flats, found, lacking = {}, [], []
    for place in begun:
        try:
            flats[place] = results.config_of(place / "config.json")
        except results.ResultsError as error:
            lacking.append(str(error))
    for place in spec.matching(list(flats), options.only, flats.__getitem__):
        try:
            steps = saved.steps(str(place), options.trust)
        except REFUSALS as error:
            lacking.append(str(error))
            continue
        if options.step.isdecimal():
            wanted = [step for step in steps if step == int(options.step)]
        else:
            wanted = steps if options.step == "all" else steps[-1:]
        found += [(str(place), step) for step in wanted]
        if not wanted:
            have = ", ".join(map(str, steps)) or "none"
            lacking.append(f"{place}: --step={options.step}: must be one of its checkpoints, which are {have}")
    if not found:
        raise WorkdirError(lacking[0] if lacking else f"--workdir={', '.join(options.workdir)}: must hold a run")
    for line in lacking:
        print(f"left out  {line}", flush=True)
    if options.skip_done:
        found = [each for each in found if not path_of(name, *each, options.weights).exists()]
    return found


def path_of(name: str, directory: str, step: int, weights: str | None = None) -> Path:
    """Where what a measurement found of a checkpoint stands, of weights by name."""
    from steppe.lm.keep import saved

    return files.below(saved.measured_in(directory, weights), f"{name}/{step}.json")


def examine(
    measurement: ModuleType, directory: str, step: int, options, programs: dict, progress: "Progress"
) -> dict[str, float]:
    """Measures one checkpoint, writes its file and plots, and returns the summary."""
    import jax
    import jax.numpy as jnp

    from steppe.lm import plot
    from steppe.lm.keep import saved
    from steppe.lm.keep.exits import Unusable, WorkdirError

    began, quiet = time.perf_counter(), lambda line: None
    settings = command.settings_of(options, measurement.Settings)
    progress.begin(f"{directory} step {step}", len(getattr(measurement, "stages", lambda settings: ())(settings)))
    run = saved.load(directory, step, log=quiet, optimizer=True, weights=options.weights, trust=options.trust)
    if jax.tree.reduce(lambda bad, leaf: bad or not bool(jnp.all(jnp.isfinite(leaf))), run.params, False):
        raise Unusable(f"{directory}: the checkpoint of step {step} holds parameters that are not finite")

    def other(workdir: str) -> Any:
        there = saved.load(workdir, log=quiet, trust=options.trust).params
        if jax.tree.map(jnp.shape, there) != jax.tree.map(jnp.shape, run.params):
            raise WorkdirError(f"{workdir}: must be a run of the same model as {directory}")
        return there

    measured = measurement.measure_run(run, settings, programs, other, progress.tick)
    found = {"summary": measured["summary"], "step": step, "weights": run.weights, "settings": settings._asdict()}
    found |= {"seconds": time.perf_counter() - began} | measured
    found["settings"]["devices"] = run.parts.mesh.size
    path = path_of(measurement.__name__.rpartition(".")[2], directory, step, options.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found, digits=6)
    with plot.styled(font_size=9, lines_linewidth=1.5):
        for name, figure in getattr(measurement, "draw", lambda found: {})(found).items():
            _save(figure, f"{path.parents[1].resolve().name}, step {step}", path.with_name(f"{name}-{step}.png"))
    progress.end(f"{path}  {found['seconds']:.1f} s")
    return found["summary"]


def over_training(measurement: ModuleType, workdir: str) -> None:
    """Draws NAME/training.png from every STEP.json and what the run recorded itself under this name."""
    from steppe.lm import plot
    from steppe.lm.track import lines
    from steppe.scripts import results

    if not hasattr(measurement, "draw_training"):
        return
    name, found = measurement.__name__.rpartition(".")[2], []
    for path in results.measured(Path(workdir), name):
        with contextlib.suppress(results.ResultsError):  # of another version, or damaged
            found.append(results.read_json(path, results.Measurement))
    recorded = lines.read(workdir).of(name)
    if found or recorded:
        path = Path(workdir) / name / "training.png"
        path.parent.mkdir(exist_ok=True)
        with plot.styled(font_size=9, lines_linewidth=1.5):
            _save(measurement.draw_training(found, recorded), Path(workdir).resolve().name, path)


def _save(figure, title: str, path: Path) -> None:
    from steppe.lm import plot

    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    plot.save(figure, path, dpi=150)


def table(titles: dict[str, str], rows: list[tuple[str, int, dict[str, float]]]) -> str:
    """One line per checkpoint."""
    names = [f"{Path(directory).resolve().name}:{step}" for directory, step, _ in rows]
    width = max([10, *map(len, names)])
    wide = {key: max(8, len(title)) + 2 for key, title in titles.items()}
    lines = [f"{'run:step':<{width}}" + "".join(f"{title:>{wide[key]}}" for key, title in titles.items())]
    for name, (_, _, summary) in zip(names, rows, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{summary.get(key, math.nan):>{wide[key]}.4g}" for key in titles))
    return "\n".join(lines)


class Progress:
    """Stages on a terminal as a live bar, elsewhere one line per checkpoint, both on standard error."""

    def __init__(self, total: int):
        self._total, self._done, self._bar, self._task = total, 0, None, None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.BarColumn(bar_width=16), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, stages: int) -> None:
        """A checkpoint of so many stages is next."""
        self._name = f"[{self._done + 1}/{self._total}] {name}"
        if self._bar is not None:
            self._task = self._bar.add_task(f"{self._name}  loading", total=stages)

    def tick(self, stage: str) -> None:
        """A stage begins."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{self._name}  {stage}")

    def end(self, text: str) -> None:
        """The checkpoint is done."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.console.print(f"[{self._done}/{self._total}] {text}", markup=False, highlight=False)
        else:
            print(f"[{self._done}/{self._total}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
