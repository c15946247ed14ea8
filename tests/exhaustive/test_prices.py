"""What an addition costs a newcomer, done in a copy of the sources and tried there: files touched and lines written.

CONTRIBUTING.md has the table. A price that rises fails here.
"""

import difflib
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

from helpers import processes

pytestmark = pytest.mark.exhaustive

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("configs", "data", "lm", "optim", "scripts")
TINY = (
    "--config=quickstart --config.model.layers=1 --config.model.width=16 --config.model.heads=2 "
    "--config.model.mlp_width=32 --config.data.sequence_length=16 --config.train.batch_size=4 "
    "--config.train.duration='3 steps' --config.evaluate.batches=1 --config.sample.tokens=0 --config.log.every=1"
)


class Price(NamedTuple):
    """edits: {file: (what stands there, what stands there instead)}, "" of a new file; check: a shell script.

    files: touched at most; lines: added or changed at most.
    """

    files: int
    lines: int
    edits: dict[str, tuple[str, str]]
    check: str


def code(text: str, indent: int = 0) -> str:
    return textwrap.indent(textwrap.dedent(text).lstrip("\n"), " " * indent)


PRICES = {
    "direction": Price(
        1,
        3,
        {
            "optim/ascent.py": (
                "def random(",
                code("""
            def signs() -> Ascent:
                "the sign of g"
                return Ascent(lambda given: (jax.tree.map(jnp.sign, given.gradient), None, given.state), widths=None)


            def random("""),
            )
        },
        f"""
        steppe train {TINY} --config.optim.method=steppe.optim.ascent:signs --config.optim.rho=0.01 --workdir=run
    """,
    ),
    "method": Price(
        1,
        8,
        {
            "optim/methods.py": (
                '    "functional_sam": Method(',
                code(
                    """
                "random_functional_sam": Method(
                    equation="functional_sam with ε = ρ z/‖z‖, z Gaussian",
                    source="a test",
                    ascent=ascent.random,
                    second=second_pass.functional,
                    passes=(2, 2),
                    memory="1 θ",
                ),
                "functional_sam": Method(""",
                    4,
                ),
            )
        },
        f"""
        steppe train {TINY} --config.optim.method=random_functional_sam --config.optim.rho=0.01 --workdir=run
        steppe config optim.method | grep random_functional_sam
    """,
    ),
    "switch of every method": Price(
        1,
        2,
        {
            "optim/passes/two_pass.py": (
                "    widening: float = 1.0\n",
                code(
                    """
                halves: Annotated[int, Option("how often rho is halved", *AT_LEAST_ONE)] = 1
                widening: float = 1.0
            """,
                    4,
                ),
            ),
            "optim/passes/two_pass.py#": (
                "    chosen = mask(known.params, switches.perturb)\n",
                code(
                    """
                chosen, rho = mask(known.params, switches.perturb), rho * 0.5 ** (switches.halves - 1)
            """,
                    4,
                ),
            ),
        },
        f"""
        steppe config optim.halves | grep 'how often rho is halved'
        steppe train {TINY} --config.optim.method=sam --config.optim.rho=0.01 --config.optim.halves=3 --workdir=run
        grep -q '"epsilon_norm": 0.0025' run/metrics.jsonl
        if steppe train {TINY} --config.optim.method=sam --config.optim.halves=0 --workdir=other; then exit 1; fi
    """,
    ),
    "config key": Price(
        1,
        1,
        {
            "configs/base.py": (
                '    "sample.tokens": Key(',
                code(
                    """
                "sample.shout": Key(False, "whether the sample is in capitals", FLAG, free=True),
                "sample.tokens": Key(""",
                    4,
                ),
            )
        },
        f"""
        steppe config sample.shout | grep 'in capitals'
        steppe train {TINY} --config.sample.shout --print_config | grep 'sample.shout.*True'
        if steppe train {TINY} --config.sample.shout=loud --print_config; then exit 1; fi
    """,
    ),
    "source of text": Price(
        2,
        9,
        {
            "data/sources.py": ('FILES = ("text", ', 'FILES = ("chapters", "text", '),
            "data/readers/plain.py": ('read = {"text": _whole, ', 'read = {"chapters": _chapters, "text": _whole, '),
            "data/readers/plain.py#": (
                "def _no_json(",
                code("""
            def _chapters(handle, path, field, mine, seen) -> Iterator[Record]:
                for number, text in enumerate(handle.read().split(b"\\f")):
                    if mine is None or mine(number):
                        yield Record(text, "", f"{path}, chapter {number + 1}")


            def _no_json("""),
            ),
        },
        f"""
        python -c "open('book.txt', 'w').write(chr(12).join(f'chapter {{i}} ' * 300 for i in range(9)))"
        steppe train {TINY} --config.data.task=chapters:book.txt --config.data.held_out_fraction=0.3 \\
            --config.data.cache=made --workdir=run
        test "$(grep -h '"documents":' made/*/manifest.json | tr -dc '0-9\\n' | awk '{{n += $1}} END {{print n}}')" = 9
    """,
    ),
    "base optimizer": Price(
        1,
        1,
        {
            "optim/base.py": (
                '    "muon": Kind(',
                code(
                    """
                "sign": Kind((), lambda s: [optax.scale_by_sign(), s.decay(), s.rate()]),
                "muon": Kind(""",
                    4,
                ),
            )
        },
        f"""
        steppe train {TINY} --config.optim.method=adamw --config.optim.base=sign --workdir=run
        steppe config optim.base | grep sign
    """,
    ),
    "metric of every step": Price(
        1,
        1,
        {
            "lm/parts/step.py": (
                '            "update_norm": length,\n',
                code(
                    """
                        "update_norm": length,
                        "update_largest": jnp.max(jnp.stack([jnp.max(jnp.abs(u)) for u in jax.tree.leaves(updates)])),
            """,
                    12,
                ),
            )
        },
        f"""
        steppe train {TINY} --workdir=run
        test $(grep -c update_largest run/metrics.jsonl) = 3
    """,
    ),
    "figure of the report": Price(
        2,
        12,
        {
            "scripts/report/figures.py": (
                "def loss_against_rho(",
                code("""
            def goodputs(study) -> dr.Drawing | None:
                "The share of the time in steps, a point a run."
                runs = study.trained
                rows = [{"variant": run.variant, "seed": run.seed, "goodput": run.result.goodput, "cell": run.cell}
                        for run in runs.itertuples()]
                return _drawing("goodput", "Time in steps", "Share of the time in steps.", pd.DataFrame(rows), {},
                                labels=("seed", "goodput"), x="seed", y="goodput")


            def loss_against_rho("""),
            ),
            "scripts/report/__main__.py": (
                "figures.scaling(an.scaling(study, scaled)), ",
                "figures.scaling(an.scaling(study, scaled)), figures.goodputs(study),\n",
            ),
        },
        f"""
        steppe sweep {TINY} --grid optim.method=adamw --grid seed=0,1 --jobs=2 --out=sweep
        steppe report sweep
        grep -q 'Time in steps' sweep/report/index.html || test -f sweep/report/goodput.csv
    """,
    ),
    "measurement of a checkpoint": Price(
        1,
        25,
        {
            "lm/measure/widest.py": (
                "",
                code('''
            """The largest parameter of a run.

            steppe widest --workdir=RUN
            """

            from typing import Annotated, Any, NamedTuple

            from steppe.configs.keys import count


            class Settings(NamedTuple):
                """What is asked for."""

                times: Annotated[int, "factor of the result", count(1)] = 1


            TITLES, COMPILING = {"widest": "widest"}, 0.0


            def costs(config, settings, held_out):
                """No gradient."""
                return {}


            def measure_run(run: Any, settings: Settings, programs, other, tick) -> dict[str, Any]:
                """The largest absolute value."""
                import jax

                largest = max(float(abs(p).max()) for p in jax.tree.leaves(run.params))
                return {"summary": {"widest": settings.times * largest}}
        '''),
            )
        },
        f"""
        steppe train {TINY} --workdir=run
        steppe widest --workdir=run --times=2
        steppe widest --help | grep 'factor of the result'
        grep -q widest run/widest/3.json
        steppe report run --out=page
        grep -qi widest page/index.html
    """,
    ),
    "command": Price(
        2,
        9,
        {
            "scripts/hello.py": (
                "",
                code('''
            """Say hello."""

            from steppe.scripts import command


            def main(argv):
                command.options_of(argv, command.parser("hello", __doc__, config=False))
                print("hello")
                return 0
        '''),
            ),
            "scripts/cli.py": (
                '    "doctor": (',
                code(
                    """
                "hello": ("steppe.scripts.hello", ""),
                "doctor": (""",
                    4,
                ),
            ),
        },
        """
        steppe hello | grep hello
        steppe --help | grep hello
        if steppe hello --loud; then exit 1; fi
    """,
    ),
}


@pytest.mark.parametrize("name", PRICES)
def test_an_addition_costs_at_most_its_price_and_works(name, tmp_path):
    price, tree, touched = PRICES[name], tmp_path / "tree", {}
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("studies", "__pycache__", "*.ipynb"))
    (tree / ".typing").mkdir()
    (tree / ".typing" / "steppe").symlink_to("..")
    for key, (before, after) in price.edits.items():
        path = tree / key.rstrip("#")
        text = path.read_text() if before else ""
        assert not before or text.count(before) == 1, f"{key}: {before!r} is not there once"
        touched.setdefault(path, text)
        path.write_text(text.replace(before, after) if before else after)
    added = [
        line
        for path, text in touched.items()
        for line in difflib.ndiff(text.splitlines(), path.read_text().splitlines())
        if line.startswith("+ ") and line[2:].strip()
    ]
    assert len(touched) <= price.files
    assert len(added) <= price.lines, added

    place = tmp_path / "place"
    place.mkdir()
    (place / "bin").mkdir()
    (place / "bin" / "steppe").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m steppe.scripts.cli "$@"\n')
    (place / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in (place / "bin").iterdir():
        program.chmod(0o755)
    environment = {
        **processes.environment(),
        "PYTHONPATH": str(tree / ".typing"),
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
    }
    script = "set -e\n" + textwrap.dedent(price.check)
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert str(tree) in subprocess.run(
        [sys.executable, "-P", "-c", "import steppe.optim; print(steppe.optim.__file__)"],
        env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip
