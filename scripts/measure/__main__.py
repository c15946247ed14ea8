"""Measures trained models from their checkpoints, or models made of a config: `steppe NAME` is lm/measure/NAME.py.

Such a module declares its `Settings`, which are options of the command, and one of

- `measure_run`, of a checkpoint, `TITLES`, the columns of the table, and `costs` and `COMPILING`, from which the time
  left follows. It may have `refused`, `note`, `draw` and `draw_training`, as lm.measure.curvature has. Its numbers go
  into WORKDIR/NAME/STEP.json, `summary` first, where a report finds them and makes a section of them. With `compare`,
  as lm.measure.retention has, it is of finished runs side by side (see scripts.measure.runs), and its file is
  WORKDIR/NAME.json.
- `measure_config`, of each of the `configs` that it makes of one, with the `cost` of each, `draw` and `note` over all.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from steppe.configs import keys
from steppe.configs.packages import ready
from steppe.configs.read import UsageError
from steppe.data import files
from steppe.lm import plot
from steppe.lm.keep.exits import REFUSALS, Unusable, WorkdirError
from steppe.lm.track import lines
from steppe.lm.track.waiting import Progress, clock_face
from steppe.scripts import command, process, results
from steppe.scripts.measure import runs

PACKAGE = "steppe.lm.measure"
MINUTES = 5  # of --step=all, unless more are asked for


class Asked(NamedTuple):
    """A measurement by name, as it was asked for."""

    name: str
    measurement: ModuleType
    options: Any
    settings: Any

    @property
    def compares(self) -> bool:
        return hasattr(self.measurement, "compare")


class Target(NamedTuple):
    """A checkpoint to measure. weights: by name, None for those the run is judged by; path: where its numbers go; pace:
    seconds that the gradient of one sequence took while the run trained, NaN if unknown; held_out: sequences of the
    first held-out set, 0 if unknown."""

    name: str
    directory: str
    config: dict[str, Any]
    step: int
    weights: str | None
    path: Path
    pace: float
    held_out: int


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns the exit status: 1 if a checkpoint was passed over, 2 for bad input."""
    name, *rest = argv or [""]
    kinds = dict.fromkeys(results.MEASURED, of_checkpoints)
    kinds |= dict.fromkeys(ready(PACKAGE, "measure_config"), of_configs)
    if name not in kinds:
        return process.fail(f"{name or 'nothing'}: must be one of {', '.join(sorted(kinds))}")
    return kinds[name](name, importlib.import_module(f"{PACKAGE}.{name}"), rest)


# ---------------------------------------------------------------------------------------------------------- checkpoints
def of_checkpoints(name: str, measurement: ModuleType, argv: Sequence[str]) -> int:
    """Measures checkpoints of runs."""
    asked = read(name, measurement, argv)
    with Progress(f"{name}: looking for checkpoints") as progress:
        process.ready_to_compute()
        from steppe.lm.keep import mirror

        targets, found = find(asked, progress), {}
        if asked.compares:
            found = {} if asked.options.again else runs.known(asked, targets)
            runs.check(asked, targets, found, progress.line)
        elif asked.options.skip_done:
            targets = [target for target in targets if not target.path.exists()]
        late = measure(asked, targets, found, progress)
    done = [target for target in targets if target.path in found]
    if done:
        (runs.conclude if asked.compares else conclude)(asked, done, found)
    for target in done:
        mirror.add(target.directory, target.path.relative_to(target.directory).parts[0])
    return int(len(done) + late < len(targets))


def read(name: str, measurement: ModuleType, argv: Sequence[str]) -> Asked:
    """What a command line asks for. UsageError."""
    compares = hasattr(measurement, "compare")
    parser = command.parser(name, command.headline(measurement.__doc__), config=False)
    add, which = parser.add_argument, "a sweep, of which all that finished," if compares else "a sweep,"
    add("--workdir", required=True, action="append", help=f"a run, {which} or a pattern of them; repeatable")
    command.add_only(parser)
    step = "K" if compares else "K|all"
    add("--step", default="last", metavar=step, help="checkpoints to measure; default: the newest")
    command.add_weights(parser, several=True)
    command.add_settings(parser, measurement.Settings)
    command.add_trust(parser)
    if compares:
        add("--again", action="store_true", help="measure again what has been measured")
        add("--out", type=command.writable_directory, help="directory for the table and plots of the comparison")
    else:
        add("--skip_done", action="store_true", help="skip checkpoints that have been measured")
        said = f"with --step=all, begin no checkpoint that would end later (default {MINUTES}); 0: no limit"
        add("--minutes", type=keys.number(least=0), default=MINUTES, metavar="N", help=said)
    options = command.options_of(argv, parser)
    settings = command.settings_of(options, measurement.Settings)
    if said := getattr(measurement, "refused", lambda settings: "")(settings):
        raise UsageError(said)
    if not options.step.isdecimal() and options.step not in ("last", "last" if compares else "all"):
        raise UsageError(f"--step={options.step}: must be a number of steps" + ", or all" * (not compares))
    return Asked(name, measurement, options, settings)


def find(asked: Asked, progress: Progress) -> list[Target]:
    """The checkpoints asked for, what has none of them named. WorkdirError where there are none."""
    from steppe.lm.keep import mirror, saved

    options, found, lacking = asked.options, [], []
    given = [Path(mirror.here(each) if files.is_remote(each) else each).expanduser() for each in options.workdir]
    read = results.read(options.workdir, options.only, progress.line)
    begun = [each for each in read if (each.directory / "config.json").exists()]
    names, several = [each.directory.resolve().name for each in begun], options.weights or [None]
    for result, name in zip(begun, names, strict=True):
        directory, steps = str(result.directory), []
        plain, made = result.adamw_flops / (result.flops or math.nan), len(result.train_curve.step)
        pace = result.seconds / made * plain / result.config["train.batch_size"] if made else math.nan
        held_out = -(-result.held_out // result.config["data.sequence_length"])
        if asked.compares and result.status != "finished" and result.directory not in given:
            lacking.append(f"{directory}: {result.status} {result.why}".rstrip())
            continue
        for weights in several:
            try:
                folder = saved.measured_in(directory, weights)
                steps = steps or _steps(directory, options, progress)
            except REFUSALS as error:
                lacking.append(str(error))
                continue
            shown = (name if names.count(name) == 1 else directory) + f" {weights}" * (len(several) > 1)
            for step in steps:
                path = files.below(folder, f"{asked.name}.json" if asked.compares else f"{asked.name}/{step}.json")
                found.append(Target(shown, directory, result.config, step, weights, path, pace, held_out))
    if not found:
        raise WorkdirError(lacking[0] if lacking else f"--workdir={', '.join(options.workdir)}: must hold a run")
    for line in lacking:
        progress.line(f"left out  {line}")
    return found


def _steps(directory: str, options: Any, progress: Progress) -> list[int]:
    """The steps of a run's checkpoints that are asked for. WorkdirError where it has none of them."""
    from steppe.lm.keep import saved

    if options.step == "last":
        return [saved.newest(directory, options.trust, progress.line)]
    steps = saved.steps(directory, options.trust)
    wanted = [step for step in steps if options.step == "all" or step == int(options.step)]
    if not wanted:
        have = ", ".join(map(str, steps)) or "none"
        raise WorkdirError(f"{directory}: --step={options.step}: must be one of its checkpoints, which are {have}")
    return wanted


def measure(asked: Asked, targets: Sequence[Target], found: dict[Path, dict], progress: Progress) -> int:
    """Measures those that are not found yet, writes their files and adds them; one that cannot be is passed over.

    Says the expected cost first. Returns the number of those for which --minutes has no time.
    """
    for target in targets:
        if target.path in found:
            progress.line(f"{target.name}: already measured")
    left, programs, late = spread([target for target in targets if target.path not in found]), {}, []
    limit = 60 * asked.options.minutes if asked.options.step == "all" else 0
    costs = [asked.measurement.costs(target.config, asked.settings, target.held_out) for target in left]
    seconds = [sum(cost.values()) * target.pace for cost, target in zip(costs, left, strict=True)]
    progress.expect([asked.measurement.COMPILING * (number == 0) + each for number, each in enumerate(seconds)], 1.0)
    progress.line(expected(asked, left, seconds, limit))
    for target, cost in zip(left, costs, strict=True):
        if limit and target != left[0] and progress.spent + progress.next > limit:
            late.append(target)
            continue
        progress.begin(f"{target.directory} step {target.step}", cost)
        try:
            found[target.path] = examine(asked, target, programs, progress)
            progress.end(str(target.path))
        except REFUSALS as error:
            if len(left) == 1:
                raise
            progress.end(f"{target.directory} step {target.step} IS PASSED OVER: {error}")
    if late:
        steps = ", ".join(f"{target.name} step {target.step}" for target in late)
        progress.line(f"left out  {steps}: no time within --minutes={asked.options.minutes:g}; 0 sets no limit, and "
                      "--skip_done measures only these")  # fmt: skip
    return len(late)


def expected(asked: Asked, left: Sequence[Target], seconds: Sequence[float], limit: float) -> str:
    """A line on what measuring will cost."""
    checkpoints = f"{len(left)} checkpoint{'s' * (len(left) != 1)}"
    known = [each for each in seconds if each == each]
    told = f"about {clock_face(sum(known))} at the speed of training" if known else "of a time that no record tells"
    compiling = f"and about {clock_face(asked.measurement.COMPILING)} of compiling"
    at_most = f"; at most {clock_face(limit)}, spread over the run" if limit and len(left) > 1 else ""
    return f"expected  {checkpoints}, {told} {compiling}{at_most}"


def spread(targets: Sequence[Target]) -> list[Target]:
    """Targets in an order of which every beginning covers the training: the newest of each run, then the one that is
    farthest from those before it."""
    ranked = []
    for weights, directory in dict.fromkeys((target.weights, target.directory) for target in targets):
        own = [target for target in targets if (target.weights, target.directory) == (weights, directory)]
        chosen = [max(own, key=lambda target: target.step)]
        while rest := [target for target in own if target not in chosen]:
            chosen.append(max(rest, key=lambda target: min(abs(target.step - other.step) for other in chosen)))
        ranked += enumerate(chosen)
    return [target for _, target in sorted(ranked, key=lambda each: each[0])]


def examine(asked: Asked, target: Target, programs: dict, progress: Progress) -> dict[str, Any]:
    """Measures one checkpoint, writes its file and plots, and returns what was found."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.keep import saved

    began, quiet, trust = time.perf_counter(), lambda line: None, asked.options.trust
    directory, step, measurement = target.directory, target.step, asked.measurement
    run = saved.load(directory, step, log=quiet, optimizer=True, weights=target.weights, trust=trust)
    if jax.tree.reduce(lambda bad, leaf: bad or not bool(jnp.all(jnp.isfinite(leaf))), run.params, False):
        raise Unusable(f"{directory}: the checkpoint of step {step} holds parameters that are not finite")

    def other(workdir: str) -> Any:
        there = saved.load(workdir, log=quiet, trust=trust).params
        if jax.tree.map(jnp.shape, there) != jax.tree.map(jnp.shape, run.params):
            raise WorkdirError(f"{workdir}: must be a run of the same model as {directory}")
        return there

    measured = measurement.measure_run(run, asked.settings, programs, other, progress.tick)
    found = {"summary": measured["summary"], "step": step, "weights": run.weights}
    found |= {"settings": asked.settings._asdict(), "seconds": time.perf_counter() - began} | measured
    found["settings"]["devices"] = run.parts.mesh.size
    target.path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(target.path, found, digits=getattr(measurement, "DIGITS", None))
    with plot.styled(font_size=9, lines_linewidth=1.5):
        for name, figure in getattr(measurement, "draw", lambda found: {})(found).items():
            title = f"{target.path.parents[1].resolve().name}, step {step}"
            _save(figure, title, target.path.with_name(f"{name}-{step}.png"))
    return found


def conclude(asked: Asked, targets: Sequence[Target], found: dict[Path, dict]) -> None:
    """Draws each run over its training, and prints a line a checkpoint."""
    import pandas as pd

    for directory in dict.fromkeys(target.directory for target in targets):
        over_training(asked.measurement, directory)
    rows = {f"{target.name}:{target.step}": found[target.path]["summary"] for target in targets}
    titles = asked.measurement.TITLES
    table = pd.DataFrame(rows.values(), index=list(rows), columns=list(titles), dtype=float).rename(columns=titles)
    process.say(table.to_string(float_format="{:.4g}".format, na_rep="-"))
    for name, summary in rows.items():
        if said := getattr(asked.measurement, "note", lambda summary: "")(summary):
            process.say(f"{name}  {said}")


def over_training(measurement: ModuleType, workdir: str) -> None:
    """Draws NAME/training.png from every STEP.json and what the run recorded itself under this name."""
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


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    plot.save(figure, path, dpi=150)


# -------------------------------------------------------------------------------------------------------------- configs
def of_configs(name: str, measurement: ModuleType, argv: Sequence[str]) -> int:
    """Measures models of a config; writes NAME.csv and NAME.png, and prints a line a model."""
    parser = command.parser(name, command.headline(measurement.__doc__))
    parser.add_argument("--out", required=True, type=command.writable_directory, help="where both go")
    command.add_settings(parser, measurement.Settings)
    config, options = command.parse(argv, parser)
    settings = command.settings_of(options, measurement.Settings)
    with Progress(f"{name}: making the models") as progress:
        process.ready_to_compute()
        import jax
        import pandas as pd

        from steppe.lm.parts.check import check

        made, found = measurement.configs(config, settings), {}
        for each in made.values():
            check(each, device_count=len(jax.devices()), backend=jax.default_backend())
        progress.expect([measurement.cost(each) for each in made.values()])
        for key, each in made.items():
            progress.begin(" ".join(map(str, key)))
            found[key] = measurement.measure_config(each, settings, progress.tick)
            progress.end(" ".join(map(str, key)))
    frame = pd.DataFrame(found.values(), pd.MultiIndex.from_tuples(found)).rename_axis(columns=measurement.COLUMNS[-2])
    frame = frame.rename_axis(index=measurement.COLUMNS[:-2])
    options.out.mkdir(parents=True, exist_ok=True)
    sheet, picture = (options.out / f"{name}.{kind}" for kind in ("csv", "png"))
    files.write(sheet, frame.stack().to_csv(header=measurement.COLUMNS[-1:], float_format="%.6g"))
    with plot.styled():
        plot.save(measurement.draw(frame), picture, dpi=150)
    process.say(frame.to_string(float_format="{:.3g}".format, na_rep="-"))
    process.say(f"\n{measurement.note(frame)}\nwrote {sheet} and {picture}")
    return 0
