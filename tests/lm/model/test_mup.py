"""The parametrisation of a whole model: itself at the base width, and flat over widths."""

import jax
import pytest

from helpers import lm_runs
from steppe.configs.keys import ConfigError
from steppe.lm.measure import coordinates
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.check import check
from steppe.lm.parts.step import lower_step

BATCH = {"inputs": "int32", "targets": "int32", "weights": "float32"}
METHOD = {"optim__method": "sam", "optim__rho": 0.05, "model__style": "modern"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return lm_runs.write_text(tmp_path_factory.mktemp("text"))


def test_at_its_base_width_mup_is_the_standard_parametrisation(text):
    """The same programs, of the start and of a step, and so bit for bit the same run."""

    def programs(**model):
        config = lm_runs.config(*text, **METHOD, **{f"model__{key}": value for key, value in model.items()})
        parts = assemble(config, 259, 0, devices=jax.devices()[:1])
        batch = {name: jax.ShapeDtypeStruct((8, 16), dtype) for name, dtype in BATCH.items()}
        start = jax.jit(parts.initialise.func).lower(*parts.initialise.args).as_text()
        return start, lower_step(parts, batch).as_text()

    standard, mup = programs(), programs(parametrisation="mup", base_width=16)
    assert mup == standard
    for one, other in zip(programs(parametrisation="mup", base_width=8), standard, strict=True):
        assert one != other


@pytest.mark.exhaustive  # a minute and a half; against the package mup: parity/test_mup.py
def test_nothing_grows_with_the_width_under_mup(text):
    """From 64 to 1,024. Random logits fall as the root of the width, which their first updates feel as well."""
    short = {
        "data__sequence_length": 8,
        "train__batch_size": 8,
        "model__layers": 1,
        "model__remat": "none",
        "optim__warmup": "0%",
    }
    config = lm_runs.config(*text, **{**METHOD, **short}, optim__peak_learning_rate=0.004).copy_and_resolve_references()
    powers, found = {}, {}  # at the base width, 64, both parametrisations are one, as shown above
    for parametrisation, widths in (("mup", (64, 1024)), ("standard", (64, 256))):
        for width in widths:
            if width not in found:
                made = coordinates.at_width(config.unlock(), width, parametrisation, 64)
                found[width] = coordinates.measure_config(made, coordinates.Settings(steps=3))
        for name in found[64]:
            powers[parametrisation, name] = coordinates.slope({width: found[width][name] for width in widths})
    for name in ("residual", "residual update", "residual perturbation"):
        assert abs(powers["mup", name]) < 0.15, name
    for name in ("logits update", "logits perturbation"):
        assert -0.4 < powers["mup", name] < 0.1, name
    assert powers["standard", "residual update"] > 0.5
    assert powers["standard", "residual perturbation"] > 0.3


def test_what_cannot_be_widened_is_refused_by_key(text):
    wide = {"model__parametrisation": "mup", "model__base_width": 8}
    for key, changes in (
        ("optim.method", {"optim__method": "asam"}),
        ("optim.layerwise_rho", {**METHOD, "optim__layerwise_rho": "norm"}),
    ):
        with pytest.raises(ConfigError) as refusal:
            check(lm_runs.config(*text, **wide, **changes), device_count=1)
        assert refusal.value.key == key
