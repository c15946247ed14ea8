"""A verdict on an optimizer: tuned by equal trials, compared with tuned rivals on fresh paired seeds.

    steppe judge msam --config=quickstart --out=judged [--against=adamw,nadamw] [--trials=12] [--budget='6 hours']
    steppe judge mine.py:half_sign --config=quickstart --out=judged --plan
    steppe judge --out=judged [--again]

CANDIDATE is a method, a base, or FILE.py:NAME. Tuning gives every contender the same number of trials: peak learning
rate, rho if it has one, and its own options. Trials use the config's seed alone. Where AdamW's trials have the same
order at half of the run as at its end, losing trials of the others stop there. The command reports whether the batch is
below the gradient noise scale; it does not change the batch. The comparison then adds fresh seeds, look by look. It
stops when each difference is known to be above, below or within --effect, or after --pairs seeds.

The rivals are the contenders of --against, AdamW's EMA and AdamW with a short decay. If a step of the candidate costs
more than AdamW's, AdamW with as many FLOPs is a rival too. The candidate's EMA is compared with AdamW's EMA. Shorter
and longer AdamW runs tell how many tokens AdamW needs for the candidate's loss. Run the same command again to resume.
Another candidate in the same DIR costs only its own runs. Without CANDIDATE, the command lists all verdicts of DIR and
writes their page; --again makes each verdict anew from the runs that DIR has.
"""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from steppe.configs import keys
from steppe.configs.read import UsageError, read_config
from steppe.configs.sizes import SIZES
from steppe.scripts import command, process
from steppe.scripts.judge.stages import Budget, budget
from steppe.scripts.sweep.__main__ import add_launch


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Plans or runs the stages, then says the verdict; returns the exit status, 75 if stopped before the end."""
    parser = command.parser("judge", __doc__)
    add = parser.add_argument
    add("candidate", nargs="?", metavar="CANDIDATE", help="a method, a base or FILE.py:NAME")
    add("--out", required=True, type=command.writable_directory, help="directory of runs and verdicts")
    add("--against", default="adamw", metavar="NAME,NAME", help="rivals; adamw is always one (default)")
    add("--effect", type=keys.number(above=0), default=0.005, metavar="NATS",
                        help="nats a byte below which a difference does not matter")  # fmt: skip
    add("--trials", type=command.integer(3), default=12, help="trials of each contender")
    said = "fresh seeds at most (default: as many as tell the effect with power 0.8)"
    add("--pairs", type=command.integer(3), help=said)
    add("--noise", type=keys.number(above=0), default=0.006, metavar="NATS",
                        help="sd of one pair's difference that the looks are planned for")  # fmt: skip
    add("--budget", type=budget, metavar="TIME|FLOPS",
                        help="'6 hours' or FLOPs for all runs of a verdict; no look starts beyond it")  # fmt: skip
    add("--sizes", type=sizes, default=(), metavar="NAME,NAME",
                        help="judge at each of these values of config.model.size, and fit the trend")  # fmt: skip
    add("--retention", nargs="?", const="topics", metavar="TASK",
                        help="also compare fine-tuning on TASK (default topics), rounding and noise")  # fmt: skip
    add_launch(parser, ("local", "slurm"))
    command.add_trust(parser)
    add("--plan", action="store_true", help="only show the stages and their cost")
    add("--again", action="store_true", help="without CANDIDATE: make all verdicts of DIR from its runs")
    path, overrides, options = command.parse_unread(argv, parser)
    from steppe.scripts.judge import board, stages, trend

    if options.candidate is None:
        if options.again:
            path, given = stages.began_with(options.out)
            for each in board.read(options.out):
                judged(asked(options, each), path, given, each["size"])
        process.say(board.write(options.out))
        return 0

    path, given = command.required(path), [(key, "true" if text is None else text) for key, text in overrides]
    if options.candidate in against(options):
        return process.fail(f"{options.candidate}: must be left out of --against={options.against}")
    if options.launcher != "local" and not options.jobs:
        return process.fail(f"--jobs = 0: must be >= 1 with --launcher={options.launcher}: how many runs at a time")
    if options.sizes and "model.size" in dict(given):
        return process.fail(f"config.model.size = {dict(given)['model.size']}: must be left out with --sizes")
    try:
        found = [judged(options, path, given, size) for size in options.sizes or ("",)]
    except stages.Stopped as stopped:
        return stopped.status
    if len(options.sizes) > 1 and not options.plan:
        process.say(trend.keep(options.out, found))
    if not options.plan:
        process.say(board.write(options.out))
    return 0


def sizes(text: str) -> tuple[str, ...]:
    """Names of sizes; ArgumentTypeError."""
    known = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in known if name not in SIZES]:
        hint = keys.named("optim.options:nearest")(unknown[0], list(SIZES))
        known = f"one or more of {', '.join(SIZES)}, with commas between them"
        raise ArgumentTypeError(f"{unknown[0] or 'nothing'}: must be {known}{hint}")
    return known


ASKED = ("candidate", "against", "effect", "trials", "pairs", "noise", "retention")


def asked(options: Namespace, found: dict[str, Any]) -> Namespace:
    """The options that a verdict was asked for with. Raises UsageError of a verdict that does not say."""
    if "asked" not in found:
        raise UsageError(f"{found['candidate']}: must be judged again by its own command, its verdict has no options")
    given = found["asked"]
    outside = [name for name in [given["candidate"], *against(Namespace(**given))] if ".py:" in name]
    if outside and not options.trust:
        raise UsageError(f"{outside[0]}: is code that a stored verdict names; --trust runs it")
    spent = given["budget"] and Budget(*given["budget"])
    return Namespace(**{**vars(options), **given, "budget": spent, "launcher": "local"})


def against(options: Any) -> list[str]:
    """The names of contenders besides the candidate, AdamW's first."""
    return list(dict.fromkeys(["adamw", *options.against.split(",")]))


def judged(options: Any, path: str, given: list[tuple[str, str]], size: str) -> dict[str, Any]:
    """Plans or makes the stages at one size, "" for the config's own, and prints what they say; the verdict."""
    from steppe.scripts.judge import page, stages, tuning, verdict
    from steppe.scripts.judge.contest import contender
    from steppe.scripts.judge.plan import plan
    from steppe.scripts.sweep.plan import at_a_time, devices_of

    overrides = [*given, ("model.size", size)] if size else given
    config = read_config(path, overrides)
    contenders = [contender(name, config) for name in (options.candidate, *against(options))]
    jobs = options.jobs or at_a_time(options, devices_of(options)[1])
    arena = stages.Arena(options.out, path, overrides, options, jobs, size and f"@{size}", options.again)
    if not options.again and not options.plan:
        arena.planned(list(map(tuning.begin, contenders)))  # refuses a contender before others are tuned for hours
    stages.must_be_new_or_same(options.out, path, given, keep=not options.plan)
    if options.plan:
        process.say(f"{size}\n" * bool(size) + plan(arena, contenders, options))
        return {}
    first = next(each for each in contenders if each.name == "adamw")
    adamw = tuning.tune(arena, first, options.trials)
    rung = tuning.rung(adamw)
    process.say(f"halving     {tuning.said(rung)}")
    halve = rung.get("holds", False)
    tuned = [adamw if each is first else tuning.tune(arena, each, options.trials, halve) for each in contenders]
    batch = tuning.regime(arena, adamw)
    found = verdict.compare(arena, tuned, options) | {"batch": batch, "halving": rung, "size": size}
    found["asked"] = {name: getattr(options, name) for name in ASKED} | {"jobs": jobs, "budget": options.budget}
    process.say(page.keep(options.out, found))
    return found
