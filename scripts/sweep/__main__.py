"""Start many runs with one command, such as rho x scale x method; it runs only what is missing.

    steppe sweep --config=FILE --sweep=SPEC --out=DIR [--config.key=value ...] [--jobs=N] [--plan]
    steppe sweep --config=FILE --grid optim.method=sam,functional_sam --grid optim.rho=0.01,0.03 --out=DIR

SPEC is a named sweep, or a Python file with get_spec() (see steppe.scripts.sweep.spec). Every run is an ordinary run in
DIR/runs/NAME. Run the command again, also with more values, and it runs what is missing. Exit status:
0; 1 if a run failed; 2 for bad input; 75 if it stopped before the end.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.configs import only
from steppe.configs.base import FREE, with_defaults
from steppe.configs.keys import ConfigError, named
from steppe.configs.packages import ready
from steppe.configs.read import reader
from steppe.data import files
from steppe.lm.keep.exits import STATUSES, STOPPED
from steppe.scripts import command, process, results
from steppe.scripts.sweep import halving as sweep_halving
from steppe.scripts.sweep import launch as sweep_launch
from steppe.scripts.sweep import plan as sweep_plan
from steppe.scripts.sweep import slurm as sweep_slurm
from steppe.scripts.sweep import spec as sweep_spec
from steppe.scripts.sweep.plan import Run
from steppe.scripts.sweep.view import View

LAUNCHERS = ("local", "slurm", "print")
_SWEEP_HELP = "a module or file with get_spec(), or one of " + ", ".join(ready(sweep_spec.PACKAGE, "get_spec"))


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Plans and runs a sweep; returns the exit status."""
    parser = command.parser("sweep", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=command.writable_directory, help="the directory")
    spec = add("--sweep", metavar="SPEC", help=_SWEEP_HELP)
    command.complete_by(spec, command.names(sweep_spec.PACKAGE, "get_spec"))
    command.add_texts(parser, "--grid", "KEY=V,V", "all combinations (repeatable)")
    command.add_texts(parser, "--zip", "KEY=V,V", "values in step (repeatable)")
    command.add_only(parser)
    add("--plan", action="store_true", help="print the runs and their cost, then stop")
    add("--retry", action="store_true", help="also repeat runs that failed")
    add("--halving", nargs="?", const="", metavar="ETA:RUNG,RUNG", help="stop runs with a bad rho early (2:0.25,0.5)")
    add_launch(parser, LAUNCHERS)
    add("--wait", action="store_true", help="with --launcher=slurm: until every run has ended")
    add("--order", default="cheapest", choices=("cheapest", "listed"), help="order of the runs")
    path, overrides, options = command.parse_unread(argv, parser)
    return _sweep(path, _once(overrides), options)


def add_launch(parser: argparse.ArgumentParser, launchers: Sequence[str]) -> None:
    """Adds the flags that say where runs execute, and how many at a time."""
    parser.add_argument("--launcher", default="local", choices=launchers, help="where the runs execute")
    parser.add_argument("--jobs", type=command.integer(), default=0, help="runs at a time (default: cores / --cores)")
    parser.add_argument("--cores", type=command.integer(1), default=1, help="cores per run")
    command.add_texts(parser, "--slurm", "NAME=VALUE,...", "submitit parameters: partition, time (minutes)...")
    parser.add_argument("--devices", type=command.integer(1), default=1, help="devices per run on slurm, print")


def _sweep(path: str | None, overrides: list, options: Any) -> int:
    path = command.required(path)
    assignments, halving = _assignments(options)
    if options.wait and options.launcher != "slurm":
        raise command.UsageError(f"--wait: must be left out with --launcher={options.launcher}")
    if halving is not None and options.launcher != "local":
        raise command.UsageError(f"--launcher={options.launcher}: must be local with --halving, which compares runs")
    record = results.read_sweep(options.out)
    if record and record["config"] != path:
        raise command.UsageError(f"--config = {path}: must be {record['config']}, the config of {options.out}")
    device_count, backend = sweep_plan.devices_of(options)
    jobs = sweep_plan.at_a_time(options, backend)
    slurm = sweep_slurm.parameters_of(options.slurm)
    runs, record = runs_of(path, overrides, assignments, options.out, record, device_count, backend)
    runs = sweep_plan.with_budgets(only.matching(runs, options.only, lambda run: run.flat), log=print)

    outcomes = {run.name: sweep_launch.settle(run.directory) for run in runs}
    if options.retry:
        outcomes = {name: {} if outcome.get("status") == "failed" else outcome for name, outcome in outcomes.items()}
    statuses = {name: outcome.get("status", "unfinished") for name, outcome in outcomes.items()}
    speed = sweep_plan.speed(runs, outcomes, options.cores, backend)
    quiet = options.launcher == "print"
    process.say(sweep_plan.table(runs, statuses, speed, jobs), sys.stderr if quiet else None)
    _warn_of_other_code(outcomes)
    left = [run for run in runs if statuses[run.name] == "unfinished"]
    if options.order == "cheapest":
        left.sort(key=lambda run: run.flops)
    if options.plan:
        return 0

    options.out.mkdir(parents=True, exist_ok=True)
    with sweep_launch.locked(options.out):
        files.write_json(options.out / results.SWEEP, _grown(options.out, record, runs))
        for run in left:
            (run.directory / results.OUTCOME).unlink(missing_ok=True)
        if quiet:
            for run in left:
                print(shlex.join(sweep_launch.command_line(run, path)))
            return 0
        from steppe.data import cache

        for data in {json.dumps(run.config.data.to_dict()): run.config.data for run in left}.values():
            cache.ensure(data, process.say)  # before they start, so that concurrent runs do not wait for it
        if options.launcher == "slurm":
            for line in sweep_slurm.submit(left, path, options.out, options.jobs, options.cores, slurm):
                process.say(line)
            if not options.wait:
                return 0
            with View(runs, speed, options.jobs or len(left)) as view:
                return _summary(runs, sweep_slurm.wait(left, view), None)
        slots = sweep_launch.slots_of(jobs, options.cores, sweep_plan.usable_cores())

        def launch(some: list, until: dict[str, int]) -> bool:
            with View(runs, speed, jobs, until) as view:
                return sweep_launch.run_local(some, path, slots, view, until)

        complete = halving is None or _halve(runs, left, halving, launch)
        complete = complete and launch([run for run in left if not run.outcome], {})
    return _summary(runs, complete, halving)


def _once(overrides: list[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """The overrides with one text per key: a flag without a value becomes true, several values a tuple."""
    texts = {}
    for key, text in overrides:
        texts.setdefault(key, []).append("true" if text is None else text)
    return [(key, found[0] if len(found) == 1 else repr(tuple(found))) for key, found in texts.items()]


def _assignments(options: Any) -> tuple[list[dict[str, str]], sweep_halving.Halving | None]:
    if not (options.sweep or options.grid or options.zip):
        raise command.UsageError("--sweep is missing: name a spec, or give --grid and --zip")
    found = sweep_spec.expand([sweep_spec.from_flags(options.grid, options.zip)])
    halving = None if options.halving is None else sweep_halving.parse(options.halving)
    if options.sweep:
        blocks, given = sweep_spec.load(options.sweep)
        found = [run | other for run in sweep_spec.expand(blocks) for other in found]
        halving = halving or (None if given == {} else sweep_halving.settings(given))
    if not found:
        raise command.UsageError(f"--sweep = {options.sweep}: no run is left after its filters")
    return found, halving


def identity(flat: Mapping[str, Any], swept: Collection[str] = ()) -> str:
    """What a flat config computes: its keys but those that change nothing of it, unless they are `swept`."""
    # A record of another version may lack keys: they have their defaults, which is None for options.
    said = {key: value for key, value in with_defaults(flat).items() if value is not None}
    return json.dumps({key: said[key] for key in said if key in swept or key not in FREE}, sort_keys=True)


def runs_of(
    path: str, overrides: list, assignments: list[dict[str, str]], out: Path, record: dict, device_count: int, backend
) -> tuple[list, dict]:
    """(the runs, checked, named and without duplicates; the record of the sweep). Raises UsageError, DataError.

    A run is known by the `identity` of its resolved config, so it keeps its name and results when the sweep grows.
    """
    from steppe.lm.parts.check import check

    read = reader(path)
    base = results.flatten(read(overrides).to_dict())
    record = record or {"config": path, "base": base, "runs": {}, "resolved": {}}
    swept = {key for run in assignments for key in run}

    known = {identity({**record["base"], **changed}, swept): name for name, changed in record["resolved"].items()}
    found = {}
    for assignment in assignments:
        texts = [*overrides, *assignment.items()]
        try:
            config = read(list({key: (key, text) for key, text in texts}.values()))
            check(config, device_count=device_count, backend=backend)
        except (command.UsageError, ConfigError) as error:
            shown = " ".join(f"{key}={text}" for key, text in assignment.items())
            raise command.UsageError(f"run {shown}: {error}") from None
        flat = results.flatten(config.to_dict())
        found.setdefault(identity(flat, swept), (dict(texts), config, flat))

    everything = [{**record["base"], **changed} for changed in record["resolved"].values()]
    everything += [flat for _, _, flat in found.values()]
    varying = [key for key in results.varying_keys(everything) if key in swept or key not in FREE]
    runs, taken = [], set(record["runs"])
    for key, (texts, config, flat) in found.items():
        name = known.get(key) or sweep_spec.name_run(flat, varying, taken)
        taken.add(name)
        for part, text in {"group": out.resolve().name, "name": name}.items():
            if not config.log[part]:
                texts[f"log.{part}"] = flat[f"log.{part}"] = config.log[part] = text
        runs.append(Run(name, out / results.RUNS / name, list(texts.items()), config, flat))
    return runs, record


def _grown(out: Path, record: dict, runs: list) -> dict:
    """sweep.json with these runs added to those that it has by now."""
    record = results.read_sweep(out) or record
    base = record["base"]
    for run in runs:
        changed = {key: value for key, value in run.flat.items() if value != base.get(key, "absent")}
        record["runs"].setdefault(run.name, dict(run.overrides))
        record["resolved"].setdefault(run.name, changed)
    return record


def _halve(runs: list, left: list, halving: sweep_halving.Halving, launch: Callable[[list, dict], bool]) -> bool:
    """Executes groups up to each rung and ends their worse runs; False if a signal stopped it."""
    groups, order = sweep_halving.groups(runs, halving.over), [run.name for run in left]
    for number, fraction in enumerate(halving.rungs, 1):
        steps = {run.name: sweep_halving.rung_step(run, fraction) for group in groups for run in group}
        some = [run for group in groups for run in group if sweep_halving.is_to_reach(run, steps[run.name])]
        some.sort(key=lambda run: order.index(run.name))
        if some and not launch(some, {run.name: steps[run.name] for run in some}):
            return False
        for group in groups:
            if step := steps[group[0].name]:
                for run in sweep_halving.prune(group, step, halving.eta**-number):
                    process.say(f"pruned    {run.name}  {run.outcome['why']}")
    return True


def _warn_of_other_code(outcomes: dict[str, dict]) -> None:
    """Warns if results come from other source code of data, lm and optim than the current one."""
    made = [outcome["code"] for outcome in outcomes.values() if outcome.get("code")]
    here = named("lm.keep.record:versions")()["code"] if made else ""
    other = sum(code != here for code in made)
    if other:
        print(f"code    {other} of {len(made)} results were made by other source code", file=sys.stderr, flush=True)


def _summary(runs: list, complete: bool, halving: sweep_halving.Halving | None) -> int:
    outcomes = {run.name: run.outcome for run in runs}
    if halving is not None:
        process.say(sweep_halving.saved(runs))
    ends = [outcome.get("status", "unfinished") for outcome in outcomes.values()]
    process.say(", ".join(f"{ends.count(status)} {status}" for status in STATUSES if status in ends))
    for name, outcome in outcomes.items():
        if outcome.get("status") in ("failed", "diverged"):
            process.say(f"{outcome['status']:<10}{name}: {outcome.get('why', '')}")
    if not complete or "unfinished" in ends:
        process.say("run the same command again to continue")
        return STOPPED
    return 1 if "failed" in ends else 0
