"""Makes this folder's page anew from the committed runs: its figure, and the table of claims in README.md.

python configs/studies/page.py
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from steppe.lm.plot import BLACK, BLUE, VERMILION
from steppe.scripts import results
from steppe.scripts.report.numbers import differences as diff
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import statistics as st

HERE = Path(__file__).parent
COLOURS = {1: VERMILION, -1: BLUE, 0: BLACK}  # worse, better, cannot be told
SAM, FUNCTIONAL = "sam, rho 0.1", "functional_sam, rho 0.1"  # both at one rate
ROWS = (  # drawn
    "adamw ema", "muon", "msam", "precond_msam", "precond_functional_sam", "functional_sam", FUNCTIONAL, "sam", SAM,
)  # fmt: skip
BATCHES = {  # name: title of its panel and column
    "english": "0.1 noise scales,\n1k tokens, English",
    "1k": "0.2 to 0.3 noise scales,\n1k tokens, Python",
    "4k": "1.1 noise scales,\n4k tokens, Python",
    "16k": "2 to 40 noise scales,\n16k tokens, Python",
}
LADDER = {"1k": 8, "16k": 128}  # of BATCHES, those of ladder/: sequences of a batch


class Claim(NamedTuple):
    """That one entry is worse, or better, than another.

    pairs: {batch: (one, than)}; "flops": AdamW with as many FLOPs. sign: 1 where the claim is that the loss is higher.
    least: the difference worth seeing, nats a byte. measure: an aspect of the report; forgetting is at the one loss on
    the second text that all runs of a batch reach. before: (batch, one, than), whose difference is subtracted.
    """

    words: str
    source: str
    sign: int
    pairs: dict[str, tuple[str, str]]
    least: float = 0.01
    measure: str = "loss"
    before: tuple[str, str, str] | None = None


def everywhere(one: str, than: str, *but: str) -> dict[str, tuple[str, str]]:
    return {batch: (one, than) for batch in BATCHES if batch not in but}


GAIN = 0.0023  # nats a byte: the most of what the paper claims
OF_BITS = {"source": "Watts et al.", "sign": -1, "measure": "int4"}
CLAIMS = (
    Claim("SAM is worse than AdamW", "paper", 1, everywhere("sam", "adamw")),
    Claim("SAM is worse than Functional-SAM", "paper", 1, everywhere("sam", "functional_sam")),
    Claim(
        "the same, both at rho 0.1 and one rate", "paper", 1,
        everywhere(SAM, FUNCTIONAL, "4k"),
    ),
    Claim(
        "this distance grows from 1k tokens to 16k", "ours", 1, {"16k": (SAM, FUNCTIONAL)},
        before=("1k", SAM, FUNCTIONAL),
    ),
    Claim("Functional-SAM is better than AdamW", "paper", -1, everywhere("functional_sam", "adamw"), GAIN),
    Claim(
        "preconditioned Functional-SAM is better than AdamW", "paper", -1,
        {"english": ("precond_functional_sam", "adamw")}, GAIN,
    ),
    Claim("Functional-SAM is better at equal FLOPs", "reviewers", -1, everywhere("functional_sam", "flops", *LADDER)),
    Claim("Momentum-SAM is better than AdamW", "ours", -1, everywhere("msam", "adamw", *LADDER)),
    Claim("Momentum-SAM is better than AdamW's EMA", "ours", -1, everywhere("msam", "adamw ema", *LADDER)),
    Claim("Momentum-SAM keeps more in 4 bits than AdamW", pairs={"english": ("msam", "adamw")}, **OF_BITS),
    Claim(
        "Functional-SAM keeps more in 4 bits than AdamW",
        pairs={"english": ("functional_sam, rho 0.1", "adamw"), "1k": ("functional_sam", "adamw")}, **OF_BITS,
    ),
    Claim(
        "Functional-SAM forgets less than AdamW in fine-tuning", "Watts et al.", -1,
        {"1k": ("functional_sam", "adamw")}, measure="forgetting",
    ),
)  # fmt: skip


class Test(NamedTuple):
    """A claim at one batch: the difference, its p-value, and what more pairs would take, hours of a core."""

    found: en.Difference
    p: float
    hours: float


def main() -> int:
    entries = read()
    draw(entries)
    page = HERE / "README.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- claims -->\n")
    after = rest[rest.index("<!-- end of claims -->") :]
    page.write_text(f"{before}<!-- claims -->\n{table(entries)}{after}", encoding="utf-8")
    return 0


def table(entries: dict[str, dict[str, en.Entry]]) -> str:
    """The claims, a row each, as Markdown."""
    tests = {
        (claim.words, batch): made
        for claim in CLAIMS for batch in claim.pairs if (made := test(claim, entries, batch))
    }  # fmt: skip
    kept = dict(zip(tests, st.holm([each.p for each in tests.values()]) < 1 - st.LEVEL, strict=True))
    heads = ["claim", "of", *(title.replace("\n", " ") for title in BATCHES.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for claim in CLAIMS:
        keys = [(claim.words, batch) for batch in BATCHES]
        cells = [cell(tests[key], kept[key], claim.sign) if key in tests else "" for key in keys]
        lines.append(f"| {' | '.join([claim.words, claim.source, *cells])} |")
    return "\n".join([*lines, ""])


def read() -> dict[str, dict[str, en.Entry]]:
    """{batch: {name: entry}} of the committed runs."""

    def of(study: str, keep: Callable[[results.Result], bool] = lambda _: True) -> list[en.Entry]:
        found = results.with_averages(results.read(str(HERE / study / "runs.jsonl")))
        return en.analyse([each for each in found if keep(each)]).entries

    found = {"english": [each for each in of("english") if each.cell == "0.03m, 200 tokens a parameter"]}
    found["4k"] = [each for each in of("judged") if each.budget == "512 steps"]
    for batch, size in LADDER.items():
        found[batch] = of("ladder", lambda result, size=size: result.config["train.batch_size"] == size)
    named = {batch: {each.name: each for each in own} for batch, own in found.items()}
    for name in ("precond_functional_sam", "sam"):  # a lower rho is a little better on seed 0, and has no other
        named["english"][name] = named["english"][f"{name}, rho 0.1"]
    named["english"][SAM], named["16k"][FUNCTIONAL] = named["english"]["sam"], named["16k"]["functional_sam"]
    for name in (SAM, FUNCTIONAL):
        method, rho = name.split(", ")
        named["1k"][name] = named["1k"][f"{method}, rate 0.008, {rho}"]
    return named


def test(claim: Claim, entries: dict[str, dict[str, en.Entry]], batch: str) -> Test | None:
    """None where no fresh pairs were run."""
    places = [(batch, *claim.pairs[batch]), *([claim.before] if claim.before else [])]
    both = [(own[one], own[one].flops if than == "flops" else own[than])
            for own, one, than in ((entries[place], *pair) for place, *pair in places)]  # fmt: skip
    of = [diff.measured([*entries[place].values()])[claim.measure] for place, *_ in places]
    ways = [en.difference(*pair, measure) for pair, measure in zip(both, of, strict=True)]
    found = [way for way in ways if way and way.fresh]
    if len(found) < len(ways):
        return None
    way = welch(*(each.interval for each in found)) if claim.before else found[0].interval
    sigma = math.sqrt(sum(st.pooled([each.interval]).sigma ** 2 for each in found))
    pairs = next(n for n in range(2, 100_000) if st.detectable(sigma, n) <= claim.least)
    seconds = sum(each.best["seconds"].median() for pair in both for each in pair if each)
    return Test(en.Difference(way, True, {}), st.p_value(way), pairs * seconds / 3600)


def welch(one: st.Interval, other: st.Interval) -> st.Interval:
    """A mean less another of other runs (Welch, Biometrika 34, 1947); n is the first one's."""
    from scipy import stats

    t = lambda df: float(stats.t.ppf((1 + st.LEVEL) / 2, df))  # noqa: E731
    errors = [(each.high - each.low) / 2 / t(each.df) for each in (one, other)]
    variance = sum(error**2 for error in errors)
    df = variance**2 / sum(error**4 / each.df for error, each in zip(errors, (one, other), strict=True))
    half, value = t(df) * math.sqrt(variance), one.value - other.value
    return st.Interval(value, value - half, value + half, one.n, df)


def cell(made: Test, kept: bool, sign: int) -> str:
    """The verdict, and one less the other with its interval."""
    low, high = made.found.interval.low, made.found.interval.high
    shown = f"{made.found.interval.value:+.3f} ± {(high - low) / 2:.3f}".replace("-", "−")
    if kept:
        return f"**{'holds' if made.found.sign == sign else 'fails'}** {shown}"
    return f"cannot be told {shown}, {max(made.hours, 1):,.0f} h"


def draw(entries: dict[str, dict[str, en.Entry]]) -> None:
    """Draws answer.png: the rows less AdamW, a panel a batch; diamonds at equal tokens, squares at equal FLOPs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = ROWS[::-1]
    with mpl.rc_context({"font.size": 11}):
        drawn = Figure(figsize=(6.2, 6.0), layout="constrained")
        panels = drawn.subplots(2, len(BATCHES) // 2, sharex=True, sharey=True).flat
        for axes, (batch, title) in zip(panels, BATCHES.items(), strict=True):
            own = entries[batch]
            for at, name in enumerate(names):
                for marker, shift, other in (("D", 0.12, "tokens"), ("s", -0.18, "flops")):
                    if name not in own or (other == "flops" and own[name].cost < 1.5):
                        continue
                    found = en.difference(own[name], getattr(own[name], other))
                    if found is None or not found.fresh:
                        continue
                    mean, low, high = found.interval[:3]
                    bars = [[mean - low], [high - mean]]
                    style = {"fmt": marker, "color": COLOURS[found.sign], "capsize": 3, "markersize": 5}
                    axes.errorbar(mean, at + shift, xerr=bars, **style)
            axes.axvline(0, color="grey", linewidth=1)
            axes.set_title(title, fontsize=10)
            axes.set_yticks(range(len(names)), [name.replace("adamw ema", "AdamW's EMA") for name in names])
            axes.spines[["top", "right"]].set_visible(False)
        drawn.supxlabel("← better    nats a byte less AdamW    worse →", fontsize=11)
        drawn.savefig(HERE / "answer.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
