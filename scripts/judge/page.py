"""What a judgement says: its line, its table and figure, and all verdicts of a directory."""

import json
import math
from pathlib import Path
from typing import Any

from steppe.data import files
from steppe.scripts.judge import looks
from steppe.scripts.judge.stages import file_name

VERDICTS = "verdicts"


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
    lines += ["", *(_tuning(name, tuned) for name, tuned in found["tuned"].items())]
    lines.append(f"cost {found['flops_of_adamw']:.2f} of AdamW's FLOPs")
    if said := note(found["batch"]):
        lines.append(said)
    return "\n".join(lines)


def _tuning(name: str, tuned: dict[str, Any]) -> str:
    short = lambda keys: ", ".join(key.removeprefix("optim.") for key in keys)  # noqa: E731
    said = short(f"{key} {text}" for key, text in tuned["axes"].items())
    ends, left = tuned["at_the_end_of_the_grid"], tuned["not_tuned"]
    said += f"; at the end of its grid: {short(ends)}" if ends else ""
    said += f"; not tuned: {short(left)}" if left else ""
    return f"{name:<24} {len(tuned['trials'])} trials: {said}"


def keep(directory: Path, found: dict[str, Any]) -> str:
    """Writes a verdict's JSON and figure; returns its text."""
    place = directory / VERDICTS
    place.mkdir(parents=True, exist_ok=True)
    stem = place / file_name(found["candidate"])
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
