"""Prepare a corpus once, train a vocabulary, or print a batch.

    steppe prepare_data --config=FILE --out=DIR [--shards=N] [--workers=N]
    steppe prepare_data --config=FILE --out=DIR --hosts=N --launcher=slurm|print
    steppe prepare_data vocabulary --config=FILE --out=FILE.model --size=N [--model_type=bpe]
    steppe prepare_data show DIR --step=K [--batch_size=N] [--seed=N] [--held_out=NAME]

The first form writes the corpus of config.data to DIR; run it again after an interruption. With --hosts, several hosts
that share DIR divide the work: as SLURM jobs, or by one printed command line per host. The corpus is the same either
way. `vocabulary` trains a SentencePiece model on the task of config.data. `show` prints the text of batch K as the
model sees it.
"""

import functools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from steppe.configs import keys
from steppe.data import files
from steppe.lm.track import waiting
from steppe.scripts import command, process
from steppe.scripts.sweep.__main__ import LAUNCHERS


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Runs one of the forms; returns the exit status, 2 for bad input."""
    actions = {"vocabulary": _vocabulary, "show": _show}
    try:
        if argv and argv[0] in actions:
            return actions[argv[0]](argv[1:])
        return _prepare(argv)
    except KeyboardInterrupt:
        return process.fail("interrupted; finished shards are kept, run the same command to continue")


def _prepare(argv: Sequence[str]) -> int:
    parser = command.parser("prepare_data", __doc__)
    add = parser.add_argument
    add("--out", required=True, type=command.workdir, metavar="DIR", help="a new directory, or an interrupted one")
    add("--shards", type=command.integer(1, 99_999), help="files per training source (config.data.shards)")
    add(
        "--workers",
        type=command.integer(1),
        default=os.cpu_count() or 1,
        help="processes, one shard each at a time (default: the number of cores)",
    )
    add("--together", action="store_true", help="share the work with this command on other hosts")
    add("--launcher", default="local", choices=LAUNCHERS, help="how the hosts' processes are started")
    add("--hosts", type=command.integer(1), default=1, help="with slurm and print")
    command.add_texts(parser, "--slurm", "NAME=VALUE,...", "submitit parameters: partition, time...")
    config, options = command.parse(argv, parser)
    if options.launcher == "local" and (options.hosts > 1 or options.slurm):
        given = f"--hosts={options.hosts}" if options.hosts > 1 else f"--slurm={','.join(options.slurm)}"
        return process.fail(f"{given}: needs --launcher=slurm or print")
    from steppe.data import cache, remote
    from steppe.data.prepare import identity, prepare, recipe_of, same

    shards = config.data.shards if options.shards is None else options.shards
    recipe = recipe_of(config.data, shards=shards)
    address = options.out if files.is_remote(options.out) else ""
    if address and (options.together or options.launcher != "local"):
        return process.fail(f"--out={address}: must be a directory that all hosts share, not a URL, to use several")
    if options.launcher != "local":
        return _launch(argv, options)
    manifest = remote.published(address) if address else None
    if manifest:
        same(address, manifest, identity(recipe))
        process.say(f"{address} is already prepared")
        _summary(manifest, address)
        return 0
    with _progress() as (log, report):
        if address:
            options.out = remote.staged(address, cache.cache_of(config.data))
        manifest = prepare(recipe, options.out, options.workers, log, report, together=options.together)
        if address:
            remote.publish(options.out, address, log)
            shutil.rmtree(options.out)
            options.out = address
    _summary(manifest, options.out)
    return 0


def _launch(argv: Sequence[str], options) -> int:
    """Starts or prints the command of each host."""
    from steppe.scripts.sweep import slurm

    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if not skip and name not in ("--launcher", "--hosts", "--slurm", "--together"):
            kept.append(argument)
        skip = not skip and not equals and name in ("--launcher", "--hosts", "--slurm")
    line = [sys.executable, "-P", "-m", "steppe.scripts.prepare_data", *kept, "--together"]
    if options.launcher == "print":
        print("\n".join([shlex.join(line)] * options.hosts))
        return 0
    parameters = slurm.parameters_of(options.slurm)
    process.say(slurm.submit_preparation(line, options.out, options.hosts, options.workers, parameters))
    return 0


def _summary(manifest: Mapping[str, Any], directory: str) -> None:
    for part in ("train", "held_out"):
        for entry in manifest[part]:
            share = f", weight {entry['weight']:g}" if len(manifest[part]) > 1 and part == "train" else ""
            process.say(f"{part:8} {entry['name']}: {entry['tokens']:,} tokens in {entry['rows']:,} rows{share}")
    flags = {"directory": directory, "vocabulary": manifest["vocabulary"]["spec"]}
    flags |= {key: manifest[key] for key in ("sequence_length", "packing")}
    process.say("use it with " + " ".join(f"--config.data.{key}={shlex.quote(str(v))}" for key, v in flags.items()))


@contextmanager
def _progress():
    """(log, report): a live bar on a terminal, otherwise a line every ten seconds."""
    began, earlier = time.monotonic(), None

    def line(state: dict) -> str:
        nonlocal earlier
        earlier = state["shards"] if earlier is None else earlier  # of an interrupted start
        seconds, done = time.monotonic() - began, state["shards"] - earlier
        rate = state["tokens"] / 1e6 / max(seconds, 1e-9)
        left = waiting.clock_face(seconds / done * (state["of"] - state["shards"])) if done else ""
        counts = f"{state['documents']:,} documents, {state['tokens'] / 1e6:,.1f}M tokens, {rate:.2f}M tokens/s"
        return counts + f", left {left}" * bool(left)

    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TextColumn("{task.description}")) as bar:
            task = bar.add_task("starting", total=None)

            def report(state: dict) -> None:
                bar.update(task, total=state["of"], completed=state["shards"], description=line(state))

            write = functools.partial(bar.console.print, highlight=False, markup=False, soft_wrap=True)
            yield lambda text: write(files.visible(text)), report
        return

    told = began

    def report_line(state: dict) -> None:
        nonlocal told
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            process.say(f"{state['shards']}/{state['of']} shards, {line(state)}")

    yield process.say, report_line


def _vocabulary(argv: Sequence[str]) -> int:
    parser = command.parser("prepare_data vocabulary", "Train a SentencePiece model on the task of config.data.")
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the model to write")
    add("--size", type=command.integer(1), required=True, help="pieces, including the 256 bytes")
    add("--model_type", default="bpe", help="bpe or unigram")
    add("--characters", type=keys.number(least=1), default=1e8, metavar="N", help="characters of text to learn from")
    config, options = command.parse(argv, parser)
    if os.path.exists(options.out):
        return process.fail(f"--out={options.out}: exists; choose a new file")
    from steppe.data import readers, sources
    from steppe.data.prepare import recipe_of
    from steppe.data.vocabulary import train_sentencepiece

    recipe = recipe_of(config.data, vocabulary="bytes")
    documents = readers.texts(sources.parse(recipe.task), recipe.reading)
    began = time.monotonic()
    tokenizer = train_sentencepiece(documents, options.out, options.size, options.model_type, int(options.characters))
    process.say(f"{options.out}: {tokenizer.vocab_size:,} pieces of {recipe.task} in {time.monotonic() - began:.1f} s")
    process.say(f"use it with --config.data.vocabulary={options.out}")
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = command.parser("prepare_data show", "Print a batch of a prepared directory, decoded.", config=False)
    parser.add_argument("directory", metavar="DIR", help="a prepared directory")
    parser.add_argument("--step", type=command.integer(), default=0, metavar="K", help="index of the batch")
    parser.add_argument("--batch_size", type=command.integer(1), default=4, help="rows per batch, as in the run")
    parser.add_argument("--seed", type=command.integer(), default=0, help="the run's config.seed")
    parser.add_argument("--held_out", metavar="NAME", help="print this held-out set instead of training text")
    options = command.options_of(argv, parser)
    from steppe.data.loader import held_out_rows, open_corpus, training_rows

    corpus = open_corpus(options.directory)
    if options.held_out:
        batch = held_out_rows(corpus, options.held_out, options.step, options.batch_size)
    else:
        batch = training_rows(corpus, options.seed, options.step, options.batch_size)
    used, task = batch["weights"].mean(), corpus.manifest["identity"]["task"]
    process.say(
        f"{options.directory}: {task}, {corpus.packing}, {corpus.sequence_length} tokens a row, "
        f"vocabulary {corpus.manifest['vocabulary']['spec']}\n"
        f"batch {options.step} of {options.held_out or f'training, seed {options.seed}'}: "
        f"{options.batch_size} rows, {used:.1%} used, {batch['bytes'].sum():,} bytes of source"
    )
    for r in range(options.batch_size):
        _print_row(r, {name: value[r] for name, value in batch.items()}, corpus.tokenizer)
    return 0


def _print_row(number: int, row: dict, tokenizer) -> None:
    eos_id = tokenizer.eos_id
    used = int(row["weights"].sum())
    targets, inputs = row["targets"][:used], row["inputs"][:used]
    process.say(f"\n=== row {number}: {used} of {len(row['targets'])} positions used, {row['bytes']} bytes")
    begin = 0
    while begin < used:
        # Packed rows mark documents by segment; otherwise a document ends at its end-of-document token.
        if "segments" in row:
            end = begin + int((row["segments"][begin:used] == row["segments"][begin]).sum())
        else:
            ends = (targets[begin:] == eos_id).nonzero()[0]
            end = begin + int(ends[0]) + 1 if len(ends) else used
        starts = "document" if inputs[begin] in (tokenizer.begin_id, eos_id) else "rest of a document"
        stops = "ends" if targets[end - 1] == eos_id else "continues elsewhere"
        process.say(f"--- positions {begin} to {end - 1}: {starts}, {stops}")
        process.say(tokenizer.decode(targets[begin:end].tolist()))
        begin = end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
