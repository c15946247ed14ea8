"""Throughput of preparing and loading data, against what training steps consume on this machine.

    python tests/bench/data.py [--vocabulary=FILE ...] [--size=24m] [--steps=N]

Preparation is measured in CPU seconds, so its rates are those of one core even while others are busy; "tokenizer's" is
the share of them that encoding the texts alone takes. What C4 (365 million documents, 750 GB of text) and ten times
that would cost follows from the rate and size of prose, which is read as C4 is: gzipped JSONL. Steps are real ones, of
AdamW, the fastest method. The loop reads through the prefetch of the training loop.
"""

import gzip
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from steppe.configs import keys
from steppe.configs.sizes import SIZES
from steppe.scripts import command, process

C4 = 750e9  # bytes of text of C4's English part


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit status."""
    parser = command.parser("tests/bench/data.py", __doc__, config=False)
    help_of = "a SentencePiece model, tokenizer.json or tiktoken file to prepare with, apart from bytes; repeatable"
    parser.add_argument("--vocabulary", action="append", default=[], metavar="FILE", help=help_of)
    parser.add_argument(
        "--size", default="24m", choices=list(SIZES), help="of the model compared with the quickstart's"
    )
    parser.add_argument("--steps", type=command.integer(1), default=20, metavar="N", help="training steps measured")
    parser.add_argument(
        "--seconds", type=keys.number(above=0), default=3.0, metavar="S", help="seconds per measurement of loading"
    )
    options = command.options_of(argv, parser)
    process.keep_memory()
    from steppe.data.errors import DataError

    folder = tempfile.mkdtemp(prefix="steppe-bench-")
    try:
        _bench_preparation(folder, ["bytes", *options.vocabulary])
        _bench_loading(folder, options.size, options.seconds, options.steps)
    except DataError as error:
        return process.fail(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _recipe(**options):
    from steppe.configs.base import get_config
    from steppe.data.prepare import recipe_of

    return recipe_of(get_config().data, **options)


def _bench_preparation(folder: str, vocabularies: list[str]) -> None:
    """Rates in CPU seconds, against those of the tokenizer alone; and what one large document adds to the memory."""
    words = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty"]
    pick = random.Random(0)

    def document(size: int) -> str:
        return " ".join(pick.choices(words, k=size // 6))

    small, large = Path(folder, "small.jsonl"), Path(folder, "large.jsonl")
    small.write_text("".join(json.dumps({"text": f"{i} {document(100)}"}) + "\n" for i in range(20_000)))
    few = "".join(json.dumps({"text": f"{i} {document(100)}"}) + "\n" for i in range(200))
    Path(folder, "few.jsonl").write_text(few)
    large.write_text(few + json.dumps({"text": document(8_000_000)}) + "\n")

    _write_prose(Path(folder, "prose.jsonl.gz"))
    paper, text = {}, {"embedded": "embedded", f"jsonl:{small}@all": "20,000 small"}
    text[f"jsonl:{folder}/prose.jsonl.gz@all"] = "prose of 2 KB"

    print("preparation                            documents/s     tokens/s   MB/s  tokenizer's  tokens/byte")
    for vocabulary in vocabularies:
        name = Path(vocabulary).name[:14]
        for task, what in text.items():
            for packing in ("concat", "bestfit"):
                entry, spent, alone = _preparation(folder, task, vocabulary, packing)
                rates = f"{entry['documents'] / spent:13,.0f} {entry['tokens'] / spent:12,.0f}"
                size, ratio = entry["bytes"] / spent / 1e6, entry["tokens"] / entry["bytes"]
                paper[name, packing] = entry, spent  # of the last, prose
                print(
                    f"{f'{name}, {packing}, {what}':36} {rates} {size:6.2f} {alone / spent:12.0%} {ratio:12.2f}",
                    flush=True,
                )
    for vocabulary in vocabularies:
        name = Path(vocabulary).name[:14]
        peaks = [_peak(folder, f"jsonl:{path}@all", vocabulary) for path in (Path(folder, "few.jsonl"), large)]
        size = large.stat().st_size - len(few)
        times = (peaks[1] - peaks[0]) / size
        print(f"{name}: one document of {size / 1e6:.0f} MB adds {times:.1f} times its size to the memory")
        for packing in ("concat", "bestfit"):
            entry, spent = paper[name, packing]
            _print_paper(f"{name}, {packing}", entry, spent, peaks[0])


def _write_prose(path: Path) -> None:
    """English of the help topics of pydoc, cut at paragraphs into documents of about 2 KB as C4's are."""
    from steppe.data.readers.built_in import topic_documents

    documents, open_document = [], ""
    for _, text in topic_documents():
        for paragraph in text.decode().split("\n\n"):
            open_document += paragraph + "\n\n"
            if len(open_document) > 2000:
                documents.append(open_document)
                open_document = ""
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        for copy in range(10):
            handle.writelines(json.dumps({"text": f"{copy} {text}"}) + "\n" for text in documents)


def _print_paper(name: str, entry: dict, spent: float, peak: int) -> None:
    for factor, what in ((1, "C4"), (10, "ten times C4")):
        share = factor * C4 / entry["bytes"]
        print(
            f"{name}: {what} takes {share * spent / 3600:,.0f} core-hours, {peak / 1e9:.1f} GB of memory a core, "
            f"{share * entry['size'] / 1e9:,.0f} GB of disk for {share * entry['tokens'] / 1e9:,.0f} billion tokens",
            flush=True,
        )


def _preparation(folder: str, task: str, vocabulary: str, packing: str) -> tuple[dict, float, float]:
    """(what was written of a task in one shard, CPU seconds it took, those of encoding the same texts alone)."""
    from steppe.data import readers, sources
    from steppe.data.packing import token_dtype
    from steppe.data.prepare import shards
    from steppe.data.vocabulary import load_tokenizer

    recipe = _recipe(task=task, vocabulary=vocabulary, packing=packing, sequence_length=512)
    (source,) = sources.parse(task)
    tokenizer = load_tokenizer(vocabulary)
    job = shards.Job("train", source, 0, 1)
    began = time.process_time()
    entry = shards.take(tempfile.mkdtemp(dir=folder), recipe, job, token_dtype(tokenizer.vocab_size))
    spent = time.process_time() - began
    texts = [record.text.decode() for record in readers.READERS[source.kind].records(source, recipe.reading)]
    began = time.process_time()
    for text in texts:
        tokenizer.encode(text)
    return entry, spent, time.process_time() - began


def _peak(folder: str, task: str, vocabulary: str) -> int:
    """Largest resident bytes of a process that prepares a task (Linux)."""
    program = (
        "import sys\n"
        "from steppe.data.prepare.__main__ import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        # not ru_maxrss, which begins with the size of the process that started this one
        "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
    )
    recipe = _recipe(
        task=task, vocabulary=vocabulary, held_out=(f"few=lines:{folder}/few.jsonl@all",), sequence_length=512
    )
    command_line = [sys.executable, "-P", "-c", program, json.dumps(recipe._asdict()), tempfile.mkdtemp(dir=folder)]
    found = subprocess.run(command_line, check=True, capture_output=True, text=True)
    return int(found.stdout.split()[-1])


def _bench_loading(folder: str, size: str, seconds: float, steps: int) -> None:
    from steppe.configs import base, quickstart, sizes
    from steppe.data.loader import open_corpus, training_rows
    from steppe.data.prepare import prepare

    small = quickstart.get_config()
    small.optim.update(method="adamw", rho=None)
    large = base.get_config()
    large.model.size, large.data.sequence_length, large.train.batch_size = size, 512, 8
    print("\nloading, one thread              batch x T     tokens/s | steps use tokens/s  ratio  wait for data")
    for name, config, count in (("quickstart", small, steps), (f"{size}, bytes", large, max(2, steps // 5))):
        recipe = _recipe(sequence_length=config.data.sequence_length)
        directory = f"{folder}/{recipe.sequence_length}"
        prepare(recipe, directory, log=lambda line: None)
        corpus = open_corpus(directory)
        batch_size, length = config.train.batch_size, corpus.sequence_length
        training_rows(corpus, 0, 0, batch_size)
        began, read = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            training_rows(corpus, 0, read, batch_size)
            read += 1
        loaded = read * batch_size * length / (time.perf_counter() - began)
        used, waited = _step_rate(sizes.resolve(config), corpus, count)
        rates = f"{loaded:12,.0f} | {used:18,.0f} {loaded / used:6.0f} {waited:14.3%}"
        print(f"{name:32} {batch_size:4} x {length:4} {rates}", flush=True)


def _step_rate(config, corpus, steps: int) -> tuple[float, float]:
    """(tokens/s, fraction of the time spent waiting for data) of real training steps."""
    import jax

    from steppe.data.loader import prefetch, training_rows
    from steppe.lm.model.mesh import local_rows, place_batch
    from steppe.lm.parts.state import create
    from steppe.scripts.plan.compiled import compiled_step

    parts, step = compiled_step(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, jax.devices())
    state = create(parts.mesh, parts.initialise)
    batch_size = config.train.batch_size
    rows = local_rows(parts.mesh, batch_size)

    def read(index: int) -> dict:
        batch = training_rows(corpus, config.seed, index, batch_size, rows)
        batch.pop("bytes")
        return place_batch(parts.mesh, batch_size, rows, batch)

    def run(first: int, last: int) -> Iterator[float]:
        nonlocal state
        with prefetch(read, first, last, config.data.prefetch, config.data.workers) as batches:
            for _, batch in batches:
                state, metrics = step(state, batch, math.inf, parts.scalars)
                jax.block_until_ready(metrics["loss"])
                yield batches.last_wait

    list(run(0, 1))  # warms up
    began = time.perf_counter()
    waited = sum(list(run(1, 1 + steps))[1:])  # nothing can be ready for the first
    spent = time.perf_counter() - began
    return steps * batch_size * corpus.sequence_length / spent, waited / spent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
