"""Text sampled from a run's model, as a continuation of a prompt.

steppe generate --workdir=DIR [--prompt=TEXT] [--tokens=N] [--temperature=X] [--seed=N] [--step=K]
"""

import sys
from collections.abc import Sequence

from steppe.configs.keys import TEXT
from steppe.scripts import command


@command.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the sample; returns the exit status, 2 for bad input."""
    parser = command.parser("generate", __doc__.splitlines()[0], config=False)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument(
        "--step", type=command.integer(), metavar="K", help="its checkpoint after K steps; default: the newest"
    )
    parser.add_argument("--prompt", help="default: config.sample.prompt of the run")
    parser.add_argument("--tokens", type=command.integer(1), default=200, metavar="N", help="at most (default 200)")
    parser.add_argument(
        "--temperature", type=command.number(), default=0.8, metavar="X", help="0: greedy (default 0.8)"
    )
    parser.add_argument("--seed", type=command.integer(), default=0, metavar="N", help="another seed, another sample")
    options = command.options_of(argv, parser)
    if options.prompt is not None and not TEXT.allows(options.prompt):
        return command.fail(f"--prompt={options.prompt!a}: must be {TEXT.text()}")

    import jax

    from steppe.lm.keep import saved
    from steppe.lm.run import generate

    run = saved.load(options.workdir, options.step, log=lambda line: None)
    tokenizer, cap = run.corpus.tokenizer, run.config.model.logit_soft_cap
    next_token = jax.jit(generate.make_next_token(run.parts.objective, run.parts.shape, tokenizer.vocab_size, cap))
    text = generate.generate(
        next_token,
        run.params,
        tokenizer,
        prompt=run.config.sample.prompt if options.prompt is None else options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        length=run.config.data.sequence_length,
        seed=options.seed,
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
