"""Reads the files of runs and sweeps for tables, figures and estimates. Imports no jax; has no command.

    for result in results.read("sweeps/rho"): print(result.name, result.status, result.loss)

A sweep's directory holds `sweep.json`, written by steppe sweep, with the config of every run, and `runs/NAME/`, the
ordinary workdirs of steppe train. A run that has ended for good also has `outcome.json`. `steppe report pack` writes
runs into one file, which is read like the directory.
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Required, TypedDict, get_type_hints

from steppe.configs.base import FREE, typed, with_defaults
from steppe.configs.keys import ConfigError, flatten
from steppe.configs.only import matching
from steppe.configs.packages import ready
from steppe.configs.read import UsageError
from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.data.manifest import DESCRIBED
from steppe.lm.keep import exits
from steppe.lm.measure.frontier import Details, FineTune
from steppe.lm.track import goodput as goodputs
from steppe.lm.track import lines

SWEEP, RUNS, OUTCOME = "sweep.json", "runs", "outcome.json"
MEASURED = tuple(ready("steppe.lm.measure", "measure_run"))  # names of the measurements of checkpoints
PACK = ".jsonl"  # suffix of a file of packed runs
# Keys that model.size sets, so they need not be named in addition to it.
OF_SIZE = ("model.layers", "model.width", "model.heads", "model.mlp_width")


class ResultsError(UsageError):
    """A directory without results, or with damaged ones; one line."""


class Sweep(TypedDict):
    """sweep.json. config, base: name and flat keys of the sweep's config; runs: {run: overrides}, also resolved."""

    config: str
    base: stored.Flat
    runs: dict[str, dict[str, str]]
    resolved: dict[str, stored.Flat]


class Outcome(TypedDict, total=False):
    """outcome.json: how a run of a sweep ended for good."""

    status: Required[Literal["finished", "diverged", "failed", "pruned"]]
    exit: int
    why: str
    seconds: stored.Amount
    cpu_seconds: stored.Amount
    train_seconds: stored.Amount
    flops: stored.Amount
    code: str
    loss: float | None


class Attempt(TypedDict):
    """One attempt at a run of a sweep, in seconds since 1970; ended: None until the end is recorded."""

    began: stored.Amount
    ended: stored.Amount | None
    cpu: stored.Amount


class Attempts(TypedDict):
    """attempts.json."""

    attempts: list[Attempt]


class Measurement(TypedDict, total=False):
    """A measurement of a checkpoint by steppe curvature, retention or another command."""

    step: Required[stored.Count]
    summary: Required[dict[str, float | None]]
    details: Details
    fine_tune: dict[str, Any] | None
    settings: dict[str, Any]


class Point(NamedTuple):
    """A loss after `step` updates, nats a token; seconds: training time until then; flops: of the method."""

    step: stored.Count
    tokens: stored.Count
    flops: float
    seconds: float
    loss: float


class Result(NamedTuple):
    """One run. Unknown fields are NaN, 0 or empty.

    config: {"optim.rho": 0.03, ...}, every key. varied: the keys that differ between the runs read together.
    status: finished | diverged | failed | pruned | unfinished; why: its reason. A completed run has diverged if its
    loss is not finite, or if it is above a unigram model's and more than a twentieth above the run's lowest. A run
    merely above the unigram model has finished, and `why` says so.
    parameters: non-embedding. steps, tokens, flops, adamw_flops: of the whole planned run; the last two in FLOPs of
    the method and of plain AdamW. seconds: of training so far, without compiling, evaluating and saving.
    loss, bits_per_byte: after the last step, on the whole first held-out set (nats a token; bits a byte). curve:
    held-out losses of that set during the run; train_curve: losses of every training step. code: hash of the sources.
    held_out: tokens of the whole first held-out set.
    branch: NAME@STEP of the run and step that it branched from, whose steps are included in its own.
    goodput: the share of wall-clock time, over all starts, spent in steps.
    averages: a Result for each average of the weights, as if it were a run; `weights` is the average's name, and its
    directory holds the measurements of that average.
    curvature: the numbers of each checkpoint that steppe curvature measured, in order, with its "step".
    measured: the numbers of other measurements at the newest checkpoint, by name.
    retention: those of steppe retention; fine_tune: {"text": fingerprint of the second text, "loss": before,
    "paths": [{"rate", "points": [{"step", "gained", "lost"}]}]}, nats a token.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    varied: dict[str, Any]
    status: str
    train_curve: lines.Train
    why: str = ""
    parameters: stored.Count = 0
    total_parameters: stored.Count = 0
    steps: stored.Count = 0
    tokens: stored.Count = 0
    flops: float = math.nan
    adamw_flops: float = math.nan
    seconds: stored.Amount = 0.0
    loss: float = math.nan
    bits_per_byte: float = math.nan
    curve: Sequence[Point] = ()
    code: str = ""
    held_out: stored.Count = 0
    branch: str = ""
    took: stored.Amount = 0.0
    goodput: float = math.nan
    weights: str = ""
    averages: tuple["Result", ...] = ()
    curvature: tuple[dict[str, Any], ...] = ()
    measured: Mapping[str, Any] = MappingProxyType({})
    retention: Mapping[str, Any] = MappingProxyType({})
    fine_tune: Mapping[str, Any] = MappingProxyType({})


_NUMBERS = dict[str, float | None]
_TYPES = get_type_hints(Result, include_extras=True)
_MADE: Any = TypedDict  # type checkers accept only literal fields
# The first line of a file of packed runs: the keys that are equal in all of them.
_ALIKE = _MADE("Alike", {"config": stored.Flat})
# A run in a file of packed runs: a Result without its empty fields.
_PACKED = _MADE(
    "Packed",
    {
        **{key: kind for key, kind in _TYPES.items() if key in Result._field_defaults},
        "name": Required[str], "status": Required[Literal[exits.STATUSES]], "config": stored.Flat,
        "averages": list[dict[str, Any]], "curvature": list[_NUMBERS], "measured": dict[str, _NUMBERS],
        "retention": _NUMBERS, "fine_tune": FineTune,
    },
    total=False,
)  # fmt: skip


def _say(line: str) -> None:
    print(files.visible(line), file=sys.stderr, flush=True)


def read(
    runs: str | os.PathLike | Iterable[str | os.PathLike],
    only: Sequence[str] = (),
    left_out: Callable[[str], None] = _say,
) -> list[Result]:
    """Reads the runs of a sweep's directory, of a workdir, or of several workdirs or patterns, without duplicates.

    only: --only flags, see configs.only.matching. left_out: is called with a line for each damaged run or measurement.
    ResultsError if no run remains, or if a directory holds no runs.
    """
    given = _listed(runs)
    problems: list[ResultsError] = []

    def leave_out(error: ResultsError) -> None:
        problems.append(error)
        left_out(f"{error}; the run is left out")

    found = [result for each in given if is_pack(each) for result in unpack(Path(each), leave_out)]
    once: dict[str, tuple] = {}
    for place in places([each for each in given if not is_pack(each)]):
        once.setdefault(os.path.realpath(place[1]), place)
    for name, directory, planned in once.values():
        try:
            found.append(_of_workdir(name, directory, planned, left_out))
        except ResultsError as error:
            if len(once) == 1 and not found and not problems:
                raise
            leave_out(error)
    if not found:
        raise ResultsError(f"{', '.join(given)}: no run could be read")
    found = matching(_described(found), only, lambda result: result.config)
    flats = [result.config for result in found]  # other versions may have written other keys
    varying = varying_keys(flats)

    every = dict.fromkeys(key for flat in flats for key in flat)

    def told_apart(result: Result) -> Result:
        config = result.config | {key: None for key in every if key not in result.config}
        varied = {key: config[key] for key in varying}
        return result._replace(config=config, varied=varied, averages=tuple(map(told_apart, result.averages)))

    return [told_apart(result) for result in found]


def _described(found: list[Result]) -> list[Result]:
    """Fills in the source of a prepared directory for runs that have not begun, from runs on it that have."""
    keys = [f"data.{name}" for name in DESCRIBED]
    known = {
        result.config.get("data.directory"): {key: result.config[key] for key in keys if key in result.config}
        for result in found
        if result.steps
    }

    def described(config: dict[str, Any]) -> dict[str, Any]:
        return config | known.get(config.get("data.directory"), {})

    return [result if result.steps else result._replace(config=described(result.config)) for result in found]


def report_place(given: list[str], out: Path | None) -> Path:
    """The directory of a report: `out`, or DIR/report for one local directory. Otherwise UsageError."""
    if out is not None:
        return out
    if len(given) > 1 or files.is_remote(given[0]) or is_pack(given[0]):
        raise UsageError("--out is missing: it is required for several runs, a file or a URL")
    return files.below(given[0], "report")


def with_averages(found: Iterable[Result]) -> list[Result]:
    """Results, each followed by those of its averages."""
    return [each for result in found for each in (result, *result.averages)]


def places(runs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[tuple[str, Path, dict[str, Any]]]:
    """(name, workdir, planned flat config) of the runs that `read` reads, including those that have not begun.
    ResultsError as there."""
    directories: list[str] = []
    for given in _listed(runs):
        if files.is_remote(given):
            from steppe.lm.keep import mirror  # imported here because it needs jax, which reading local files does not

            directories.append(mirror.here(given))
        else:
            directories += files.matching(given, os.path.isdir) or [os.path.expanduser(given)]
    found = []
    for each in directories:
        inside = _places(Path(each), alone=len(directories) == 1)
        if not inside:
            remedy = "must be the directory of a sweep, or the workdir of a run, with a config.json"
            raise ResultsError(f"{each}: {remedy}; there is no run in it")
        found += inside
    return found


def _listed(runs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    return [os.fspath(each) for each in ([runs] if isinstance(runs, (str, os.PathLike)) else runs)]


def read_json(path: Path, kind: Any) -> dict:
    """A JSON object that Steppe wrote, of a type declared here; {} if there is no file. Raises ResultsError."""
    try:
        return stored.read(path, kind)
    except FileNotFoundError:
        return {}
    except DataError as error:
        raise ResultsError(error) from None


def measured(directory: Path, name: str) -> list[Path]:
    """The files of a measurement of a run: one per checkpoint, in order of steps, or a single one."""
    steps = [path for path in (directory / name).glob("*.json") if re.fullmatch("[0-9]{1,15}", path.stem)]
    alone = [directory / f"{name}.json"]
    return sorted(steps, key=lambda path: int(path.stem)) + [path for path in alone if os.path.lexists(path)]


def _measured(directory: Path, left_out: Callable[[str], None]) -> dict[str, Any]:
    """The measurements of a run or an average, as fields of its Result; damaged files are left out."""

    def numbers(path: Path) -> dict:
        try:
            return read_json(path, Measurement)
        except ResultsError as error:
            left_out(f"{error}; the measurement is left out")
            return {}

    read = {name: [*filter(None, map(numbers, measured(directory, name)))] for name in MEASURED}
    found = {name: [{"step": each["step"], **_known(each["summary"])} for each in own] for name, own in read.items()}
    newest = {name: each[-1] for name, each in found.items() if each}
    curvature, retention = tuple(found["curvature"]), newest.pop("retention", {})
    newest.pop("curvature", None)
    record = read["retention"][-1] if retention else {}
    tuned = record.get("details", {}).get("fine_tune") or {}
    tuned = tuned and {**tuned, "text": str((record.get("fine_tune") or {}).get("corpus", ""))}
    return {"curvature": curvature, "measured": newest, "retention": retention, "fine_tune": tuned}


def _known(summary: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in summary.items() if value is not None}


def read_sweep(directory: Path) -> dict:
    """The sweep.json of a directory, {} if absent. ResultsError if it is damaged or names a run outside of it."""
    path = directory / SWEEP
    found = read_json(path, Sweep)
    for name in found.get("runs", ()):
        try:
            files.below(directory / RUNS, name)
        except DataError as error:
            raise ResultsError(f"{path}: {error}") from None
        if "/" in name or name not in found["resolved"]:
            raise ResultsError(f"{path}: its run {name!r} must be the name of a folder, and be resolved")
    return found


def varying_keys(configs: list[dict[str, Any]]) -> list[str]:
    """The keys in which flat configs differ, in order.

    Omits log.*, shapes that model.size names, and keys that do not change the computation unless only they distinguish
    some runs.
    """

    def different(keys: list[str]) -> int:
        return len({json.dumps([flat.get(key) for key in keys]) for flat in configs})

    def varies(key: str) -> bool:
        first, *rest = (flat.get(key) for flat in configs)
        plain = first is None or isinstance(first, bool | int | float | str)
        same = plain and all(type(each) is type(first) and each == first for each in rest)
        return not same and different([key]) > 1

    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith("log."))
    named = all(flat.get("model.size") for flat in configs)
    found = [key for key in keys if not (named and key in OF_SIZE) and varies(key)]
    telling = [key for key in found if key not in FREE]
    return telling if different(telling) == different(found) else found


def _places(directory: Path, alone: bool) -> list[tuple[str, Path, dict[str, Any]]]:
    """(name, workdir, planned flat config) of the runs of a sweep, a workdir, or a folder of workdirs."""
    sweep = read_sweep(directory)
    if sweep:
        configs = {name: {**sweep["base"], **sweep["resolved"][name]} for name in sweep["runs"]}
        return [(name, directory / RUNS / name, config) for name, config in configs.items()]
    if (directory / "config.json").exists():
        return [(directory.name if alone else str(directory), directory, {})]
    return [(path.parent.name, path.parent, {}) for path in sorted(directory.glob("*/config.json"))]


def _whole(flat: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A flat config with checked types and with defaults for keys its version lacked; {} if empty. ResultsError."""
    try:
        return with_defaults(typed(stored.typed(flat, stored.Flat, str(path)))) if flat else {}
    except (DataError, ConfigError) as error:
        raise ResultsError(error if isinstance(error, DataError) else f"{path}: {error}") from None


def _of_workdir(name: str, directory: Path, planned: dict[str, Any], left_out: Callable[[str], None]) -> Result:
    """The Result of one run, without `varied`. planned: its flat config if it has not begun."""
    try:
        return _result(name, directory, planned, left_out)
    except OSError as error:
        raise ResultsError(f"{error.filename or directory}: cannot be read ({error.strerror or error})") from None
    except DataError as error:
        raise ResultsError(error) from None


def _result(name: str, directory: Path, planned: dict[str, Any], left_out: Callable[[str], None]) -> Result:
    path = directory / "config.json"
    config = _whole(flatten(read_json(path, dict[str, Any])), path) or _whole(planned, directory)
    if not config:
        raise ResultsError(f"{directory}: must be the workdir of a run, with a config.json")
    outcome = read_json(directory / OUTCOME, Outcome)
    records = lines.read(directory)
    train, runs = records.train, records.of("run")
    about = runs[-1] if runs else {}
    steps = about.get("steps", 0)
    train = train._replace(seconds=_seconds(train))

    def point(record: dict) -> Point:
        step = record["step"]
        at = int(train.step.searchsorted(step))
        recorded = at < len(train.step) and train.step[at] == step
        tokens, spent = (train.tokens[at], train.seconds[at]) if recorded else (0, 0.0)
        return Point(step, int(tokens), _flops(runs, step), float(spent), float(record["loss"]))

    evaluations = records.of("evaluate")
    first = evaluations[0]["name"] if evaluations else ""
    evaluations = [record for record in evaluations if record["name"] == first]
    unigrams = about.get("baselines", {})
    unigram = float(unigrams.get(f"unigram {first}", unigrams.get("unigram", math.inf)))

    def reached(evaluations: list[dict], directory: Path, unigram: float, ended: tuple[str, str]) -> dict[str, Any]:
        """What tells the run from an average of its weights, as fields of a Result."""
        last = exits.last_of(evaluations, steps)
        status, why = exits.status(records, evaluations, steps, unigram, ended)
        return {
            "directory": directory, "status": status, "why": why, "loss": float(last.get("loss", math.nan)),
            "bits_per_byte": float(last.get("bits_per_byte", math.nan)), "held_out": last.get("tokens", 0),
            "curve": [point(record) for record in evaluations], **_measured(directory, left_out),
        }  # fmt: skip

    parameters, goodput = about.get("parameters", {}), records.of("goodput")
    whole = Result(
        name=name,
        config=config,
        varied={},
        **reached(evaluations, directory, unigram, (outcome.get("status", ""), outcome.get("why", ""))),
        parameters=parameters.get("non_embedding", 0),
        total_parameters=parameters.get("total", 0),
        steps=steps,
        tokens=(int(train.tokens[-1]) if len(train.step) and train.step[-1] == steps else 0) or about.get("tokens", 0),
        flops=about.get("flops", about.get("flops_per_step", 0.0) * steps),
        adamw_flops=about.get("adamw_flops", about.get("adamw_flops_per_step", 0.0) * steps),
        seconds=float(max(train.seconds, default=0.0)),
        train_curve=train,
        code=about.get("versions", {}).get("code", ""),
        took=float(outcome.get("seconds", 0.0)),
        goodput=goodputs.share(goodput[-1]["goodput"]) if goodput else math.nan,
        branch=next((f"{Path(r['parent']).name}@{r['step']}" for r in reversed(records.of("branch"))), ""),
    )
    averages: dict[str, list[dict]] = {}
    for record in records.of("average"):
        if record["name"] == first:
            averages.setdefault(record["weights"], []).append(record)
    kept = [
        whole._replace(
            name=f"{name} {weights}",
            weights=weights,
            **reached(own, directory / lines.AVERAGES / weights, math.inf, (whole.status, whole.why)),
        )
        for weights, own in averages.items()
    ]
    return whole._replace(averages=tuple(kept))


def _flops(runs: list[dict], step: int) -> float:
    """FLOPs of the first `step` steps, each at the FLOPs a step of the start that executed it."""
    total, until = 0.0, step
    for run in reversed(runs):
        began = min(run["step"], until)
        total, until = total + run.get("flops_per_step", 0.0) * (until - began), began
    return total


def _seconds(train: lines.Train) -> Any:
    """Seconds of training until each step, [n].

    A run's clock restarts with each start and also counts evaluation and saving. A step recorded right after another
    event therefore counts as the median of the others.
    """
    import numpy as np  # imported here because commands that only plan and launch read no run

    gaps = np.diff(train.seconds, prepend=0.0)
    known = ~train.apart & (gaps > 0)
    typical = float(np.median(gaps[known])) if known.any() else 0.0
    return np.cumsum(np.where(known, gaps, typical))


# ------------------------------------------------------------------------------------------------------- runs as a file
def is_pack(given: str) -> bool:
    """Whether a path is a file of packed runs."""
    return given.endswith(PACK) and os.path.isfile(given)


def pack(found: Iterable[Result]) -> str:
    """Runs as text, without their training losses: a line of JSON each, below one with the keys equal in all of them.

    `read` accepts a file with this text like a directory of the runs.
    """
    found = list(found)
    alike = {
        key: value
        for key, value in found[0].config.items()
        if all(key in run.config and run.config[key] == value for run in found)
    }

    def plain(result: Result) -> dict:
        fields = {**result._asdict(), "directory": "", "varied": {}, "train_curve": None}
        fields["averages"] = [plain(each) for each in result.averages]
        fields["config"] = {key: value for key, value in result.config.items() if key not in alike}
        return {key: value for key, value in fields.items() if value not in (None, "", {}, [], ()) and value == value}

    return "".join(json.dumps(line) + "\n" for line in ({"config": alike}, *map(plain, found)))


def unpack(path: Path, left_out: Callable[[ResultsError], None]) -> list[Result]:
    """The runs in a file that `pack` wrote; `directory` is the file. left_out: is called for each damaged line.
    Raises ResultsError for any other file."""
    try:
        found, damaged = _unpacked(path, stored.content_of(path, 4 * stored.MOST))
    except FileNotFoundError:
        raise ResultsError(f"{path}: the file no longer exists") from None
    except DataError as error:
        raise ResultsError(f"{error}: must be a file that `steppe report pack` wrote") from None
    for error in damaged:
        left_out(error)
    return list(found)


@functools.lru_cache(maxsize=1)  # a verdict asks for the same runs at each of its looks
def _unpacked(path: Path, content: bytes) -> tuple[list[Result], list[ResultsError]]:
    import numpy as np

    nothing = lines.Train(*[np.zeros(0)] * len(lines.Train._fields))

    def made(fields: dict, alike: dict, place: str) -> Result:
        stored.typed(fields, _PACKED, place)
        known = {key: value for key, value in fields.items() if key in Result._fields}
        for key in ("steps", "tokens"):
            if known["status"] == "finished" and not known.get(key):
                raise stored.Wrong(f"{place}: {key} = 0: must be an integer >= 1 of a run that finished")
        parts = {
            "config": _whole({**alike, **fields.get("config", {})}, place),
            "curve": [Point(*point) for point in fields.get("curve", ())],
            "averages": tuple(made(each, alike, place) for each in fields.get("averages", ())),
            "curvature": tuple(map(_known, fields.get("curvature", ()))),
            "measured": {name: _known(each) for name, each in fields.get("measured", {}).items()},
            "retention": _known(fields.get("retention", {})),
        }
        return Result(**{**known, **parts, "directory": path, "varied": {}, "train_curve": nothing})

    found, damaged = [], []
    first, *rest = content.splitlines() or [b""]
    alike = stored.decode(first, _ALIKE, f"{path}: line 1")["config"]
    for number, line in enumerate(rest, 2):
        place = f"{path}: line {number}"
        try:
            found.append(made(stored.decode(line, dict[str, Any], place), alike, place))
        except (DataError, ResultsError) as error:
            damaged.append(ResultsError(error))
    return found, damaged
