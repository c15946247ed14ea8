"""The coordinate check: powers of the width, and the models of each width."""

import math

import pandas as pd
import pytest

from steppe.configs import read
from steppe.configs.read import UsageError
from steppe.lm.measure import coordinates


def test_powers_are_those_of_power_laws():
    widths = (64, 128, 512)
    laws = {
        ("standard", "residual"): 1.5,
        ("mup", "residual"): 0.0,
        ("standard", "logits"): -0.5,
        ("mup", "logits"): 1.0,
    }
    rows = {
        (form, width): {of: 0.1 * width**power for (by, of), power in laws.items() if by == form}
        for form in ("standard", "mup")
        for width in widths
    }
    frame = pd.DataFrame(rows.values(), pd.MultiIndex.from_tuples(rows))
    shown = [line.split() for line in coordinates.note(frame).splitlines()[-2:]]
    assert shown == [["residual", "+1.50", "+0.00"], ["logits", "-0.50", "+1.00"]]
    drawn = coordinates.draw(frame)
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["residual", "logits"]
    assert [line.get_label() for line in drawn.axes[1].lines] == ["standard: width^-0.50", "mup: width^+1.00"]
    for axes in drawn.axes:  # ticks within the limits, for one decade or for many
        low, high = axes.get_ylim()
        shown = [float(each.get_text()) for each in axes.get_yticklabels() if low <= each.get_position()[1] <= high]
        assert len(shown) >= 2
    assert math.isnan(coordinates.slope({64: 1.0, 128: 0.0}))  # one that is not 0


def test_a_model_of_each_width_and_parametrisation_keeps_the_head_and_the_ratio_of_the_mlp():
    config = read.read_config("quickstart", [])
    head, ratio = config.model.width // config.model.heads, config.model.mlp_width / config.model.width
    made = coordinates.configs(config, coordinates.Settings(widths=(4 * head, head)))
    assert list(made) == [(form, width) for form in ("standard", "mup") for width in (head, 4 * head)]
    for (form, width), each in made.items():
        model = each.model
        assert (model.parametrisation, model.width, model.base_width) == (form, width, head)
        assert model.width // model.heads == head
        assert model.mlp_width == round(ratio * width)
    with pytest.raises(UsageError, match=f"--widths = {head + 1}: must be multiples of {head}"):
        coordinates.configs(config, coordinates.Settings(widths=(head, head + 1)))
