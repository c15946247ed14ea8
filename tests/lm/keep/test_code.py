"""A run by code from outside: resumed bit for bit, refused where the file changed, read without running it."""

import json
import sys

import jax
import numpy as np
import pytest

from helpers import lm_runs
from steppe.configs.keys import ConfigError
from steppe.lm.keep import saved
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.run import train
from steppe.optim import base, methods, references

FILE = """
from typing import Annotated
from pathlib import Path
import optax
from steppe.optim import ascent
from steppe.optim.options import POSITIVE, Option

Path(__file__).with_suffix(".ran").touch()

def climb(colour: Annotated[float, Option("unused", *POSITIVE)] = 0.5) -> ascent.Ascent:
    "sam"
    return ascent.gradient()

def adam(learning_rate, b1, b2, eps, damp: Annotated[float, Option("of the step", *POSITIVE)] = 1.0):
    "AdamW"
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(damp), rate)
"""


def forget():
    """As a new process begins: no file has been run."""
    for cache in (references._module, methods._row_from_outside, base._kind_from_outside):
        cache.cache_clear()
    for name in [name for name in sys.modules if name.startswith("steppe_outside_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return lm_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def run(text, file, tmp_path_factory):
    """(its config, its workdir) of a run that was stopped once."""
    config = lm_runs.config(
        *text,
        optim__method=f"{file}:climb",
        optim__base=f"{file}:adam",
        optim__rho=0.05,
        optim__colour=None,
        optim__damp=1.0,
        optim__weight_decay=0.0,
    )
    place = tmp_path_factory.mktemp("run") / "mine"
    assert lm_runs.run(config, place, until=10) == train.FINISHED
    assert lm_runs.run(config, place) == train.FINISHED
    return config, place


def test_a_stopped_run_is_that_of_the_same_optimizer_here_bit_for_bit(run, text, tmp_path):
    """But for the order of scale(1.0) in its chain, which changes no bit."""
    config = lm_runs.config(*text, optim__method="sam", optim__rho=0.05, optim__weight_decay=0.0)
    assert lm_runs.run(config, tmp_path / "sam") == train.FINISHED
    assert lm_runs.losses(run[1]) == lm_runs.losses(tmp_path / "sam")


def test_its_text_is_kept_and_reading_never_runs_it(run, file):
    _, place = run
    kept = json.loads((place / "code.json").read_text())
    assert [each["reference"] for each in kept] == [f"{file}:climb", f"{file}:adam"]
    assert {each["text"] for each in kept} == {FILE}
    forget()
    file.with_suffix(".ran").unlink()
    found = saved.load(str(place))
    assert np.isfinite(float(jax.tree.leaves(found.params)[0].sum()))
    with pytest.raises(WorkdirError, match=r"a user's code.*--trust"):
        saved.load(str(place), optimizer=True)
    assert not file.with_suffix(".ran").exists()
    assert saved.load(str(place), optimizer=True, trust=True).optimizer
    assert file.with_suffix(".ran").exists()


def test_another_file_is_refused_until_it_is_allowed(run, file):
    config, place = run
    file.write_text(FILE + "# changed\n")
    forget()
    try:
        with pytest.raises(ConfigError, match=r"the code the run began with.*--allow_change=code"):
            train.run(config, str(place))
        with pytest.raises(WorkdirError, match="sha256"):
            saved.load(str(place), optimizer=True, trust=True)
        assert train.run(config, str(place), ["code"]) == train.FINISHED
    finally:
        file.write_text(FILE)
        forget()
