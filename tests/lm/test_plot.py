"""The loss curve: what is recorded is what is drawn."""

import io
import math

import numpy as np
import pytest

from steppe.configs import base
from steppe.lm import plot
from steppe.lm.track import lines
from steppe.lm.track.tracker import Tracker

BLUE, VERMILION, GREEN = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


def _record(workdir, losses, perturbed=0.0, held_out=(), facts=None):
    tracker = Tracker(workdir, base.get_config(), total_steps=100, tokens_per_step=1, stream=io.StringIO())
    tracker.run(0, facts or {})
    for step, loss in enumerate(losses, 1):
        tracker.step(step, {"loss": loss, "perturbed_loss": loss + perturbed})
    for step, loss in held_out:
        tracker.evaluation(step, "held_out", {"loss": loss})
    tracker.close("finished")


def _pixels(path, colour):
    """How many pixels of the picture have exactly the colour, and their mean row."""
    from matplotlib import image

    picture = np.round(image.imread(path)[..., :3] * 255).astype(int)
    rows, _ = np.nonzero((picture == colour).all(-1))
    return len(rows), rows.mean() if len(rows) else math.nan


def test_every_recorded_thing_is_drawn(tmp_path):
    losses = [4.0 - 0.02 * step for step in range(100)]
    _record(tmp_path, losses, 0.01, [(50, 3.5), (100, 3.0)], {"baselines": {"unigram": 3.2}, "title": "a run"})
    path = plot.loss_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    for colour in (BLUE, VERMILION, GREEN, (0x55, 0x55, 0x55)):
        assert _pixels(path, colour)[0] > 200, colour
    assert _pixels(path, VERMILION)[1] < _pixels(path, BLUE)[1] < _pixels(path, GREEN)[1]  # higher loss is drawn higher


def test_the_whole_run_is_on_the_left_and_its_later_part_fills_the_right(tmp_path):
    losses = [9.0, 6.0, *(2.0 - 0.001 * step for step in range(98))]
    _record(tmp_path, losses, 0.01, [(0, 9.2), (100, 1.95)], {"baselines": {"unigram": 4.0}})
    whole, later = plot.losses_of(lines.read(tmp_path), "a run").axes[:2]
    assert whole.get_xlim()[0] == 0
    assert whole.get_ylim()[0] < 1.9 < 9.2 < whole.get_ylim()[1]
    assert later.get_xlim()[0] > 20
    assert later.get_ylim()[1] < 2.1, "detail is not flattened by the beginning or a baseline"


def test_without_perturbation_there_is_no_lower_panel(tmp_path):
    _record(tmp_path, [3.0, 2.0, 1.0])
    path = plot.loss_curve(tmp_path)
    assert _pixels(path, BLUE)[0] > 200
    assert _pixels(path, GREEN)[0] == _pixels(path, VERMILION)[0] == 0


@pytest.mark.parametrize("losses", [[2.0], [math.nan], [2.0, math.inf, 1.9], [1.5, 1.5]])
def test_short_or_diverged_runs_are_drawn_too(tmp_path, losses):
    _record(tmp_path, losses, 0.1)
    assert plot.loss_curve(tmp_path).stat().st_size > 1000


def test_nothing_recorded_draws_nothing(tmp_path):
    _record(tmp_path, [])
    assert plot.loss_curve(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_running_mean_is_an_average_from_the_first_value_on():
    assert plot.running_mean([2.0, 2.0, 2.0], 0.1) == pytest.approx([2.0, 2.0, 2.0])
    assert plot.running_mean([1.0, math.nan, 3.0], 0.5) == pytest.approx([1.0, 1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert math.isnan(plot.running_mean([math.inf], 0.5)[0])
