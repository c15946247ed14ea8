"""FLOPs as they are printed, of every method and switch, against XLA's count of the step with its layers unrolled."""

import argparse

import pytest

from bench import methods as bench
from steppe.optim.methods import METHODS, cost

# Wide and long enough for products to be nearly all: what is not counted (norms, softmax, GELU, noise) is then 2 %.
SMALL = argparse.Namespace(layers=1, width=256, vocabulary=1024, batch_size=64, sequence_length=64, chunks=1)
SWITCHES = [{}, {"microbatches": 2}, {"microbatches": 2, "ascent_over": "microbatch"}]
SUBSET = [
    {"ascent_over": "subset", "ascent_fraction": 0.5},
    {"ascent_over": "subset", "ascent_fraction": 0.75, "microbatches": 2},
]
ANCHORED = ("sam", "functional_sam", "logit_sam", "mixture_sam")
KEEPING = ("functional_sam", "logit_sam", "mixture_sam", "functional_msam")
# Methods and switches taking turns, half of them by day; every pair: pytest -m exhaustive.
TURNS = [(name, SWITCHES[i % 3]) for i, name in enumerate(METHODS)]
TURNS += [(name, SUBSET[i % 2]) for i, name in enumerate(ANCHORED)] + [(name, {"keep": True}) for name in KEEPING]
SOME = [pytest.param(*pair, marks=[pytest.mark.exhaustive] * (i % 2)) for i, pair in enumerate(TURNS)]
ALL = [(name, switches) for name in METHODS for switches in SWITCHES]
ALL += [(name, switches) for name in ANCHORED for switches in SUBSET]


def check(name, switches, optimize):
    if name == "k_sam":
        switches = {**switches, "k": 2}
    measured, _, _ = bench.measure(name, SMALL, memory=False, optimize=optimize, **switches)
    predicted = bench.predicted(SMALL, cost(name, sequences=SMALL.batch_size, **switches))
    assert measured == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize(("name", "switches"), SOME, ids=str)
def test_flops(name, switches):
    """Of the lowered program."""
    check(name, switches, optimize=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "switches"), ALL, ids=str)
def test_flops_of_the_compiled_program(name, switches, optimized):
    check(name, switches, optimize=True)
