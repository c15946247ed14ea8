"""The runs of a judgement: a sweep that grows stage by stage, and its results."""

import functools
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from steppe.configs.keys import ConfigError, flatten
from steppe.configs.read import UsageError, reader
from steppe.data import files
from steppe.scripts import results
from steppe.scripts.results import Result
from steppe.scripts.sweep.__main__ import identity, runs_of
from steppe.scripts.sweep.__main__ import main as sweep

STAGES, PACKED, BEGAN = "stages", "runs.jsonl", "judge.json"


class Began(TypedDict):
    """judge.json."""

    config: str
    overrides: list[tuple[str, str]]


Find = Callable[[Mapping[str, str]], Result | None]


class Stopped(Exception):
    """A stage ended before its runs did; status: to exit with."""

    def __init__(self, status: int):
        self.status = status


class Cost(NamedTuple):
    """Of runs: FLOPs, and seconds from their starts to their ends, one after the other."""

    flops: float = 0.0
    seconds: float = 0.0

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This, and another times a number."""
        return Cost(self.flops + times * other.flops, self.seconds + times * other.seconds)


class Budget(NamedTuple):
    """What a judgement may cost. unit: FLOPs, or hours of the machine with its runs side by side."""

    amount: float
    unit: str

    def allows(self, cost: Cost, jobs: int) -> bool:
        """Whether runs of this cost, `jobs` at a time, are within it."""
        return (cost.flops if self.unit == "FLOPs" else cost.seconds / jobs / 3600) <= self.amount


HOURS = {"second": 1 / 3600, "minute": 1 / 60, "hour": 1.0, "day": 24.0}


def budget(text: str) -> Budget:
    """A budget from a command line; ArgumentTypeError."""
    number = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e\+?[0-9]+)?)"
    match = re.fullmatch(number + r" ?(second|minute|hour|day|FLOP)?s?", text.strip(), re.IGNORECASE)
    amount = float(match[1]) if match else math.nan
    if match is None or not 0 < amount < math.inf:
        raise ArgumentTypeError(f"{text}: must be a time above zero like '6 hours', or FLOPs like 1e15")
    unit = (match[2] or "flop").lower()
    return Budget(amount, "FLOPs") if unit == "flop" else Budget(amount * HOURS[unit], "hours")


class Arena(NamedTuple):
    """Where runs are made. directory: a sweep's, which may have packed runs too; path, overrides: of its config.

    launch: the flags of sweep.__main__.add_launch; jobs: runs at a time. label: of its stages, where there are several
    arenas in one directory. complete: whether all runs have to be there.
    """

    directory: Path
    path: str
    overrides: list[tuple[str, str]]
    launch: Any
    jobs: int
    label: str
    complete: bool

    def make(self, stage: str, runs: Sequence[Mapping[str, str]], halving: Mapping[str, Any] = {}) -> Find:
        """Makes runs that lack, by steppe sweep; returns what `read` does. halving: as in a spec. Raises Stopped."""
        find = self.read()
        if all(map(find, runs)):
            return find
        if self.complete:
            raise UsageError(f"--again: must be left out, {self.directory} lacks runs of its stage {stage}")
        file, launch = self.directory / STAGES / f"{stage}{self.label}.py", self.launch
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"        {dict(run)!r},\n" for run in runs if halving or find(run) is None)
        block = f"{{'blocks': [{{'list': [\n{lines}    ]}}], 'halving': {dict(halving)!r}}}"
        files.write(file, f"def get_spec():\n    return {block}\n")
        line = [f"--config={self.path}", *(f"--config.{key}={text}" for key, text in self.overrides)]
        line += [f"--sweep={file}", f"--out={self.directory}", *(f"--slurm={each}" for each in launch.slurm)]
        line += [f"--{name}={getattr(launch, name)}" for name in ("launcher", "jobs", "cores", "devices")]
        if (status := sweep([*line, *["--wait"] * (launch.launcher != "local")])) not in (0, 1):
            raise Stopped(status)  # 1: a run failed, which is judged as one that diverged
        return self.read()

    def estimate(self, runs: Sequence[Mapping[str, str]]) -> tuple[list[Any], Any]:
        """Some runs as `planned`, and the sweep.plan.Speed of these."""
        from steppe.scripts.sweep import launch, plan

        made = self.planned(runs)
        outcomes = {run.name: launch.settle(run.directory) for run in made}
        return made, plan.speed(made, outcomes, self.launch.cores, plan.devices_of(self.launch)[1])

    def planned(self, runs: Sequence[Mapping[str, str]]) -> list[Any]:
        """Some runs with their steps and FLOPs. Raises UsageError or ConfigError for one that is refused, DataError."""
        from steppe.scripts.sweep import plan

        where, record = plan.devices_of(self.launch), results.read_sweep(self.directory)
        alone = [runs_of(self.path, self.overrides, [dict(run)], self.directory, record, *where)[0] for run in runs]
        return plan.with_budgets([run for found in alone for run in found], log=print)

    def can(self, run: Mapping[str, str]) -> bool:
        """Whether a run's config is one that can run."""
        from steppe.lm.parts.check import check

        try:
            check(_reader(self.path)(list((dict(self.overrides) | dict(run)).items())), device_count=None)
        except (UsageError, ConfigError):
            return False
        return True

    def read(self) -> Find:
        """find(overrides of a run) -> its Result once it has ended; None where it has not."""
        marks = {results.SWEEP: self.directory, PACKED: self.directory / PACKED}
        places = [place for mark, place in marks.items() if (self.directory / mark).exists()]
        there = results.read(places, left_out=lambda line: None) if places else []
        known = {identity(run.config): run for run in there if run.status != "unfinished"}
        return lambda run: known.get(_identity(self.path, tuple((dict(self.overrides) | dict(run)).items())))


_reader = functools.cache(reader)  # which says once what gives way


@functools.cache
def _identity(path: str, texts: tuple[tuple[str, str], ...]) -> str:
    """The identity of a config with overrides."""
    return identity(flatten(_reader(path)(list(texts)).to_dict()))


def loss(result: Result | None) -> float:
    """Held-out nats a byte at the end; inf where a run diverged or failed."""
    value = result.bits_per_byte * math.log(2) if result and result.status == "finished" else math.inf
    return value if math.isfinite(value) else math.inf


def cost(result: Result) -> Cost:
    """What a run took."""
    return Cost(result.flops, result.took or result.seconds)


def costs(found: Iterable[Result]) -> dict[tuple[str, str], Cost]:
    """{run: what it took}, each once."""
    return {(str(run.directory), run.name): cost(run) for run in found}


def average(result: Result, name: str) -> Result | None:
    """The same run by an average of its weights; "": by these themselves."""
    return next((each for each in (result._replace(weights=""), *result.averages) if each.weights == name), None)


def must_be_new_or_same(directory: Path, path: str, overrides: Sequence[tuple[str, str]], keep: bool = True) -> None:
    """Raises UsageError if the judgement in a directory began with another config. keep: whether to store this one."""
    file = directory / BEGAN
    if file.exists() and (known := began_with(directory)) != (path, [*overrides]):
        shown = " ".join(f"--config.{key}={text}" for key, text in known[1])
        raise UsageError(f"--out = {directory}: began with --config={known[0]} {shown}: give the same, or another")
    if keep:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_json(file, {"config": path, "overrides": [list(each) for each in overrides]})


def began_with(directory: Path) -> tuple[str, list[tuple[str, str]]]:
    """(config, overrides) that a judgement in a directory began with. Raises UsageError where there is none."""
    found = results.read_json(directory / BEGAN, Began)
    if not found:
        raise UsageError(f"{directory}: must be a directory of steppe judge, with a {BEGAN}")
    return found["config"], [(key, text) for key, text in found["overrides"]]


def file_name(name: str) -> str:
    """A contender's name as one of files."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)
