"""Checkpoints measured by steppe curvature, on one device and on eight simulated ones."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from helpers import lm_runs
from steppe.data import loader
from steppe.lm.keep import saved
from steppe.lm.measure import curvature
from steppe.lm.run import train
from steppe.optim.ascent import preconditioner
from steppe.optim.base import moments
from steppe.optim.rule import norm, plain_gradient
from steppe.scripts.measure import __main__ as measure

pytestmark = pytest.mark.usefixtures("one_device")

FLAGS = ["--batches=1", "--probes=3", "--densities=1", "--lanczos=8", "--ascent=1", "--draws=2", "--slices=3"]
NOISE = "--noise_scale=3"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of 4 steps, with checkpoints after 2 and 4, measured at all of them."""
    place = tmp_path_factory.mktemp("corpus")
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:9_000])
    (place / "val.txt").write_text(source[9_000:12_000])
    config = lm_runs.config(
        str(place), str(place / "cache"), train__duration="4 steps", checkpoint__every="2 steps", checkpoint__keep=2,
        optim__method="friendly_sam", evaluate__every="4 steps", sample__tokens=0,
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert lm_runs.run(config, str(workdir)) == train.FINISHED
    assert saved.steps(str(workdir)) == [2, 4]
    assert (
        measure.main(
            ["curvature", f"--workdir={workdir.parent}/run*", "--step=all", f"--towards={workdir}", *FLAGS, NOISE]
        )
        == 0
    )
    return workdir


@pytest.fixture(scope="module")
def measured(run):
    """{step: what was found}, as the first test sees it: others measure again."""
    return {step: json.loads((run / "curvature" / f"{step}.json").read_text()) for step in (2, 4)}


@pytest.fixture(scope="module")
def found(measured):
    return measured[4]


@pytest.fixture(scope="module")
def dense(run):
    """(loss, theta, gradient, D, log probabilities) at the checkpoint, written without Steppe's products."""
    model = saved.load(str(run), 4, log=lambda line: None, optimizer=True)
    batch = loader.held_out_rows(model.corpus, "val", 0, 8)
    batch.pop("bytes")
    params = jax.device_get(model.params)
    theta, tree = ravel_pytree(params)

    def log_p(x):
        p = tree(x)
        hidden = model.parts.objective.trunk(p, batch)
        return jax.nn.log_softmax((hidden @ p["embed"]["embedding"].T)[..., : model.parts.options.vocabulary])

    def loss(x):
        hit = jnp.take_along_axis(log_p(x), batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(hit * batch["weights"]) / jnp.sum(batch["weights"])

    second = moments(jax.device_get(model.optimizer), params, model.config.optim.b2)
    scale = ravel_pytree(preconditioner(second.second, second.count == 0))[0]
    return jax.jit(loss), theta, jax.jit(jax.grad(loss))(theta), scale, jax.jit(log_p)(theta)


def test_every_number_is_there(run, found):
    summary = found["summary"]
    assert all(isinstance(value, float) for value in summary.values())
    assert found["tokens"] == 8 * 16
    assert len(found["spectra"]["hessian"]["samples"]) == 3
    for name in ("spectra-4.png", "slices-4.png", "spectra-2.png", "training.png"):
        assert (run / "curvature" / name).read_bytes().startswith(b"\x89PNG")
    assert set(curvature.TITLES) <= set(summary)


def test_parts_add_up(found):
    summary = found["summary"]
    assert summary["trace"] == pytest.approx(summary["ggn_trace"] + summary["nme_trace"], rel=2e-4)
    parts = sum(summary[f"{name}_sharpness"] for name in ("first_order", "functional", "logit"))
    assert summary["sam_sharpness"] == pytest.approx(parts, abs=2e-6)
    assert summary["sam_sharpness"] > summary["first_order_sharpness"] > 0
    share = summary["delta_func_norm"] ** 2 / (summary["delta_func_norm"] ** 2 + summary["delta_logit_norm"] ** 2)
    assert summary["delta_func_share"] == pytest.approx(share, rel=1e-4)
    assert summary["lambda_max_residual"] < 0.05 * summary["lambda_max"]
    for name in ("hessian", "ggn", "nme"):
        grid, height = (np.array(found["spectra"][name][key]) for key in ("grid", "density"))
        assert np.trapezoid(height, grid) == pytest.approx(1, abs=1e-3)
    groups = [found["delta"][name] for name in ("attention", "mlp", "norms", "embeddings")]
    assert sum(group["logit_share"] for group in groups) == pytest.approx(1, rel=1e-4)


def test_against_the_loss_written_out(found, dense):
    loss, theta, gradient, scale, _ = dense
    summary, length = found["summary"], jnp.linalg.norm(gradient)
    assert summary["loss"] == pytest.approx(float(loss(theta)), rel=1e-5)
    assert summary["gradient_norm"] == pytest.approx(float(length), rel=1e-4)
    product = jax.jit(lambda v: jax.jvp(jax.grad(loss), (theta,), (v,))[1])

    def largest(multiply, vector):
        for _ in range(40):  # power iteration: no Lanczos
            vector = multiply(vector / jnp.linalg.norm(vector))
        return float(jnp.linalg.norm(vector))

    assert summary["lambda_max"] == pytest.approx(largest(product, gradient), rel=0.02)
    half = scale**-0.5
    top = largest(lambda v: half * product(half * v), half * gradient)
    assert summary["precond_lambda_max"] == pytest.approx(top, rel=0.05)
    whole = float(jnp.linalg.norm(product(gradient / length)))  # |GGN u + NME u|
    a, b, c = (summary[f"delta_{key}"] for key in ("logit_norm", "func_norm", "cosine"))
    assert (a**2 + b**2 + 2 * a * b * c) ** 0.5 == pytest.approx(whole, rel=1e-3)
    line = found["slices"]["gradient"]
    wanted = [float(loss(theta + x * gradient / length)) for x in line["at"]]
    assert line["loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["slices"]["plane"]["loss"][1][1] == pytest.approx(summary["loss"], rel=1e-5)


def test_the_logit_hessian_against_its_matrices(found, dense):
    p = np.exp(np.asarray(dense[-1], np.float64)).reshape(found["tokens"], -1)
    blocks = np.eye(p.shape[1]) * p[:, None, :] - p[:, :, None] * p[:, None, :]
    tops = np.linalg.eigvalsh(blocks)[:, -1]
    summary = found["summary"]
    assert summary["logit_trace"] == pytest.approx(np.mean(1 - np.sum(p**2, 1)), rel=1e-5)
    assert summary["logit_lambda_max"] == pytest.approx(tops.mean(), rel=0.05)  # of 20 power iterations, from below
    assert summary["logit_lambda_max_worst"] == pytest.approx(tops.max(), rel=0.05)


@pytest.mark.exhaustive  # minutes; the products on eight devices: optim/test_spectra.py
def test_eight_devices_find_what_one_found(run, found, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "checkpoints", "metrics.jsonl"):
        (copy / name).symlink_to(run / name)
    with lm_runs.devices(8):
        assert measure.main(["curvature", f"--workdir={copy}", f"--towards={run}", *FLAGS, NOISE]) == 0
    assert "copy:4" in capsys.readouterr().out
    eight = json.loads((copy / "curvature" / "4.json").read_text())
    assert (eight["settings"]["devices"], found["settings"]["devices"]) == (8, 1)
    for key, value in found["summary"].items():
        if value is not None and "residual" not in key and "min" not in key:
            assert eight["summary"][key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


@pytest.mark.exhaustive  # the meter itself: optim/test_noise.py
def test_the_noise_scale_is_that_of_the_run_s_batches(run, found):
    made, noise, summary = saved.load(str(run), log=lambda line: None), found["noise"], found["summary"]
    rows = loader.held_out_rows(made.corpus, "val", 0, 3 * 8)
    rows.pop("bytes")
    gradients = []
    for k in range(3):
        part = {name: jnp.asarray(values[k::3]) for name, values in rows.items()}
        gradient = jax.device_get(plain_gradient(made.parts.objective, made.params, part)[1])
        gradients.append(np.asarray(ravel_pytree(gradient)[0], np.float64))
    tokens = np.array([(rows["weights"][k::3] > 0).sum() for k in range(3)])
    assert summary["batch_tokens"] == pytest.approx(tokens.mean())
    shares = tokens / tokens.sum()
    each, mean = shares @ np.sum(np.square(gradients), 1), np.sum((shares @ gradients) ** 2)
    assert noise["noise_square"] == pytest.approx((each - mean) / 2, rel=1e-3)
    assert noise["gradient_square"] == pytest.approx(mean - (each - mean) / 2, rel=1e-3)
    scale = noise["noise_square"] / noise["gradient_square"] * tokens.sum()
    assert summary["noise_scale"] == pytest.approx(scale, rel=1e-4)
    said = curvature.note(summary)
    assert "of the gradient noise scale" in said
    assert said.endswith("noise") == (summary["batch_tokens"] < scale)


def test_the_noise_scale_alone_is_that_of_the_whole_measurement(run, found, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert measure.main(["curvature", f"--workdir={tmp_path}/run", "--step=4", NOISE, "--noise_alone"]) == 0
    alone = json.loads((tmp_path / "run" / "curvature" / "4.json").read_text())
    assert set(alone["summary"]) < set(found["summary"])
    assert alone["noise"] == pytest.approx(found["noise"], rel=1e-5)
    assert alone["summary"]["noise_scale"] == pytest.approx(found["summary"]["noise_scale"], rel=1e-5)


@pytest.mark.exhaustive  # a measurement of its own
def test_within_measures_a_group(run, found):
    flags = [f"--workdir={run}", "--step=2", *FLAGS, "--noise_scale=0"]
    assert measure.main(["curvature", *flags, "--within=^layers/mlp", "--within=norm", "--slices=0"]) == 0
    group = json.loads((run / "curvature" / "2.json").read_text())
    assert group["spectra"]["hessian"]["dimension"] < found["spectra"]["hessian"]["dimension"]
    assert "slices" not in group
    stamp = (run / "curvature" / "2.json").stat().st_mtime_ns
    assert measure.main(["curvature", *flags, "--skip_done"]) == 0
    assert (run / "curvature" / "2.json").stat().st_mtime_ns == stamp


def test_a_folder_of_runs_stands_for_those_that_match_and_have_a_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "a")
    for name, seed in (("b", 7), ("c", 0)):  # before their first checkpoints
        (tmp_path / name).mkdir()
        config = json.loads((run / "config.json").read_text()) | {"seed": seed}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    flags = [f"--workdir={tmp_path}", f"--workdir={tmp_path}/c", "--step=4", "--skip_done", *FLAGS]
    assert measure.main(["curvature", *flags, "--only=optim.method=friendly_sam,seed=0"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"left out  {tmp_path / 'c'}") == 1
    assert str(tmp_path / "b") not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lanczos=1"], "--lanczos: 1: must be an integer >= 2"),
        (["--rho=nan"], "--rho: nan: must be a finite number > 0"),
        (["--densities=3", "--probes=2"], "--densities=3: must be at most --probes=2"),
        (["--step=first"], "--step=first: must be a number of steps, or all"),
        (["--step=3"], "must be one of its checkpoints, which are 2, 4"),
        (["--workdir=/nothing/*"], "/nothing/*: must be the directory of a sweep, or the workdir of a run"),
        (["--only=optim.method=sam"], "--only=optim.method=sam: no run matches"),
        (["--only=optim.methods=sam"], "--only=optim.methods: no such key"),
        (["--within=^nothing"], "--within=^nothing: pattern '^nothing' matches no parameter"),
    ],
)
def test_bad_input_is_one_line(run, capsys, flags, said):
    try:
        status = measure.main(["curvature", f"--workdir={run}", *flags])
    except SystemExit as stop:  # what the parser refuses
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_critical_step_is_where_the_loss_is_again_what_it_was(run, found):
    """Along the update that the run's own base would make with the batch's gradient."""
    summary, model = found["summary"], saved.load(str(run), 4, log=lambda line: None, optimizer=True)
    batch = loader.held_out_rows(model.corpus, "val", 0, 8)
    batch.pop("bytes")
    objective, base = model.parts.objective, model.parts.optimizer.base
    loss = jax.jit(lambda params: objective.readout(params, objective.trunk(params, batch), batch)[0])
    update = base.transform.update(jax.grad(loss)(model.params), model.optimizer, model.params)[0]
    rate = float(model.parts.optimizer.learning_rate(4))
    scale = summary["critical_learning_rate"] / rate
    at = [
        loss(jax.tree.map(lambda p, u, s=s: p + s * u, model.params, update)) for s in (0, scale, scale * 2 ** (1 / 16))
    ]
    assert at[1] <= at[0] * (1 + 1e-6)  # the order of sums in float32
    assert at[2] >= at[0] * (1 - 1e-6)
    assert summary["critical_sharpness"] == pytest.approx(2 / summary["critical_learning_rate"], rel=1e-5)


def test_curvature_on_the_way_to_another_run(run, measured):
    """To itself two steps later: what the loss does between the two checkpoints, measured from the first."""
    first, last = (measured[step]["summary"] for step in (2, 4))
    assert first["towards_rise"] == pytest.approx(last["loss"] - first["loss"], abs=1e-5)
    ends = [saved.load(str(run), step, log=lambda line: None).params for step in (2, 4)]
    assert first["towards_norm"] == pytest.approx(float(norm(jax.tree.map(jnp.subtract, *ends))), rel=1e-5)
    assert last["towards_norm"] == last["towards_rise"] == 0


def test_a_limit_in_minutes_measures_the_newest_and_names_the_rest(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "curvature")
    flags = ["curvature", f"--workdir={tmp_path}/run", "--step=all", *FLAGS, "--noise_scale=0"]
    assert measure.main([*flags, "--minutes=0.001"]) == 0
    said = capsys.readouterr().out
    assert "expected  2 checkpoints, about 0:" in said
    assert "left out  run step 2: no time within --minutes=0.001" in said
    assert [path.name for path in (tmp_path / "run" / "curvature").glob("?.json")] == ["4.json"]


def test_every_beginning_of_the_order_covers_the_training():
    targets = [
        measure.Target("", name, {}, step, None, pathlib.Path(), 1.0, 0) for name in "ab" for step in range(0, 90, 10)
    ]
    order = [(target.directory, target.step) for target in measure.spread(targets)]
    assert order[:6] == [("a", 80), ("b", 80), ("a", 0), ("b", 0), ("a", 40), ("b", 40)]
    assert sorted(order) == sorted((target.directory, target.step) for target in targets)
