"""What a judgement says: its line, its table and figure, and all verdicts of a directory."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppe.data import files
from steppe.scripts.judge import retention, tuning
from steppe.scripts.judge.numbers import looks, tokens
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
        names = [_short(rival, each) for rival, each in found["comparisons"].items() if each["state"] == state]
        parts += [f"{words} {' and '.join(names)}"] if names else []
    level = f" ({found['nats_a_byte']:.4f})" if "nats_a_byte" in found else ""
    return f"{size}, in nats a byte, {name}{level} is {'; '.join(parts)}." + _adamw(found["comparisons"]["adamw"])


def _short(rival: str, each: dict[str, Any]) -> str:
    if "low" not in each:
        return f"{rival} (which diverged)" if "diverged" in each else rival
    return f"{rival} ({each['difference']:+.4f}, {each['low']:+.4f} to {each['high']:+.4f})"


def _adamw(each: dict[str, Any]) -> str:
    """The difference from AdamW in other units."""
    if "low" not in each:
        return ""
    units = f"{each['nats_a_token']:+.4f} nats a token, {each['bits_a_byte']:+.4f} bits a byte, "
    said = f"\nFrom adamw that is {units}{each['share_of_loss']:+.2%} of its loss"
    return f"{said}; {tokens.said(each['tokens'])}." if each["tokens"] else f"{said}."


def table(found: dict[str, Any]) -> str:
    """Every comparison, then how each contender was tuned."""
    from steppe.lm.measure.curvature import note

    titles = ("less", "nats a byte", "95% over all looks", "nats a token", "bits a byte", "share", "pairs")
    lines = [_row(titles) + "  verdict"]
    lines += [_compared(rival, each) for rival, each in found["comparisons"].items()]
    needs = {name: each["tokens"] for name, each in found["comparisons"].items() if each.get("tokens")}
    if needs:
        lines += ["", *(f"{name:<24} {tokens.said(each)}" for name, each in needs.items())]
        lines.append(f"{'':<24} from whole runs at AdamW's tuned rate, between them linear in log tokens")
    if kept := found.get("retention"):
        lines += ["", retention.text(kept)]
    lines += ["", *(_tuning(name, tuned) for name, tuned in found["tuned"].items())]
    spent = found["cost"]
    lines.append(f"cost {found['flops_of_adamw']:.2f} of AdamW's FLOPs")
    lines.append(
        f"rests on {spent['runs']} runs: {spent['flops']:.2g} FLOPs, {hours(spent['hours'])} one after another"
    )
    if found["ended"]:
        lines.append(found["ended"])
    lines.append(tuning.said(found["halving"]))
    if said := note(found["batch"]):
        lines.append(said)
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    widths = (24, 11, 20, 12, 11, 8, 5)
    aligned = "<>>>>>>"
    return "  ".join(f"{cell:{way}{width}}" for cell, way, width in zip(cells, aligned, widths, strict=True))


def _compared(rival: str, each: dict[str, Any]) -> str:
    takes = ""
    if each.get("pairs_needed"):
        takes = f": would take {each['pairs_needed']} pairs, {hours(each['hours_needed'])}"
    numbers = ["-"] * 5
    if "low" in each:
        bounds = f"{each['low']:+.4f} to {each['high']:+.4f}"
        numbers = [f"{each['difference']:+.4f}", bounds, f"{each['nats_a_token']:+.4f}"]
        numbers += [f"{each['bits_a_byte']:+.4f}", f"{each['share_of_loss']:+.2%}"]
    said = f"{each['state']}{takes}" + (", as it diverged" if "diverged" in each else "")
    return _row([rival, *numbers, str(each["pairs"])]) + f"  {said}"


def hours(number: float) -> str:
    """A time, for a reader."""
    return f"{number:.2g} hours" if number >= 1 else f"{60 * number:.2g} minutes"


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
    stem = place / file_name(found["candidate"] + f"@{found['size']}" * bool(found["size"]))
    files.write_json(f"{stem}.json", found)
    said = [line(found), "", table(found), "", f"wrote {stem}.json"]
    if any("low" in each for each in found["comparisons"].values()):
        draw(found, Path(f"{stem}.png"))
        said[-1] += f" and {stem.name}.png"
    else:
        Path(f"{stem}.png").unlink(missing_ok=True)  # of a verdict before this one
    return "\n".join(said)


def draw(found: dict[str, Any], path: Path) -> None:
    """A line a rival: seeds as dots, the interval over all looks, the effect as a band."""
    from steppe.lm import plot

    rows = [(rival, each) for rival, each in found["comparisons"].items() if "low" in each][::-1]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7, 1.3 + 0.45 * len(rows))
        axes = drawn.subplots()
        effect = found["rule"]["effect"]
        axes.axvspan(-effect, effect, color="0.9", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for at, (_, each) in enumerate(rows):
            axes.plot(each["differences"], [at - 0.2] * len(each["differences"]), ".", color="0.5", markersize=5)
            colour = {looks.BETTER: "#00695C", looks.WORSE: "#B71C1C"}.get(each["state"], "0.1")
            axes.plot([each["low"], each["high"]], [at, at], color=colour, linewidth=2)
            axes.plot(each["difference"], at, "D", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), [f"less {rival}: {each['state']}" for rival, each in rows], fontsize=9)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("held-out loss, nats a byte: left is better\n95% over all looks; grey: within the effect")
        title = f"{found['candidate']} at {found['parameters']:,} parameters"
        drawn.suptitle(title, fontsize=10, x=0.01, ha="left")
        plot.save(drawn, path, dpi=150)


def leaderboard(directory: Path) -> str:
    """All verdicts of a directory, by size, the lowest loss first."""
    found = [json.loads(path.read_text()) for path in sorted((directory / VERDICTS).glob("*.json"))]
    if not found:
        return f"{directory}: no verdict yet; steppe judge CANDIDATE --config=NAME --out={directory} makes one"
    lines = [
        f"{'candidate':<32} {'parameters':>11}  {'nats a byte':>11}  {'less adamw':>10}  {'95% over all looks':>20}  "
        "verdict against adamw"
    ]
    found.sort(key=lambda each: (each["parameters"], each.get("nats_a_byte", math.inf)))
    return "\n".join(lines + [_place(each) for each in found])


def _place(found: dict[str, Any]) -> str:
    head = f"{found['candidate']:<32} {found['parameters']:>11,}"
    if "diverged" in found:
        return f"{head}  {'diverged':>11}"
    equal = found["comparisons"].get("adamw, as many FLOPs")
    way, at = equal or found["comparisons"]["adamw"], " at equal FLOPs" if equal else ""
    level = f"{found['nats_a_byte']:.4f}" if "nats_a_byte" in found else "-"
    numbers = ("-", "-")
    if "low" in way:
        numbers = (f"{way['difference']:+.4f}", f"{way['low']:+.4f} to {way['high']:+.4f}")
    return f"{head}  {level:>11}  {numbers[0]:>10}  {numbers[1]:>20}  {way['state']}{at}"
