"""What a judgement will cost and be able to tell, before its first run."""

from typing import Any

from steppe.scripts.judge import looks
from steppe.scripts.judge.contest import Contender
from steppe.scripts.judge.stages import Arena
from steppe.scripts.judge.verdict import EMA


def plan(arena: Arena, contenders: list[Contender], options: Any) -> None:
    """Prints the stages, their runs, what one of each costs, and what they will be able to tell."""
    arena.make("plan", [each.at((0.0,) * len(each.axes)) | EMA for each in contenders], plan=True)
    rivals = len(contenders) + 3  # their EMA, both's, a short decay, as many FLOPs
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
