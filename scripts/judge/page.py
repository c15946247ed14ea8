"""What a verdict says: its sentence, table and figure, and how it was reached."""

from pathlib import Path
from typing import Any

import pandas as pd

from steppe.data import files
from steppe.lm import plot
from steppe.lm.measure.curvature import note
from steppe.scripts.judge import retention, tuning
from steppe.scripts.judge.numbers import looks, tokens
from steppe.scripts.judge.stages import file_name
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.tables import Column, Table

VERDICTS = "verdicts"


def line(found: dict[str, Any]) -> str:
    """The verdict in a sentence or two."""
    candidate, compared = found["candidate"], found["comparisons"]
    size = f"at {found['parameters']:,} parameters, {found['tokens_a_parameter']:.0f} tokens each"
    if "diverged" in found:
        seeds = f"{len(found['diverged'])} fresh seeds of its best trial's settings"
        return f"{size}: {candidate} diverged on {seeds}: worse."
    words = {looks.BETTER: "better than", looks.WORSE: "worse than",
             looks.WITHIN: f"within {found['rule']['effect']:g} of", looks.CANNOT: "not told apart from"}  # fmt: skip
    parts = []
    for state, word in words.items():
        names = [_short(rival, each) for rival, each in compared.items() if each["state"] == state]
        parts += [f"{word} {' and '.join(names)}"] if names else []
    level = f" ({found['nats_a_byte']:.4f})" if "nats_a_byte" in found else ""
    said, adamw = f"{size}, in nats a byte, {candidate}{level} is {'; '.join(parts)}.", compared["adamw"]
    if "low" not in adamw:
        return said
    units = f"{adamw['nats_a_token']:+.4f} nats a token, {adamw['bits_a_byte']:+.4f} bits a byte, "
    said += f"\nFrom adamw that is {units}{adamw['share_of_loss']:+.2%} of its loss"
    return f"{said}; {tokens.said(adamw['tokens'])}." if adamw["tokens"] else f"{said}."


def _short(rival: str, each: dict[str, Any]) -> str:
    if "low" not in each:
        return f"{rival} (which diverged)" if "diverged" in each else rival
    return f"{rival} ({each['difference']:+.4f}, {each['low']:+.4f} to {each['high']:+.4f})"


def text(found: dict[str, Any]) -> str:
    """Every comparison, then how each contender was tuned, for a terminal."""
    rows = [("less", "nats a byte", "95% over all looks", "nats a token", "bits a byte", "share", "pairs", "verdict")]
    rows += [_compared(rival, each) for rival, each in found["comparisons"].items()]
    lines = ["{:<24}  {:>11}  {:>20}  {:>12}  {:>11}  {:>8}  {:>5}  {}".format(*row) for row in rows]
    needs = {name: each["tokens"] for name, each in found["comparisons"].items() if each.get("tokens")}
    if needs:
        lines += ["", *(f"{name:<24} {tokens.said(each)}" for name, each in needs.items())]
        lines.append(f"{'':<24} from whole runs at AdamW's tuned rate, between them linear in log tokens")
    if kept := found.get("retention"):
        lines += ["", retention.text(kept)]
    return "\n".join([*lines, "", *protocol(found)])


def protocol(found: dict[str, Any]) -> list[str]:
    """How the verdict was reached, and its cost, a line each."""
    spent, batch = found["cost"], note(found["batch"])
    return [
        *(_tuning(name, tuned) for name, tuned in found["tuned"].items()),
        f"cost {found['flops_of_adamw']:.2f} of AdamW's FLOPs",
        f"rests on {spent['runs']} runs: {spent['flops']:.2g} FLOPs, {hours(spent['hours'])} one after another",
        *filter(None, [found["ended"], tuning.said(found["halving"]), batch]),
    ]


def _compared(rival: str, each: dict[str, Any]) -> tuple:
    said = each["state"]
    if each.get("pairs_needed"):
        said += f": would take {each['pairs_needed']} pairs, {hours(each['hours_needed'])}"
    numbers = ["-"] * 5
    if "low" in each:
        bounds = f"{each['low']:+.4f} to {each['high']:+.4f}"
        numbers = [f"{each['difference']:+.4f}", bounds, f"{each['nats_a_token']:+.4f}"]
        numbers += [f"{each['bits_a_byte']:+.4f}", f"{each['share_of_loss']:+.2%}"]
    return rival, *numbers, each["pairs"], said + ", as it diverged" * ("diverged" in each)


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
    stem = place / name(found)
    files.write_json(f"{stem}.json", found)
    said = [line(found), "", text(found), "", f"wrote {stem}.json"]
    drawn = drawing(found)
    if drawn is None:
        Path(f"{stem}.png").unlink(missing_ok=True)  # of a verdict before this one
    else:
        dr.save(drawn, place)
        said[-1] += f" and {stem.name}.png"
    return "\n".join(said)


def name(found: dict[str, Any]) -> str:
    """Of a verdict's files."""
    return file_name(found["candidate"] + f"@{found['size']}" * bool(found["size"]))


def comparisons(found: dict[str, Any]) -> pd.DataFrame:
    """A row a rival whose difference has bounds."""
    rows = [{"rival": rival, **each} for rival, each in found["comparisons"].items() if "low" in each]
    return pd.DataFrame(rows).assign(share=lambda made: 100 * made["share_of_loss"]) if rows else pd.DataFrame()


def drawing(found: dict[str, Any]) -> dr.Drawing | None:
    """A line a rival: seeds as dots, the interval over all looks, the effect as a band; None without any bounds."""
    made = comparisons(found)
    if made.empty:
        return None
    with dr.styled():
        drawn = plot.figure(7, 1.3 + 0.45 * len(made))
        axes = drawn.subplots()
        axes.grid(visible=False, axis="y")
        effect = found["rule"]["effect"]
        axes.axvspan(-effect, effect, color="0.9", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for at, each in enumerate(made[::-1].itertuples()):
            axes.plot(each.differences, [at - 0.2] * len(each.differences), ".", color="0.5", markersize=5)
            colour = {looks.BETTER: "#00695C", looks.WORSE: "#B71C1C"}.get(each.state, "0.1")
            axes.plot([each.low, each.high], [at, at], color=colour, linewidth=2)
            axes.plot(each.difference, at, "D", color=colour, markersize=6)
        labels = [f"less {each.rival}:\n{each.state}" for each in made[::-1].itertuples()]
        axes.set_yticks(range(len(made)), labels, fontsize=9)
        axes.set_ylim(-0.6, len(made) - 0.4)
        axes.set_xlabel("held-out loss, nats a byte: left is better\n95% over all looks; grey: within the effect")
        title = f"{found['candidate']} at {found['parameters']:,} parameters"
        drawn.suptitle(title, fontsize=10, x=0.01, ha="left")
    caption = "Dots: pairs of seeds. Diamonds: their means, with intervals of 95 % over all looks and rivals."
    alt = "; ".join(f"less {each.rival} {each.difference:+.4f}: {each.state}" for each in made.itertuples())
    columns = ["rival", "difference", "low", "high", "pairs", "state"]
    return dr.Drawing(name(found), f"{found['candidate']} against each rival", caption, alt, drawn, made[columns])


def table(found: dict[str, Any]) -> Table:
    """The comparisons in numbers."""
    made = comparisons(found)
    made = made.assign(difference_low=made["low"], difference_high=made["high"], difference_n=made["pairs"])
    columns = [
        ("rival", "less"), ("difference", "nats a byte", "±4"), ("nats_a_token", "nats a token", "+.4f"),
        ("bits_a_byte", "bits a byte", "+.4f"), ("share", "% of its loss", "+.2f"), ("state", "verdict"),
    ]  # fmt: skip
    caption = "Mean of n paired seeds, interval of 95 % over all looks and rivals: below zero is better."
    drop = ["differences", "tokens", "low", "high", "share_of_loss"]
    made = made.drop(columns=drop, errors="ignore")
    return Table(f"{name(found)}_table", "In numbers", caption, [Column(*each) for each in columns], made)
