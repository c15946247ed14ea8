"""A verdict on an optimizer: tuned by equal trials, compared with tuned rivals on fresh paired seeds.

    steppe judge msam --config=quickstart --out=judged [--against=adamw,nadamw] [--trials=12] [--pairs=20]
    steppe judge mine.py:half_sign --config=quickstart --out=judged --plan
    steppe judge --out=judged

CANDIDATE is a method, a base, or FILE.py:NAME. Every contender gets as many trials, on the config's seed, which is not
used again: peak learning rate, rho where it has one, and its own options. The batch is held against the gradient noise
scale, and stays. Then seeds are added, look by look, until the difference from every rival is known to be above, below
or within --effect, or --pairs seeds are there. Rivals are the contenders of --against, AdamW's EMA, AdamW with a short
decay, and, of a dearer candidate, AdamW with as many FLOPs; the candidate's EMA is held against AdamW's. Run the same
command to go on; another candidate in the same DIR costs its own runs alone. Without a CANDIDATE: all verdicts there.
"""

import sys
from collections.abc import Sequence

from steppe.configs import keys
from steppe.configs.read import read_config
from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Plans or runs the stages, then says the verdict; returns the exit status, 75 if stopped before the end."""
    parser = command.parser("judge", __doc__)
    parser.add_argument("candidate", nargs="?", metavar="CANDIDATE", help="a method, a base or FILE.py:NAME")
    parser.add_argument("--out", required=True, type=command.writable_directory, metavar="DIR", help="where it lives")
    parser.add_argument("--against", default="adamw", metavar="NAME,NAME", help="rivals, adamw among them (default)")
    parser.add_argument("--effect", type=keys.number(above=0), default=0.005, metavar="NATS",
                        help="nats a byte below which a difference does not matter (default 0.005)")  # fmt: skip
    parser.add_argument("--trials", type=command.integer(3), default=12, metavar="N", help="of each (default 12)")
    parser.add_argument("--pairs", type=command.integer(3), metavar="N",
                        help="fresh seeds at most (default: as many as tell the effect with power 0.8)")  # fmt: skip
    parser.add_argument("--noise", type=keys.number(above=0), default=0.006, metavar="NATS",
                        help="sd of one pair's difference that the looks are planned for (default 0.006)")  # fmt: skip
    parser.add_argument("--jobs", type=command.integer(), default=0, metavar="N", help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="show the stages and their cost, no more")
    path, overrides, options = command.parse_unread(argv, parser)
    from steppe.scripts.judge import page

    if options.candidate is None:
        print(page.leaderboard(options.out))
        return 0

    from steppe.scripts.judge import stages, verdict
    from steppe.scripts.judge.contest import contender
    from steppe.scripts.judge.plan import plan

    path, given = command.required(path), [(key, "true" if text is None else text) for key, text in overrides]
    config = read_config(path, given)
    names = list(dict.fromkeys(["adamw", *options.against.split(",")]))
    if options.candidate in names:
        return process.fail(f"{options.candidate}: must be left out of --against={options.against}")
    contenders = [contender(name, config) for name in (options.candidate, *names)]
    arena = stages.Arena(options.out, path, given, [f"--jobs={options.jobs}"] if options.jobs else [])
    stages.must_be_new_or_same(options.out, path, given)
    try:
        if options.plan:
            plan(arena, contenders, options)
            return 0
        tuned = [verdict.tune(arena, each, options.trials) for each in contenders]
        batch = verdict.regime(arena, verdict.named(tuned, "adamw"))
        found = verdict.compare(arena, tuned, options) | {"batch": batch}
    except stages.Stopped as stopped:
        return stopped.status
    print(page.keep(options.out, found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
