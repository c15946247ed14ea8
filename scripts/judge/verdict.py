"""From tuned contenders to a verdict: its numbers, its line, its table and figure, and all verdicts of a directory."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from steppe.data import files
from steppe.scripts.judge import looks
from steppe.scripts.judge.contest import Contender, Point, proposals, unsure
from steppe.scripts.judge.stages import Arena, Stopped, average, duration, loss
from steppe.scripts.results import Result

EMA = {"average.weights": "ema"}
SHORT = {"optim.schedule": "wsd", "optim.cooldown": "20%"}  # the rival's decay
DEARER = 1.02  # times AdamW's FLOPs, from which a candidate is also held against AdamW with as many
VERDICTS = "verdicts"
BEYOND = 1000  # the config's own seed, which tuned: the first of those that decide


class Tuned(NamedTuple):
    """A contender at its best. trials: {point: nats a byte}; unsure: axes whose best lies at its grid's end."""

    contender: Contender
    settings: dict[str, str]
    trials: dict[Point, float]
    unsure: list[str]


def tune(arena: Arena, contender: Contender, trials: int) -> Tuned:
    """Tries points of a contender's axes on the config's seed until there were so many trials."""
    known: dict[Point, float] = {}
    axes = len(contender.start)
    while more := proposals(axes, known, trials):
        runs = {point: contender.at(point) | EMA for point in more}
        find = arena.read()
        if any(find(run) is None for run in runs.values()):
            print(
                f"tuning      {contender.name}: trials {len(known) + 1} to {len(known) + len(more)} of {trials}",
                flush=True,
            )
            arena.make(f"tune_{_file(contender.name)}_{len(known)}", list(runs.values()))
            find = arena.read()
        known |= {point: loss(find(run)) for point, run in runs.items()}
    best = min(known, key=lambda point: (known[point], point))
    names = list(contender.start)
    return Tuned(contender, contender.at(best), known, [names[axis] for axis in unsure(axes, known)])


# of steppe curvature: the gradient noise scale, and as little else as it allows
NOISE = ("--probes=1", "--densities=1", "--lanczos=2", "--ascent=0", "--draws=1", "--slices=0")


def regime(arena: Arena, adamw: Tuned) -> dict[str, float]:
    """{"batch_tokens", "noise_scale"} at the end of AdamW's best trial, in tokens; {} where the noise hides it."""
    from steppe.scripts.measure.__main__ import main as measure

    run = arena.read()(adamw.settings | EMA)
    assert run is not None
    if not run.curvature:
        print("batch       measuring the gradient noise scale at the end of AdamW's best trial", flush=True)
        if status := measure(["curvature", f"--workdir={run.directory}", *NOISE]):
            raise Stopped(status)
        run = arena.read()(adamw.settings | EMA)
        assert run is not None
    numbers = run.curvature[-1]
    return {name: numbers[name] for name in ("batch_tokens", "noise_scale") if "noise_scale" in numbers}


def compare(arena: Arena, tuned: list[Tuned], options: Any) -> dict[str, Any]:
    """Adds fresh seeds, look by look, until every comparison is decided or no pairs are left; the whole verdict."""
    candidate, *others = tuned
    adamw = next(each for each in others if each.contender.name == "adamw")
    find = arena.read()
    one, plain = find(candidate.settings | EMA), find(adamw.settings | EMA)
    if one is None or plain is None or not math.isfinite(loss(plain)):
        raise ValueError(
            f"{arena.directory}: AdamW's best trial diverged: give a lower config.optim.peak_learning_rate"
        )
    first, times = int(one.config["seed"]) + BEYOND, one.flops / plain.flops
    seeds = lambda settings, count: [settings | EMA | {"seed": str(first + i)} for i in range(count)]  # noqa: E731
    runs = {each.contender.name: each.settings for each in others} | {"adamw, short decay": adamw.settings | SHORT}
    if times > DEARER:
        longer = {"train.duration": duration(plain.steps, times)}
        runs["adamw, as many FLOPs"] = adamw.settings | longer
    rivals = [*runs, "adamw, ema"]
    rule = looks.plan(options.noise, options.effect, comparisons=len(rivals), most=options.pairs)
    found: dict[str, looks.Finding] = {}
    differences: dict[str, list[float]] = {}
    mine: list[Result | None] = []
    for pairs in rule.looks:
        wanted = [name for name in runs if name not in found or found[name].state == looks.UNDECIDED]
        if "adamw, ema" in found and found["adamw, ema"].state == looks.UNDECIDED and "adamw" not in wanted:
            wanted.append("adamw")
        print(f"verdict     look at {pairs} pairs of seeds: {', '.join(wanted)}", flush=True)
        arena.make(
            f"verdict_{_file(candidate.contender.name)}_{pairs}",
            [run for settings in (candidate.settings, *(runs[n] for n in wanted)) for run in seeds(settings, pairs)],
        )
        find = arena.read()
        mine = [find(run) for run in seeds(candidate.settings, pairs)]
        bad = [result for result in mine if not math.isfinite(loss(result))]
        if bad:
            return _diverged(candidate, tuned, bad, rule, times)
        for name in rivals:
            theirs = [find(run) for run in seeds(runs[name.replace(", ema", "")], pairs)]
            if any(each is None for each in theirs):
                continue  # decided at an earlier look
            kept = [average(each, "ema") if name.endswith(", ema") else each for each in theirs if each]
            differences[name] = [loss(a) - loss(b) for a, b in zip(mine, kept, strict=True)]
        found = looks.verdict(rule, differences)
        if all(each.state != looks.UNDECIDED for each in found.values()):
            break
    spent = [each.seconds for each in mine if each]
    last = looks.verdict(rule, differences, ended=True, seconds=2 * sum(spent) / len(spent))
    level = sum(map(loss, mine)) / len(mine)
    own = [average(each, "ema") for each in mine if each]
    return _record(candidate, tuned, rule, times, one) | {
        "nats_a_byte": level,
        "ema_nats_a_byte": sum(map(loss, own)) / len(own),
        "pairs": len(mine),
        "comparisons": {name: _comparison(last[name], differences[name], level) for name in rivals},
    }


def _comparison(finding: looks.Finding, differences: list[float], level: float) -> dict[str, Any]:
    interval = finding.interval
    assert interval is not None
    return {
        "state": finding.state,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "bits_a_byte": interval.value / math.log(2),
        "share_of_loss": interval.value / level,
        "pairs": len(differences),
        "sd": finding.sd,
        "differences": differences,
        "pairs_needed": finding.needed,
        "hours_needed": finding.hours,
    }


def _record(candidate: Tuned, tuned: list[Tuned], rule: looks.Rule, times: float, one: Result) -> dict[str, Any]:
    return {
        "candidate": candidate.contender.name,
        "parameters": one.parameters,
        "tokens_a_parameter": one.tokens / max(1, one.parameters),
        "flops_of_adamw": times,
        "rule": rule._asdict(),
        "tuned": {
            each.contender.name: {
                "settings": each.settings,
                "trials": [[*point, value] for point, value in each.trials.items()],
                "at_the_end_of_the_grid": each.unsure,
            }
            for each in tuned
        },
    }


def _diverged(candidate: Tuned, tuned: list[Tuned], bad: list, rule: looks.Rule, times: float) -> dict[str, Any]:
    one = next(each for each in bad if each)
    return _record(candidate, tuned, rule, times, one) | {
        "diverged": [each.config["seed"] for each in bad if each],
        "comparisons": {},
    }


def line(found: dict[str, Any]) -> str:
    """The verdict in a sentence or two."""
    name, size = (
        found["candidate"],
        f"at {found['parameters']:,} parameters, {found['tokens_a_parameter']:.0f} tokens each",
    )
    if "diverged" in found:
        return f"{size}: {name} diverged on {len(found['diverged'])} fresh seeds of its best trial's settings: worse."
    parts = []
    for state, words in (
        (looks.BETTER, "better than"),
        (looks.WORSE, "worse than"),
        (looks.WITHIN, f"within {found['rule']['effect']:g} of"),
        (looks.CANNOT, "not told apart from"),
    ):
        names = [
            f"{rival} ({each['difference']:+.4f}, {each['low']:+.4f} to {each['high']:+.4f})"
            for rival, each in found["comparisons"].items()
            if each["state"] == state
        ]
        parts += [f"{words} {' and '.join(names)}"] if names else []
    return f"{size}, in nats a byte, {name} ({found['nats_a_byte']:.4f}) is {'; '.join(parts)}."


def table(found: dict[str, Any]) -> str:
    """Every comparison, then how each contender was tuned."""
    from steppe.lm.measure.curvature import note
    from steppe.lm.track.tracker import clock_face

    lines = [
        f"{'less':<24} {'nats a byte':>11}  {'95% over all looks':>20}  {'bits a byte':>11}  {'pairs':>5}  verdict"
    ]
    for rival, each in found["comparisons"].items():
        bounds = f"{each['low']:+.4f} to {each['high']:+.4f}"
        takes = ""
        if each["pairs_needed"]:
            takes = f": would take {each['pairs_needed']} pairs, {clock_face(3600 * each['hours_needed'])} of training"
        lines.append(
            f"{rival:<24} {each['difference']:>+11.4f}  {bounds:>20}  {each['bits_a_byte']:>+11.4f}  "
            f"{each['pairs']:>5}  {each['state']}{takes}"
        )
    lines.append("")
    for name, tuned in found["tuned"].items():
        said = ", ".join(
            f"{key.removeprefix('optim.')} {text}" for key, text in tuned["settings"].items() if text != "adamw"
        )
        ends = tuned["at_the_end_of_the_grid"]
        lines.append(
            f"{name:<24} {len(tuned['trials'])} trials: {said}"
            + (f"; at the end of its grid: {', '.join(ends)}" if ends else "")
        )
    lines.append(f"cost {found['flops_of_adamw']:.2f} of AdamW's FLOPs")
    if said := note(found["batch"]):
        lines.append(said)
    return "\n".join(lines)


def keep(directory: Path, found: dict[str, Any]) -> str:
    """Writes a verdict's JSON and figure; returns its text."""
    place = directory / VERDICTS
    place.mkdir(parents=True, exist_ok=True)
    stem = place / _file(found["candidate"])
    files.write_json(f"{stem}.json", found)
    said = [line(found), "", table(found), "", f"wrote {stem}.json"]
    if found["comparisons"]:
        draw(found, Path(f"{stem}.png"))
        said[-1] += f" and {stem.name}.png"
    return "\n".join(said)


def draw(found: dict[str, Any], path: Path) -> None:
    """A line a rival: seeds as dots, the interval over all looks, the effect as a band."""
    from steppe.lm import plot

    rows = list(found["comparisons"].items())[::-1]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7, 1.3 + 0.45 * len(rows))
        axes = drawn.subplots()
        effect = found["rule"]["effect"]
        axes.axvspan(-effect, effect, color="0.9", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for at, (_, each) in enumerate(rows):
            axes.plot(each["differences"], [at] * len(each["differences"]), ".", color="0.6", markersize=5)
            colour = {looks.BETTER: "#00695C", looks.WORSE: "#B71C1C"}.get(each["state"], "0.1")
            axes.plot([each["low"], each["high"]], [at, at], color=colour, linewidth=2)
            axes.plot(each["difference"], at, "D", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), [f"less {rival}: {each['state']}" for rival, each in rows], fontsize=9)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("held-out loss, nats a byte: left is better")
        axes.set_title(
            f"{found['candidate']}: 95% intervals over all looks; grey: within the effect", fontsize=9, loc="left"
        )
        plot.save(drawn, path, dpi=150)


def leaderboard(directory: Path) -> str:
    """All verdicts of a directory, the lowest loss first."""
    found = [json.loads(path.read_text()) for path in sorted((directory / VERDICTS).glob("*.json"))]
    if not found:
        return f"{directory}: no verdict yet; steppe judge CANDIDATE --config=NAME --out={directory} makes one"
    lines = [
        f"{'candidate':<32} {'nats a byte':>11}  {'less adamw':>10}  {'95% over all looks':>20}  verdict against adamw"
    ]
    for each in sorted(found, key=lambda each: each.get("nats_a_byte", math.inf)):
        if "diverged" in each:
            lines.append(f"{each['candidate']:<32} {'diverged':>11}")
            continue
        way = each["comparisons"].get("adamw, as many FLOPs") or each["comparisons"]["adamw"]
        at = " at equal FLOPs" if "adamw, as many FLOPs" in each["comparisons"] else ""
        bounds = f"{way['low']:+.4f} to {way['high']:+.4f}"
        numbers = f"{each['nats_a_byte']:>11.4f}  {way['difference']:>+10.4f}  {bounds:>20}"
        lines.append(f"{each['candidate']:<32} {numbers}  {way['state']}{at}")
    return "\n".join(lines)


def plan(arena: Arena, contenders: list[Contender], options: Any) -> None:
    """Prints the stages, their runs, what one of each costs, and what they will be able to tell."""
    arena.make("plan", [each.at((0.0,) * len(each.start)) | EMA for each in contenders], plan=True)
    rivals = len(contenders) + 2  # their EMA, a short decay, as many FLOPs
    rule = looks.plan(options.noise, options.effect, comparisons=rivals, most=options.pairs)
    able = looks.able(rule, options.noise)
    lines = [
        f"tuning      {len(contenders) * options.trials} runs: {options.trials} trials of each, on the config's seed",
        f"verdict     looks at {', '.join(map(str, rule.looks))} pairs of fresh seeds, against up to {rivals} rivals: "
        f"{rule.looks[-1] * rivals} runs at most",
        f"will tell   at a pair's sd of {options.noise:g} nats a byte, a difference of {able.detectable:.4f} with "
        f"probability {rule.power:g}; that none is within {rule.effect:g}, with {able.equal:.2f}",
    ]
    print("\n".join(["", *lines]))


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)
