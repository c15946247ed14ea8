"""Evaluate a run: held-out loss next to its baselines, and multiple choice.

steppe evaluate --workdir=DIR [--step=K] [--batches=N] [--task=SOURCE] [--choices=name=jsonl:FILE ...]
"""

import sys
from collections.abc import Sequence
from typing import Any

from steppe.lm.track.waiting import Progress
from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints one line per held-out set; returns the exit status, 2 for bad input."""
    parser = command.run_parser("evaluate", command.headline(__doc__))
    add = parser.add_argument
    add("--batches", type=command.integer(), default=0, help="batches of each set; 0 (default): all")
    said = "other text, in the form of config.data.task; default: the run's held-out sets"
    add("--task", metavar="SOURCE", help=said)
    add("--choices", action="append", metavar="NAME=jsonl:FILE", help="multiple-choice items; default: the run's own")
    options = command.options_of(argv, parser)
    with Progress("evaluate: loading the model", sys.stderr) as progress:
        return _evaluate(options, progress)


def _evaluate(options: Any, progress: Progress) -> int:
    process.ready_to_compute()
    from steppe.data import baselines
    from steppe.data.cache import held_out_of
    from steppe.data.loader import held_out_steps
    from steppe.lm.keep import saved
    from steppe.lm.measure import choices
    from steppe.lm.measure.evaluate import evaluate, held_out, make_evaluation_step

    questions = choices.read(options.choices or ())
    run = saved.load(options.workdir, options.step, weights=options.weights, trust=options.trust)
    stored = run.config.evaluate.choices
    if not questions and not options.trust and any("://" in each for each in stored):
        raise command.UsageError(
            f"{options.workdir}: config.evaluate.choices = {', '.join(stored)}: URLs of a stored config are not used; "
            "name the items with --choices, or pass --trust if the run is your own"
        )
    questions = questions or choices.read(stored)
    step, corpus, size = make_evaluation_step(run.parts), run.corpus, run.config.train.batch_size
    if options.task is not None:
        corpus = held_out_of(saved.own_data(run.config, run.corpus, options.trust), options.task)
    counts = baselines.token_counts(run.corpus, run.corpus.tokenizer.vocab_size)
    print(f"{'held-out set':<20} {'nats/token':>10} {'bits/byte':>10} {'unigram':>8} {'gzip -9':>8} {'tokens':>12}")
    most = {name: held_out_steps(corpus, name, size) for name in corpus.held_out}
    steps = {name: min(options.batches or each, each) for name, each in most.items()}
    length = run.config.data.sequence_length
    rows = {name: choices.rows(items, run.corpus.tokenizer, length) for name, items in questions.items()}
    asked = {name: choices.steps(each, size) for name, each in rows.items()}
    progress.expect([*steps.values(), *asked.values()])
    for name, batches in steps.items():
        text = held_out(corpus, name, run.parts.mesh, size, options.batches)
        found = evaluate(step, run.params, progress.over(name, text, batches))
        progress.end(name)
        reference = baselines.baselines(corpus, name, counts)
        process.say(
            f"{name:<20} {found['loss']:>10.4f} {found['bits_per_byte']:>10.4f} {reference['unigram']:>8.4f} "
            f"{reference['gzip']:>8.4f} {found['tokens']:>12,}"
        )
    scores = choices.make_scores(run.parts)
    for name, items in questions.items():
        batches = progress.over(name, choices.batches(rows[name], run.parts.mesh, size), asked[name])
        found = choices.measure(scores, run.params, items, rows[name], batches)
        progress.end(name)
        accuracy = f"accuracy {found['accuracy']:.4f}, per byte {found['accuracy_per_byte']:.4f}"
        process.say(f"choices {name}: {accuracy}, of {len(items):,} items")
    return 0
