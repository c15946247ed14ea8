"""A trained model in the hands of its users: transformers finds its held-out loss, torchao rounds it to four bits."""

import jax
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data import cache
from steppe.data.loader import held_out_rows, held_out_steps, open_corpus
from steppe.lm.measure import disturb
from steppe.scripts.model import export

torch = pytest.importorskip("torch", reason="steppe[hub] is not installed")
transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
quantization = pytest.importorskip("torchao.quantization", reason="steppe[hub] is not installed")


def test_a_trained_model_has_its_held_out_loss_there_and_loads_in_four_bits(tmp_path):
    """The loss of the run's last evaluation, from transformers; then every linear layer in int4 by torchao."""
    place = tmp_path / "run"
    text = lm_runs.write_text(tmp_path)
    config = lm_runs.config(*text, model__style="modern", train__duration="60 steps")
    assert lm_runs.run(config, str(place)) == 0
    assert export.main([f"--workdir={place}", f"--out={tmp_path / 'hf'}"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    corpus = open_corpus(cache.ensure(config.data))
    batch = held_out_rows(corpus, "val", 0, held_out_steps(corpus, "val", 1))

    def loss():
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor(batch["inputs"])).logits, -1)
        found = log_p.gather(-1, torch.tensor(batch["targets"]).long()[..., None])[..., 0].double()
        weights = torch.tensor(batch["weights"]).double()
        return float(-(found * weights).sum() / weights.sum())

    recorded = lm_runs.records(place, "evaluate")[-1]["loss"]
    assert loss() == pytest.approx(recorded, rel=1e-6)  # sums of float32 in another order
    assert f"{recorded:.4f} nats a token" in (tmp_path / "hf" / "README.md").read_text()
    axis = quantization.granularity.PerAxis(0)
    quantization.quantize_(model, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=axis))
    assert recorded != loss() < 1.1 * recorded


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [0, 32])
def test_a_matrix_is_rounded_as_by_torchao(bits, group):
    """The values of IntxWeightOnlyConfig by default. The largest of a group is halfway between two: either will do."""
    w = np.random.default_rng(bits).normal(size=(24, 96)).astype(np.float32)
    linear = torch.nn.Linear(96, 24, bias=False)
    linear.weight = torch.nn.Parameter(torch.tensor(w))
    granularity = quantization.granularity.PerGroup(group) if group else quantization.granularity.PerAxis(0)
    kind = getattr(torch, f"int{bits}")
    quantization.quantize_(linear, quantization.IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity))
    found = jax.jit(disturb.quantise_array, static_argnums=(1, 2, 3))(w, bits, (1,), group)
    theirs = linear.weight.dequantize().detach().numpy()
    grouped = np.abs(w).reshape(24, -1, group or 96)
    largest = (grouped == grouped.max(-1, keepdims=True)).reshape(w.shape)
    np.testing.assert_allclose(found[~largest], theirs[~largest], rtol=1e-6)
    np.testing.assert_allclose(np.abs(found - w)[largest], np.abs(theirs - w)[largest], rtol=1e-4)
