"""Export a run's model as a Hugging Face directory, for lm-eval, vLLM, quantisers and fine-tuning.

steppe export --workdir=DIR --out=HF_DIR [--step=K]
"""

from collections.abc import Sequence

from steppe.configs import packages
from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Writes the directory; returns the exit status, 2 for bad input."""
    parser = command.run_parser("export", command.headline(__doc__))
    directory = command.writable_directory
    parser.add_argument("--out", required=True, type=directory, metavar="HF_DIR", help="a new or empty directory")
    options = command.options_of(argv, parser)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        return process.fail(f"--out={options.out}: must be a new or empty directory")
    if lacking := packages.lacking("safetensors", "tokenizers", "transformers"):
        return process.fail(f"export {lacking}")

    from steppe.lm.hub import export, families
    from steppe.lm.keep import saved

    run = saved.unread(options.workdir, options.step, log=process.say, weights=options.weights, trust=options.trust)
    export.export(run, str(options.out), log=process.say)
    architecture = families.of_config(run.config).architecture
    process.say(f"{options.out} holds {run.config.model.style} as {architecture}; load it with")
    process.say(f"  transformers.AutoModelForCausalLM.from_pretrained({str(options.out)!r})")
    return 0
