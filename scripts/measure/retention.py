"""What trained models keep under weight noise, quantisation and fine-tuning on another text, side by side.

steppe retention --workdir=RUN_OR_SWEEP [--workdir=...] [--only=KEY=V,V] [--out=DIR] [--fine_tune=TASK]

Every number is an increase of the loss on the first held-out set, nats a token, over the same tokens for all runs.
WORKDIR/retention.json takes a run's numbers as soon as it is measured; a run that has them, of the same checkpoint with
the same settings, is not measured again. `forgetting_at_equal_gain` compares runs, so it is that of the last command.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

from steppe.data import files
from steppe.data import stored as stored_json
from steppe.data.errors import DataError
from steppe.lm.measure import frontier
from steppe.scripts import command, process

NAME = "retention.json"
POINTS = (0.125, 0.25, 0.5, 1.0)  # shares of the fine-tuning after which both losses are measured
HELD_OUT = 0.1  # share of the second corpus's documents held out
NO_TEXT = "none"


class Corpus(TypedDict, total=False):
    """Which text a number is of."""

    corpus: Required[str]


class Record(TypedDict):
    """retention.json, as far as a command reads again what one before it wrote."""

    step: stored_json.Count
    held_out: Corpus
    fine_tune: Corpus | None
    settings: dict[str, Any]
    summary: dict[str, float]
    details: dict[str, Any]


class Target(NamedTuple):
    """What to measure: its name in tables, the run's workdir, its flat config, the step of its checkpoint.

    weights: by name, None for those the run is judged by. directory: where its numbers go.
    """

    name: str
    workdir: Path
    config: dict
    step: int
    weights: str | None
    directory: Path


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Measures, writes WORKDIR/retention.json, prints a table; returns the exit status, 2 for bad input."""
    options = command.options_of(argv, _parser())

    process.ready_to_compute()
    from steppe.lm.keep import mirror
    from steppe.scripts.measure import retention_figures

    began = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    targets = find(options.workdir, options.only, options.step, log, options.weights or (None,), options.trust)
    settings = settings_of(options)
    _check_all(targets, settings, options)
    found, programs, first = {}, {}, None
    for number, target in enumerate(targets, 1):
        record = None if options.again else stored(target, settings)
        log(f"{number} of {len(targets)}  {target.name}" + (": already measured" if record else ""))
        if record is None:
            record = measure(target, settings, programs, first, lambda text: log(f"        {text}"), options.trust)
            target.directory.mkdir(parents=True, exist_ok=True)
            files.write_json(target.directory / NAME, record)
        first = _same_text(target, first, record["held_out"]["corpus"], record["fine_tune"])
        found[target.name] = record
    compare(found)
    for target in targets:
        files.write_json(target.directory / NAME, found[target.name])
        mirror.add(target.workdir, (target.directory / NAME).relative_to(target.workdir).parts[0])
    rows = retention_figures.table(found, {target.name: target.config for target in targets})
    print(rows.text)
    out = options.out or (targets[0].directory if len(targets) == 1 else None)
    if out is None:
        print("--out=DIR writes this table and its plots")
    else:
        for path in retention_figures.save(out, found, rows):
            print(f"wrote {path}")
            mirror.add(out, Path(path).name)
    return 0


def _parser() -> command.Parser:
    parser = command.parser("retention", command.headline(__doc__), config=False)
    add = parser.add_argument
    add("--workdir", action="append", required=True, help="a run, or a sweep, of which all that finished; repeatable")
    command.add_only(parser)
    add("--step", type=command.integer(), metavar="K", help="the checkpoints after K steps; default: the newest")
    add(
        "--weights", action="append", metavar="NAME",
        help="last, an average the runs keep, or that of their base; repeatable; default: those they are judged by",
    )  # fmt: skip
    add(
        "--noise", type=_numbers(0), default=(0.02, 0.05, 0.1, 0.2), metavar="S,S,...",
        help="Gaussian noise of S times the rms of each tensor (default 0.02,0.05,0.1,0.2)",
    )  # fmt: skip
    add(
        "--samples",
        type=command.integer(1),
        default=3,
        metavar="N",
        help="pairs of opposite draws at each scale (default 3)",
    )
    add(
        "--bits", type=_numbers(2, 8, whole=True), default=(8, 4, 3), metavar="B,B",
        help="integer widths (default 8,4,3)",
    )  # fmt: skip
    add("--group", type=command.integer(1), default=64, metavar="N", help="inputs that share a scale (default 64)")
    add(
        "--gptq", type=command.integer(0), default=16, metavar="N",
        help="also round by GPTQ, calibrated on N batches of the training text (default 16; 0: not)",
    )  # fmt: skip
    add("--embedding", action="store_true", help="also round embedding, positions and readout with the matrices")
    add(
        "--fine_tune", default="topics", metavar="TASK",
        help="the second text, as config.data.task (default topics); none: no fine-tuning",
    )  # fmt: skip
    add(
        "--fine_tune_steps",
        type=command.integer(1),
        default=120,
        metavar="N",
        help="steps of fine-tuning (default 120)",
    )
    add(
        "--fine_tune_rates", type=_numbers(0), default=(3e-4, 1e-3, 3e-3), metavar="R,R,...",
        help="peak learning rates of AdamW (default 3e-4,1e-3,3e-3)",
    )  # fmt: skip
    add("--batch_size", type=command.integer(1), default=8, metavar="N", help="sequences of every batch (default 8)")
    add(
        "--batches",
        type=command.integer(0),
        default=32,
        metavar="N",
        help="batches of a held-out set (default 32; 0: all)",
    )
    command.add_trust(parser)
    add("--again", action="store_true", help="measure also what has been measured")
    add("--out", type=command.writable_directory, metavar="DIR", help="where table and plots of the comparison go")
    return parser


def _numbers(low: float, high: float = math.inf, whole: bool = False) -> Callable[[str], tuple]:
    kind = f"{'integers' if whole else 'numbers'} from {low:g}" + (f" to {high:g}" if high < math.inf else "")

    def read(text: str) -> tuple:
        try:
            values = tuple(int(part) if whole else float(part) for part in text.split(","))
        except ValueError:
            values = (math.nan,)
        if not all(low <= value <= high and math.isfinite(value) for value in values):
            raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be {kind}, with commas between them")
        return tuple(dict.fromkeys(values))

    return read


# ------------------------------------------------------------------------------------------------------------- the runs
def find(
    workdirs: Sequence[str],
    only: Sequence[str],
    step: int | None,
    log: Callable[[str], None],
    weights: Sequence[str | None] = (None,),
    trust: bool = False,
) -> list[Target]:
    """The chosen runs of workdirs and of sweeps, of these the finished ones; those left out are named to the log."""
    from steppe.lm.keep import saved
    from steppe.lm.keep.checkpoint import Checkpoints
    from steppe.lm.keep.exits import Unusable, WorkdirError
    from steppe.lm.keep.workdir import config_of
    from steppe.scripts import results
    from steppe.scripts.sweep import spec

    read = [(workdir, result) for workdir in workdirs for result in results.read(workdir)]
    listed = []
    for workdir, result in spec.matching(read, only, lambda pair: pair[1].config):
        alone = files.is_remote(workdir) or result.directory == Path(workdir)
        if not alone and result.status != "finished":
            log(f"left out  {result.name}: {result.status} {result.why}".rstrip())
        elif result.directory.resolve() not in [known.directory.resolve() for known in listed]:
            listed.append(result)
    if not listed:
        raise command.UsageError(f"--workdir = {', '.join(workdirs)}: must hold a finished run")
    names = [result.name for result in listed]
    targets = []
    for result in listed:
        chosen = step
        if chosen is None:
            config = config_of(str(result.directory))
            checkpoints = saved.checkpoints_of(str(result.directory), config, trust)
            with Checkpoints(checkpoints, read_only=True, log=log) as kept:
                chosen = kept.newest()
            if chosen is None:
                raise Unusable(f"{checkpoints}: holds no checkpoint")
        name = result.name if names.count(result.name) == 1 else str(result.directory)
        for each in weights:
            try:
                directory = saved.measured_in(str(result.directory), each)
            except WorkdirError as error:  # other runs may have them
                log(f"left out  {error}")
                continue
            shown = name if each is None or len(weights) == 1 else f"{name} {each}"
            targets.append(
                Target(shown, result.directory, result.config, step=chosen, weights=each, directory=directory)
            )
    if not targets:
        raise command.UsageError(f"--weights = {', '.join(map(str, weights))}: must be weights that some run has")
    return targets


def settings_of(options: argparse.Namespace) -> dict:
    """What a run's numbers depend on beside the run, as it is written into its file."""
    rounding = ("noise", "samples", "bits", "group", "gptq", "embedding")
    tuning = ("fine_tune", "fine_tune_steps", "fine_tune_rates", "batch_size", "batches")
    chosen = {name: getattr(options, name) for name in (*rounding, *tuning)}
    return json.loads(json.dumps(chosen))


def stored(target: Target, settings: dict) -> dict | None:
    """What has been measured of this checkpoint with these settings, if it has."""
    try:
        record = stored_json.read(target.directory / NAME, Record)
    except (FileNotFoundError, DataError):
        return None
    return record if (record["settings"], record["step"]) == (settings, target.step) else None


def _check_all(targets: Sequence[Target], settings: dict, options: argparse.Namespace) -> None:
    """Refuses before anything is measured what cannot be: runs of other text, and batches that no device can share."""
    import jax

    from steppe.lm.keep import saved
    from steppe.lm.keep.workdir import config_of

    first = None
    for target in targets:
        record = None if options.again else stored(target, settings)
        if record is not None:
            first = _same_text(target, first, record["held_out"]["corpus"], record["fine_tune"])
            continue
        config = config_of(str(target.workdir))
        devices = len(jax.devices()) if saved.spreads(config) else 1
        if settings["batch_size"] % devices:
            given = settings["batch_size"]
            raise command.UsageError(f"--batch_size = {given}: must be a multiple of the {devices} devices here")
        corpus = saved.corpus_of(str(target.workdir), config, lambda text: None, options.trust)
        second = None
        if settings["fine_tune"] != NO_TEXT:
            second = {
                "corpus": open_second(second_config(config, settings, options.trust), lambda text: None).fingerprint
            }
        first = _same_text(target, first, corpus.fingerprint, second)


def _same_text(target: Target, first: tuple | None, corpus: str, second: dict | None) -> tuple:
    """(corpus, second corpus) by their fingerprints, which must be those of the first run if there was one."""
    texts = (corpus, second and second["corpus"])
    if first not in (None, texts):
        raise command.UsageError(
            f"--workdir = {target.workdir}: must be of the same text, vocabulary and sequence length as the first "
            f"(corpora {', '.join(map(str, texts))} here, {', '.join(map(str, first))} there)"
        )
    return texts


# -------------------------------------------------------------------------------------------------------- measuring one
def measure(
    target: Target, settings: dict, programs: dict, first: tuple | None, log: Callable[[str], None], trust: bool = False
) -> dict:
    """The record of a run: its summary of loss increases, and how they came about.

    programs: the compiled ones of runs before, by what they depend on; takes those of this run. first: the corpora of
    the first run, which must be this one's.
    """
    from steppe.lm.keep import saved
    from steppe.lm.measure import gptq, retention
    from steppe.lm.parts.assembly import assemble, batch_reader

    run = saved.load(str(target.workdir), target.step, log=lambda text: None, weights=target.weights, trust=trust)
    devices, batch_size = list(run.parts.mesh.devices.flat), settings["batch_size"]
    config = second_config(run.config, settings, trust)
    second = open_second(config, log) if settings["fine_tune"] != NO_TEXT else None
    _same_text(target, first, run.corpus.fingerprint, second and {"corpus": second.fingerprint})
    epoch_tokens = (second or run.corpus).epoch_tokens
    parts = assemble(config, run.corpus.tokenizer.vocab_size, epoch_tokens, devices=devices)
    tools = programs.get((parts.shape, parts.options)) or retention.programs(parts)
    programs[parts.shape, parts.options] = tools

    began = time.monotonic()
    name = next(iter(run.corpus.held_out))
    batches = retention.held_out(run.corpus, name, parts.mesh, batch_size, settings["batches"])
    base, tokens = retention.loss(tools.evaluate, run.params, batches)
    # calibrated on the run's own text: held-out text is what rounding is judged by
    read = batch_reader(config, run.corpus, parts, lambda step: step)
    log(f"loss {base:.4f} over {tokens:,} held-out tokens of {name}")

    def increase(params) -> float:
        return retention.loss(tools.evaluate, params, batches)[0] - base

    summary, details = {}, {}
    for sigma in settings["noise"]:
        # Noise and its opposite: what is of first order in it, much of the spread at small scales, cancels.
        found = [
            statistics.fmean(increase(tools.noise(run.params, seed, sign * sigma)) for sign in (1, -1))
            for seed in range(settings["samples"])
        ]
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        summary[f"noise_{sigma:g}"] = statistics.fmean(found)
        details[f"noise_{sigma:g}"] = {"samples": found, "standard_error": error}
    log("noise         " + _line(summary, "noise_"))
    for bits in settings["bits"]:
        for tables in (False, True)[: 1 + settings["embedding"]]:
            for group, kind in ((0, "channel"), (settings["group"], f"group{settings['group']}")):
                key = f"int{bits}_{kind}" + "_embedding" * tables
                summary[key] = increase(tools.quantise(run.params, bits, group, tables))
    calibration = [read(index) for index in range(settings["gptq"])]
    for bits in settings["bits"] if calibration else ():
        for group, kind in ((0, "channel"), (settings["group"], f"group{settings['group']}")):
            rounded = gptq.quantise(run.params, tools.grams, calibration, bits, group)
            summary[f"int{bits}_gptq_{kind}"] = increase(rounded)
    log("quantisation  " + _line(summary, "int"))
    record = {
        "step": target.step,
        "weights": run.weights,
        "loss": base,
        "held_out": {"name": name, "corpus": run.corpus.fingerprint, "tokens": tokens},
        "fine_tune": None,
        "settings": settings,
        "summary": summary,
        "details": details,
    }
    if second is not None:
        record["fine_tune"], details["fine_tune"] = forgetting(
            run.params, increase, tools, parts, config, second, settings, batches[0], log
        )
        summary |= frontier.at_rates(details["fine_tune"], ("lost", "curvature"))  # a gain is no increase of a loss
    details["seconds"] = round(time.monotonic() - began, 1)
    # the report takes every entry as a number
    record["summary"] = {key: value for key, value in summary.items() if math.isfinite(value)}
    return record


def _line(summary: dict, prefix: str) -> str:
    chosen = {key: value for key, value in summary.items() if key.startswith(prefix)}
    return "  ".join(f"{key.removeprefix('noise_')} {value:+.4f}" for key, value in chosen.items())


def second_config(config, settings: dict, trust: bool = False):
    """The run's config for fine-tuning: the same model, plain AdamW of configs/base.py at peak 1, plain cross-entropy.

    Whatever the run was trained with, this is the same for all; the learning rate comes with each step.
    """
    from ml_collections import ConfigDict

    from steppe.configs import base
    from steppe.lm.keep import saved

    plain = {**config.to_dict(), "data": saved.own_data(config, trust)}
    fixed = base.get_config().to_dict()
    plain["seed"], plain["optim"], plain["train"] = 0, fixed["optim"], fixed["train"]
    plain["optim"] |= {"peak_learning_rate": 1.0, "schedule": "constant", "warmup": "10%"}
    plain["train"] |= {"duration": f"{settings['fine_tune_steps']} steps", "batch_size": settings["batch_size"]}
    plain["model"] |= {"z_loss": 0.0, "label_smoothing": 0.0}
    if settings["fine_tune"] != NO_TEXT:
        plain["data"] |= {"task": settings["fine_tune"], "held_out": (), "held_out_fraction": HELD_OUT, "directory": ""}
    return ConfigDict(plain)


def open_second(config, log: Callable[[str], None]):
    """The second corpus, prepared on first use."""
    from steppe.data import cache, loader

    data = config.data
    return loader.open_corpus(cache.ensure(data, log), data.vocabulary, data.sequence_length, data.packing, data.verify)


def forgetting(params, increase, tools, parts, config, second, settings: dict, batch, log) -> tuple[dict, dict]:
    """(what it was measured on, {"loss" there before, "paths": one for each rate}).

    A path: its points, {step, gained, lost}, and "along": how a batch of the first text bends along the whole of it.
    """
    from steppe.lm.measure import retention
    from steppe.lm.parts.assembly import batch_reader

    name = next(iter(second.held_out))
    batches = retention.held_out(second, name, parts.mesh, config.train.batch_size, settings["batches"])
    before, tokens = retention.loss(tools.evaluate, params, batches)
    read = batch_reader(config, second, parts, lambda step: step)
    points = sorted({max(1, round(share * settings["fine_tune_steps"])) for share in POINTS})

    def both(params) -> dict:
        return {"gained": before - retention.loss(tools.evaluate, params, batches)[0], "lost": increase(params)}

    paths = []
    for rate in settings["fine_tune_rates"]:
        path, end = retention.fine_tune(tools, params, read, rate, points, both)
        way = {name: float(value) for name, value in tools.along(params, batch, end).items()}
        paths.append({"rate": rate, "points": path, "along": way})
        log(f"fine-tuning   rate {rate:g}: gained {path[-1]['gained']:+.4f}, lost {path[-1]['lost']:+.4f}")
    on = {"task": settings["fine_tune"], "name": name, "corpus": second.fingerprint, "tokens": tokens}
    return on, {"loss": before, "paths": paths}


# ------------------------------------------------------------------------------------------------------- comparing runs
def compare(found: dict[str, dict]) -> None:
    """Adds to each summary what is lost at a gain, and at a loss, on the second text that every run reaches.

    These are frontier.SHARE of the smallest best gain, and the loss of frontier.equal_loss. A run that gains nothing,
    or whose losses are not finite, sets no mark and gets no number.
    """
    best = {}
    for name, record in found.items():
        for key in ("forgetting_at_equal_gain", "forgetting_at_equal_loss"):
            record["summary"].pop(key, None)
        if record["fine_tune"]:
            best[name] = frontier.best_gain(frontier.paths_of(record["details"]["fine_tune"]))
    best = {name: gain for name, gain in best.items() if gain > 0}
    if not best:
        return
    gain = frontier.SHARE * min(best.values())
    loss = frontier.equal_loss([found[name]["details"]["fine_tune"] for name in best])
    for name in best:
        there = found[name]["details"]["fine_tune"]
        found[name]["details"]["equal"] = {"gain": gain, "loss": loss, "runs": len(best)}
        marks = {"forgetting_at_equal_gain": gain, "forgetting_at_equal_loss": there["loss"] - loss}
        lost = {key: frontier.lost_at(frontier.paths_of(there), mark) for key, mark in marks.items()}
        found[name]["summary"] |= {key: value for key, value in lost.items() if math.isfinite(value)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
