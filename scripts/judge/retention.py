"""What a candidate's models keep next to AdamW's of the same seeds, by steppe retention: rises of the loss.

Intervals are those of the look at which the comparison with AdamW stopped, with a measure's share of the error: all
rows together miss a true difference at most as often as declared, at whatever look it stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from steppe.configs.read import UsageError
from steppe.scripts import process, results
from steppe.scripts.judge.numbers import looks
from steppe.scripts.judge.stages import Stopped
from steppe.scripts.judge.trend import ALPHA
from steppe.scripts.measure.__main__ import main as measure
from steppe.scripts.report.numbers import statistics as st

MEASURES = {
    "forgetting_at_equal_gain": "forgetting at one gain",
    "q8_channel": "8 bits a channel",
    "q4_group64": "4 bits by 64",
    "q3_group64": "3 bits by 64",
    "noise_0.1": "noise of 0.1 rms",
}


def compared(case: Any, pairs: int, task: str) -> dict[str, Any]:
    """Measures the pairs of the candidate and AdamW; {"gain": of the fine-tuning, nats a token, "rows": each measure}.

    case: verdict.Case; task: the second text. Raises Stopped, UsageError.
    """
    if pairs not in case.rule.looks:
        return {}
    both = [case.tuned[0].settings, case.rivals["adamw"].settings]
    process.say(f"retention   {pairs} pairs of the candidate and AdamW")
    find = case.arena.read()
    places = [run.directory for each in both for run in case.runs(find, each, pairs)]
    if packed := [place for place in places if place.is_file()]:
        raise UsageError(f"--retention: must be left out, the runs in {packed[0]} have no checkpoints")
    if status := measure(["retention", *(f"--workdir={place}" for place in places), f"--fine_tune={task}"]):
        raise Stopped(status)
    find = case.arena.read()
    mine, theirs = ([run.retention for run in case.runs(find, each, pairs)] for each in both)
    equal = results.read_json(results.measured(places[0], "retention")[-1], dict[str, Any])["details"].get("equal", {})
    return {"gain": equal.get("gain"), "rows": rows(case.rule, mine, theirs)}


def rows(
    rule: looks.Rule, mine: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """{measure: {level, difference, low, high}}, nats a token, of the measures that all runs have."""
    known = [name for name in MEASURES if all(name in each for each in (*mine, *theirs))]
    if not known:
        return {}
    error = looks.errors(rule.looks, ALPHA / len(known))[rule.looks.index(len(mine))]
    found = {}
    for name in known:
        interval = st.t_interval([a[name] - b[name] for a, b in zip(mine, theirs, strict=True)], 1 - error)
        level = sum(each[name] for each in mine) / len(mine)
        found[name] = {"level": level, "difference": interval.value, "low": interval.low, "high": interval.high}
    return found


def text(found: Mapping[str, Any]) -> str:
    """A table for a reader."""
    lines = [f"{'loss rises by, less adamw':<24} {'nats a token':>12}  {'less adamw':>10}  {'95% over all rows':>20}"]
    for name, each in found["rows"].items():
        way = "less" if each["high"] < 0 else "more" if each["low"] > 0 else "not told apart"
        bounds = f"{each['low']:+.4f} to {each['high']:+.4f}"
        said = f"{each['level']:>12.4f}  {each['difference']:>+10.4f}  {bounds:>20}  {way}"
        lines.append(f"{MEASURES[name]:<25} {said}")
    if found["gain"]:
        lines.append(f"forgetting is at a gain of {found['gain']:.3g} nats a token on the second text")
    return "\n".join(lines)
