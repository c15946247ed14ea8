"""What trained models keep under weight noise, quantisation and fine-tuning on another text, side by side.

steppe retention --workdir=RUN_OR_SWEEP [--workdir=...] [--only=KEY=V,V] [--out=DIR] [--fine_tune=TASK]

Every number is an increase of the loss on the first held-out set, nats a token, over the same tokens for all runs.
WORKDIR/retention.json takes a run's numbers as soon as it is measured; a run that has them, of the same checkpoint with
the same settings, is not measured again. `forgetting_at_equal_gain` compares runs, so it is that of the last command.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypedDict

from steppe.configs.keys import FLAG, TEXT, count, integer, listed, number
from steppe.configs.read import UsageError
from steppe.data import stored
from steppe.lm import plot
from steppe.lm.measure import frontier

WIDTHS = listed(integer(2, 8))
AMOUNTS = listed(number(least=0))
NO_TEXT = "none"


class Settings(NamedTuple):
    """How weights are disturbed, and by how much text that is judged."""

    noise: Annotated[tuple[float, ...], "Gaussian noise, in units of the rms of each tensor", AMOUNTS] = (
        0.02, 0.05, 0.1, 0.2,
    )  # fmt: skip
    samples: Annotated[int, "pairs of opposite draws at each scale", count(1)] = 3
    bits: Annotated[tuple[int, ...], "integer widths", WIDTHS] = (8, 4, 3)
    group: Annotated[int, "inputs that share a scale", count(1)] = 64
    gptq: Annotated[int, "batches of the training text, to calibrate rounding by GPTQ; 0: none", count()] = 16
    embedding: Annotated[bool, "also round embedding, positions and readout with the matrices", FLAG] = False
    fine_tune: Annotated[str, "the second text, as config.data.task; none: no fine-tuning", TEXT] = "topics"
    fine_tune_steps: Annotated[int, "steps of fine-tuning", count(1)] = 120
    fine_tune_rates: Annotated[tuple[float, ...], "peak learning rates of AdamW", AMOUNTS] = (3e-4, 1e-3, 3e-3)
    batch_size: Annotated[int, "sequences of every batch", count(1)] = 8
    batches: Annotated[int, "batches of a held-out set; 0: all", count()] = 32


POINTS = (0.125, 0.25, 0.5, 1.0)  # shares of the fine-tuning after which both losses are measured
HELD_OUT = 0.1  # share of the second corpus's documents held out


class OfText(TypedDict):
    """Which text a number is of."""

    corpus: str
    tokens: stored.Count


class Record(TypedDict):
    """retention.json, as far as a command reads again what one before it wrote."""

    step: stored.Count
    loss: float
    held_out: OfText
    fine_tune: OfText | None
    settings: dict[str, Any]
    summary: dict[str, float]
    details: frontier.Details


# -------------------------------------------------------------------------------------------------------- measuring one
def disturbances(settings: Settings) -> dict[str, dict[str, list[list[tuple]]]]:
    """{stage: {measure: draws of it}}; a draw: (how, its arguments), over which rises of the loss are averaged.

    Noise is drawn with its opposite: what is of first order in it, much of the spread at small scales, cancels.
    """
    found, seeds = {}, range(settings.samples)
    for sigma in settings.noise:
        draws = [[("noise", seed, sign * sigma) for sign in (1, -1)] for seed in seeds]
        found[f"noise {sigma:g}"] = {f"noise_{sigma:g}": draws}
    groups = ((0, "channel"), (settings.group, f"group{settings.group}"))
    for bits in settings.bits:
        found[f"{bits} bits"] = {
            f"q{bits}_{kind}" + "_embedding" * tables: [[("nearest", bits, group, tables)]]
            for tables in (False, True)[: 1 + settings.embedding]
            for group, kind in groups
        }
    for bits in settings.bits if settings.gptq else ():
        found[f"{bits} bits by GPTQ"] = {f"q{bits}_gptq_{kind}": [[("gptq", bits, group)]] for group, kind in groups}
    return found


COMPILING = 30.0  # seconds on two cores, whatever the size of the model


def costs(config: Mapping[str, Any], settings: Settings, held_out: int) -> dict[str, float]:
    """{stage that measure_run announces: its cost, in gradients of one sequence}; a held-out loss costs a third.

    held_out: sequences of the first held-out set, 0: unknown.
    """
    batches = -(-held_out // settings.batch_size) or 100
    loss = settings.batch_size * min(batches, settings.batches or batches) / 3
    tuned = settings.fine_tune_rates if settings.fine_tune != NO_TEXT else ()
    path = settings.batch_size * settings.fine_tune_steps + 2 * len(POINTS) * loss
    more = {"gptq": settings.gptq * config["train.batch_size"]}  # two passes forward, and the Gram matrices
    drawn = {
        stage: sum(loss + more.get(name, 0) for draws in measures.values() for draw in draws for name, *_ in draw)
        for stage, measures in disturbances(settings).items()
    }
    return {"held-out loss": loss, **drawn, **{f"fine-tuning at {rate:g}": path for rate in tuned}}


def texts(
    config: Any, data: Mapping[str, Any], corpus: Any, settings: Settings, *, devices: int, log: Callable[[str], None]
) -> tuple:
    """The fingerprints of a run's text and of the second one, in which all runs must agree. UsageError for a batch that
    the devices cannot share. config, data, corpus: of a run, as lm.keep.saved.Saved has them."""
    if settings.batch_size % devices:
        raise UsageError(f"--batch_size = {settings.batch_size}: must be a multiple of the {devices} devices here")
    _, second = second_text(config, data, settings, log)
    return corpus.fingerprint, second and second.fingerprint


def texts_of(record: Record) -> tuple:
    """The same of a run that was measured."""
    return record["held_out"]["corpus"], record["fine_tune"] and record["fine_tune"]["corpus"]


def second_text(
    config: Any, data: Mapping[str, Any], settings: Settings, log: Callable[[str], None]
) -> tuple[Any, Any]:
    """(the run's config for fine-tuning, the second corpus: prepared on first use, None where none is asked for).

    All runs have the same model, plain cross-entropy, and plain AdamW at peak 1: the rate comes with each step.
    """
    from ml_collections import ConfigDict

    from steppe.configs import base
    from steppe.data import cache

    plain, fixed = {**config.to_dict(), "data": dict(data)}, base.get_config().to_dict()
    plain["seed"], plain["optim"], plain["train"] = 0, fixed["optim"], fixed["train"]
    plain["optim"] |= {"peak_learning_rate": 1.0, "schedule": "constant", "warmup": "10%"}
    plain["train"] |= {"duration": f"{settings.fine_tune_steps} steps", "batch_size": settings.batch_size}
    plain["model"] |= {"z_loss": 0.0, "label_smoothing": 0.0}
    if settings.fine_tune == NO_TEXT:
        return ConfigDict(plain), None
    plain["data"] |= {"task": settings.fine_tune, "held_out": (), "held_out_fraction": HELD_OUT, "directory": ""}
    return ConfigDict(plain), cache.open_of(plain["data"], log)


class Text(NamedTuple):
    """A corpus on the mesh: batches of its first held-out set, and read(step) -> batch of it to train on.

    on: which corpus it is. loss(params): of the held-out batches, nats a token; before: that of the run's parameters.
    """

    on: dict[str, Any]
    before: float
    loss: Callable[[Any], float]
    batches: list[dict]
    read: Callable[[int], dict]

    def rise(self, params: Any) -> float:
        return self.loss(params) - self.before


def measure_run(
    run: Any, settings: Settings, programs: dict, other: Callable[[str], Any], tick: Callable[[str], None]
) -> dict[str, Any]:
    """Rises of a run's held-out loss, "summary", and how they came about; arguments as of curvature.measure_run."""
    from steppe.lm.measure import disturb, gptq
    from steppe.lm.measure.evaluate import evaluate, held_out
    from steppe.lm.parts.assembly import assemble, batch_reader

    config, second = second_text(run.config, run.data, settings, lambda line: None)
    size, tokens = run.corpus.tokenizer.vocab_size, (second or run.corpus).epoch_tokens
    parts = assemble(config, size, tokens, devices=list(run.parts.mesh.devices.flat))
    key = parts.shape, parts.options
    tools = programs[key] = programs.get(key) or disturb.programs(parts)

    def text(corpus: Any) -> Text:
        name = next(iter(corpus.held_out))
        batches = list(held_out(corpus, name, parts.mesh, settings.batch_size, settings.batches))
        before = evaluate(tools.evaluate, run.params, batches)
        on = {"name": name, "corpus": corpus.fingerprint, "tokens": before["tokens"]}
        loss = lambda params: evaluate(tools.evaluate, params, batches)["loss"]  # noqa: E731
        return Text(on, before["loss"], loss, batches, batch_reader(config, corpus, parts, lambda step: step))

    tick("held-out loss")
    own, summary, details = text(run.corpus), {}, {}
    record = {"loss": own.before, "held_out": own.on, "fine_tune": None}
    # calibrated on the run's own text: held-out text is what rounding is judged by
    calibration = [own.read(index) for index in range(settings.gptq)]
    by_gptq = lambda params, *rest: gptq.quantise(params, tools.layers, calibration, *rest)  # noqa: E731
    how = {"noise": tools.noise, "nearest": tools.quantise, "gptq": by_gptq}
    for stage, measures in disturbances(settings).items():
        tick(stage)
        for key, draws in measures.items():
            found = [statistics.fmean(own.rise(how[name](run.params, *rest)) for name, *rest in draw) for draw in draws]
            summary[key] = statistics.fmean(found)
            if key.startswith("noise"):
                error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
                details[key] = {"samples": found, "standard_error": error}
    if second is not None:
        there = text(second)
        points, paths = sorted({max(1, round(share * settings.fine_tune_steps)) for share in POINTS}), []
        both = lambda params: {"gained": there.before - there.loss(params), "lost": own.rise(params)}  # noqa: E731
        for rate in settings.fine_tune_rates:
            tick(f"fine-tuning at {rate:g}")
            path, end = disturb.fine_tune(tools, run.params, there.read, rate, points, both)
            # how a batch of the first text bends along the whole path
            way = {name: float(value) for name, value in tools.along(run.params, own.batches[0], end).items()}
            paths.append({"rate": rate, "points": path, "along": way})
        record["fine_tune"] = {"task": settings.fine_tune, **there.on}
        details["fine_tune"] = {"loss": there.before, "paths": paths}
        summary |= frontier.at_rates(details["fine_tune"], ("lost", "curvature"))  # a gain is no increase of a loss
    # the report takes every entry as a number
    known = {key: value for key, value in summary.items() if math.isfinite(value)}
    return {"summary": known, **record, "details": details}


# ------------------------------------------------------------------------------------------------------- comparing runs
_EQUAL = {"forgetting_at_equal_gain": "equal gain", "forgetting_at_equal_loss": "equal loss"}


def compare(found: Mapping[str, Any]) -> None:
    """Adds to each summary what is lost at a gain, and at a loss, on the second text that every run reaches.

    The gain is frontier.SHARE of the least best one, the loss frontier.equal_loss. Runs that gain nothing do not count.
    """
    best = {}
    for name, record in found.items():
        for key in _EQUAL:
            record["summary"].pop(key, None)
        there = record["details"]["fine_tune"] if record["fine_tune"] else {"paths": ()}
        if (gain := frontier.best_gain(frontier.paths_of(there))) > 0:
            best[name] = gain
    tuned = {name: found[name]["details"]["fine_tune"] for name in best}
    gain, loss = frontier.SHARE * min(best.values(), default=0.0), frontier.equal_loss(list(tuned.values()))
    for name, there in tuned.items():
        found[name]["details"]["equal"] = {"gain": gain, "loss": loss, "runs": len(best)}
        marks = dict(zip(_EQUAL, (gain, there["loss"] - loss), strict=True))
        lost = {key: frontier.lost_at(frontier.paths_of(there), mark) for key, mark in marks.items()}
        found[name]["summary"] |= {key: value for key, value in lost.items() if math.isfinite(value)}


def note_runs(found: Mapping[str, Any]) -> str:
    """What stands below the table of runs."""
    tokens = next(iter(found.values()))["held_out"]["tokens"]
    marks = [record["details"]["equal"] for record in found.values() if "equal" in record["details"]]
    said = f"increase of held-out loss, nats a token, over {tokens:,} tokens"
    for mark in marks[:1]:  # the same in all
        said += f"\nequal gain: {mark['gain']:.4f} nats gained on the second text; equal loss: {mark['loss']:.4f} nats "
        said += f"reached there; all {mark['runs']} runs reach both"
    return said


def title(key: str) -> str:
    """The column of a measure."""
    return _EQUAL.get(key, key.replace("fine_tune_", "").replace(": lost", "").replace("embedding", "emb"))


def frame(found: Mapping[str, Any]) -> Any:
    """What was measured of runs, a row each: the loss, and every number of its summary."""
    import pandas as pd

    rows = [{"loss": each["loss"], **each["summary"]} for each in found.values()]
    return pd.DataFrame(rows, index=list(found), dtype=float)


def draw_runs(found: Mapping[str, Any], labels: Mapping[str, str]) -> Any:
    """Noise, rounding and the forgetting frontier: means and errors over groups of runs. labels: {run: its group}."""
    colours = [*(plot.BLUE, plot.VERMILION, plot.GREEN, plot.PINK), *(plot.ORANGE, plot.SKY, plot.BLACK, plot.PALE)]
    looks = itertools.cycle(itertools.product(("-", "--", ":", "-."), colours))  # beyond eight groups the dash differs
    grouped = frame(found).groupby(labels, sort=False)
    means, errors = grouped.mean(), grouped.sem().fillna(0.0)
    named = zip(means.index, looks, strict=False)
    styles = {label: {"linestyle": dash, "color": colour} for label, (dash, colour) in named}
    tuned = any(record["fine_tune"] for record in found.values())
    figure = plot.figure(5.2 * (2 + tuned), 4.6 + 0.16 * math.ceil(len(styles) / 3))
    axes = figure.subplots(1, 2 + tuned)
    lines = _draw_noise(axes[0], means.filter(regex="^noise_"), errors, styles)
    _draw_bars(axes[1], means.filter(regex=r"^(q|int)\d"), errors, styles)  # int: before 0.3
    if tuned:
        _draw_frontier(axes[2], found, labels, styles)
    if len(styles) > 1:
        figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _draw_noise(axes: Any, means: Any, errors: Any, styles: Mapping[str, dict]) -> list[Any]:
    scales = [float(key.removeprefix("noise_")) for key in means]
    kept = {"marker": "o", "markersize": 4}
    lines = [
        axes.errorbar(scales, means.loc[label], errors.loc[label, means.columns], label=label, **kept, **style)
        for label, style in styles.items()
    ]
    if min(scales) > 0:
        axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
    if (means > 0).all(axis=None):
        axes.set_yscale("log")
    axes.set_xlabel("weight noise, in units of each tensor's rms")
    axes.set_ylabel("increase of held-out loss, nats a token")
    return lines


def _draw_bars(axes: Any, means: Any, errors: Any, styles: Mapping[str, dict]) -> None:
    width = 0.8 / len(styles)
    for index, (label, style) in enumerate(styles.items()):
        positions = [key + (index - (len(styles) - 1) / 2) * width for key in range(len(means.columns))]
        kept = {"yerr": errors.loc[label, means.columns], "color": style["color"], "linewidth": 0}
        axes.bar(positions, means.loc[label], width * 0.92, **kept)
    axes.set_xticks(range(len(means.columns)), [key.replace("_", "\n") for key in means], fontsize=9)
    axes.set_xlabel("weights rounded to")


def _draw_frontier(axes: Any, found: Mapping[str, Any], labels: Mapping[str, str], styles: Mapping[str, dict]) -> None:
    """A line for each learning rate, thicker for higher ones: where fine-tuning leads from (0, 0)."""
    import pandas as pd

    points = pd.DataFrame([
        {"label": labels[name], "rate": path["rate"], **point}
        for name, record in found.items() if record["fine_tune"]
        for path in record["details"]["fine_tune"]["paths"]
        for point in ({"step": 0, "gained": 0.0, "lost": 0.0}, *path["points"])
    ])  # fmt: skip
    lines = points.groupby(["label", "rate", "step"], sort=False)[["gained", "lost"]].mean().dropna()
    rates = list(dict.fromkeys(points["rate"]))
    for (label, rate), line in lines.groupby(level=["label", "rate"], sort=False):
        width = 0.8 + 0.7 * rates.index(rate)
        axes.plot(line["gained"], line["lost"], marker="o", markersize=3, linewidth=width, **styles[label])
        if label == next(iter(styles)):
            axes.annotate(f" {rate:g}", line.iloc[-1], fontsize=8, va="center")
    axes.set_xlabel("gained on the second text, nats a token")
    axes.set_ylabel("lost on the first")
