"""Sample text from a run's model.

    steppe generate --workdir=DIR [--prompt=TEXT] [--tokens=N] [--temperature=X] [--seed=N] [--step=K]
    steppe generate --workdir=DIR --prompts=FILE [--out=FILE.jsonl]

FILE has one prompt a line; a .jsonl file has objects with "prompt". Prompt i uses the random seed SEED + i.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppe.configs import keys
from steppe.configs.keys import TEXT
from steppe.data import files
from steppe.lm.track.waiting import Progress
from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the samples; returns the exit status, 2 for bad input."""
    parser = command.run_parser("generate", command.headline(__doc__))
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="default: config.sample.prompt of the run")
    prompts.add_argument("--prompts", metavar="FILE", help="one prompt a line, or .jsonl objects with prompt")
    parser.add_argument("--out", metavar="FILE", help="write objects with prompt and text instead of printing")
    parser.add_argument("--batch_size", type=command.integer(1), default=32, help="prompts at a time")
    parser.add_argument("--tokens", type=command.integer(1), default=200, help="at most")
    parser.add_argument("--temperature", type=keys.number(least=0), default=0.8, help="0: greedy")
    parser.add_argument("--seed", type=command.integer(), default=0, help="random seed")
    options = command.options_of(argv, parser)
    if options.prompt is not None and not TEXT.allows(options.prompt):
        return process.fail(f"--prompt={options.prompt!a}: must be {TEXT.text()}")
    prompts = [options.prompt] if options.prompts is None else _prompts(options.prompts)
    with Progress("generate: loading the model", sys.stderr) as progress:
        return _generate(options, prompts, progress)


def _generate(options: Any, prompts: list, progress: Progress) -> int:
    process.ready_to_compute()
    from steppe.lm.keep import saved
    from steppe.lm.run import generate

    run = saved.load(options.workdir, options.step, log=lambda line: None, weights=options.weights, trust=options.trust)
    tokenizer, cap = run.corpus.tokenizer, run.config.model.logit_soft_cap
    decoder = generate.make_decoder(run.parts.shape, tokenizer.vocab_size, run.parts.mesh, cap)
    prompts = [generate.prompt_of(run.config, run.corpus) if prompt is None else prompt for prompt in prompts]
    texts, parts = [], range(0, len(prompts), options.batch_size)
    given = {"tokens": options.tokens, "temperature": options.temperature}
    progress.expect([1.0] * len(parts))
    for start in parts:
        progress.begin("more prompts" if start else f"compiling, then up to {options.tokens} tokens a prompt")
        some = prompts[start : start + options.batch_size]
        texts += generate.generate(decoder, run.params, tokenizer, some, **given, seed=options.seed + start)
        progress.end(f"{len(texts)} of {len(prompts)} prompts")
        if options.out is None:
            for prompt, text in zip(prompts[start:], texts[start:], strict=False):
                shown = files.visible(text) if sys.stdout.isatty() else text  # a pipe gets what the model said
                print(f"=== {prompt!r}\n{shown}" if options.prompts else shown, flush=True)
    if options.out is not None:
        rows = ({"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True))
        files.write(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        process.say(f"wrote {len(texts)} texts to {options.out}")
    return 0


def _prompts(path: str) -> list[str]:
    """The prompts of a file. A line ends only at \\n or \\r\\n; a byte order mark is dropped."""
    from steppe.data.readers.plain import json_value

    try:
        text = Path(path).read_bytes().decode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise command.UsageError(f"--prompts={path}: cannot be read ({why})") from None
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        line = line.removesuffix("\r").removeprefix("\ufeff")
        if path.endswith(".jsonl"):
            try:
                line = json_value(line)["prompt"]
            except (ValueError, TypeError, KeyError):
                line = None
        if not isinstance(line, str) or not TEXT.allows(line):
            raise command.UsageError(f"--prompts={path}: line {number} must be an object with a text as prompt")
        found.append(line)
    if not found:
        raise command.UsageError(f"--prompts={path}: must hold a prompt")
    return found
