"""Draw the loss curve of a run, finished or not, from its metrics.jsonl into DIR/loss.png.

steppe plot DIR [DIR ...]
"""

from collections.abc import Sequence

from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Draws each run's curve and prints the file's path; returns the exit status, 2 for bad input."""
    parser = command.parser("plot", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a workdir, or a pattern of workdirs")
    options = command.options_of(argv, parser)

    from steppe.lm import plot
    from steppe.lm.keep import mirror
    from steppe.scripts import results

    for run in results.read(options.directories):
        picture = plot.loss_curve(run.directory)
        mirror.add(run.directory, "loss.png")
        process.say(picture or f"{run.directory}: no step has been recorded ({run.why or run.status})")
    return 0
