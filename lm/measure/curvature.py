"""Measure curvature of trained models: spectra of H, GGN and NME, delta split, sharpness, slices.

steppe curvature --workdir=RUN_OR_SWEEP [--workdir=...] [--only=KEY=V,V] [--step=K|all] [--batches=N] [--probes=N] ...

Writes WORKDIR/curvature/STEP.json and plots next to it. Runs with equal shapes share one compilation. Every number is
measured on the first batches of the first held-out set, at theta, with the run's own loss.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from steppe.configs.keys import FLAG, PATTERN, TEXT, Accepted, count, number
from steppe.configs.read import UsageError
from steppe.lm import plot

NOISE_BATCHES = Accepted(int, lambda: "0, or an integer >= 2", lambda value: value == 0 or 2 <= value < 2**31)


class Settings(NamedTuple):
    """How much to measure."""

    batches: Annotated[int, "held-out batches, each of the run's batch size", count(1)] = 2
    probes: Annotated[int, "random vectors for traces", count(1)] = 4
    densities: Annotated[int, "probes that also run Lanczos", count(1)] = 2
    lanczos: Annotated[int, "matrix-vector products per Lanczos run", count(2)] = 20
    rho: Annotated[float, "radius for worst-case sharpness, l2", number(above=0)] = 0.05
    ascent: Annotated[int, "ascent steps after SAM's first", count()] = 5
    noise: Annotated[float, "norm of the noise for average sharpness, l2", number(above=0)] = 1.0
    draws: Annotated[int, "mirrored pairs of noise", count(1)] = 6
    slices: Annotated[int, "points along each axis of the slices; 0: none", count()] = 7
    within: Annotated[tuple[str, ...], "spectra only of parameters that match this regular expression", PATTERN] = ()
    noise_scale: Annotated[int, "held-out batches for the gradient noise scale; 0: none", NOISE_BATCHES] = 16
    noise_alone: Annotated[bool, "measure nothing but the gradient noise scale", FLAG] = False
    seed: Annotated[int, "seed of all random vectors", count()] = 0
    towards: Annotated[str, "also the curvature along the displacement to this run's model", TEXT] = ""


TITLES = {
    "loss": "loss", "lambda_max": "λmax", "ggn_lambda_max": "GGN λmax", "nme_lambda_max": "NME λmax", "trace": "trace",
    "nme_trace": "NME trace", "delta_func_share": "δ_func share", "sam_sharpness": "worst case",
    "functional_sharpness": "functional", "average_sharpness": "average", "critical_sharpness": "critical",
    "noise_scale": "noise scale",
}  # fmt: skip

DIGITS = 6  # of numbers in its file: spectra are long


def refused(settings: Settings) -> str:
    """What is wrong with the combination of settings; "" for nothing."""
    if settings.noise_alone and not settings.noise_scale:
        return "--noise_scale=0: must be >= 2 with --noise_alone"
    wrong = settings.densities > settings.probes
    return f"--densities={settings.densities}: must be at most --probes={settings.probes}" if wrong else ""


COMPILING = 60.0  # seconds on two cores, whatever the size of the model


def costs(config: Mapping[str, Any], settings: Settings, held_out: int) -> dict[str, float]:
    """{stage that measure_run announces: its cost, in gradients of one sequence} of a run with this flat config, whose
    first held-out set has so many sequences (0: unknown)."""
    from steppe.lm.measure import sharpness

    return {stage: cost * config["train.batch_size"] for stage, cost in sharpness.costs(settings).items()}


def measure_run(
    run: Any, settings: Settings, programs: dict, other: Callable[[str], Any], tick: Callable[[str], None]
) -> dict[str, Any]:
    """Measures a run at a checkpoint; returns "summary", {measure: number}, and details.

    run: lm.keep.saved.Saved. programs: cache of compiled programs by key, which this call extends. other(workdir): the
    parameters of another run of the same model. tick(stage): called when a stage begins.
    """
    import jax.numpy as jnp

    from steppe.data import loader
    from steppe.lm.measure import sharpness
    from steppe.lm.measure.evaluate import first_batch
    from steppe.lm.measure.in_training import named_groups
    from steppe.optim.ascent import preconditioner
    from steppe.optim.base import kind_of

    name, size = next(iter(run.corpus.held_out)), run.config.train.batch_size
    most = loader.held_out_steps(run.corpus, name, size)
    parts = min(settings.noise_scale, most)
    settings = settings._replace(batches=min(settings.batches, most), noise_scale=parts if parts > 1 else 0)

    placed = lambda count: first_batch(run.corpus, run.parts.mesh, count * size)  # noqa: E731
    batch, scale = placed(settings.batches), None
    if "second" in kind_of(run.parts.optimizer.base.name).moments:
        moments = run.parts.optimizer.base.moments(run.optimizer, run.params)
        scale = preconditioner(moments.second, moments.count == 0)
    sizes = settings.batches, settings.lanczos, settings.within, settings.noise_scale
    key = run.parts.shape, run.parts.options, run.parts.mesh, *sizes
    if key not in programs:
        try:
            programs[key] = sharpness.programs(run.parts, settings.batches, settings)
        except ValueError as error:
            raise UsageError(f"--within={','.join(settings.within)}: {error}") from None
    summary, details = sharpness.measure(
        programs[key],
        run.params,
        batch,
        named_groups(run.config.curvature.groups),
        settings,
        scale,
        next_step=_next_step(run) if run.are_last else None,
        towards=other(settings.towards) if settings.towards else None,
        noisy=placed(settings.noise_scale) if settings.noise_scale else None,
        tick=tick,
    )
    counted = {"held_out": name, "tokens": int(jnp.sum(batch["weights"] > 0)), "settings": settings._asdict()}
    return {"summary": summary, **counted, **details}


def _next_step(run):
    """(loss, gradient) -> (update, learning rate): the next step of the run's base optimizer."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.measure.in_training import next_step
    from steppe.lm.parts.state import State

    state = State(jnp.int32(run.step), run.params, run.optimizer, rule=(), averages={})
    taken = jax.jit(functools.partial(next_step, run.parts.optimizer))
    return lambda loss, gradient: jax.block_until_ready(taken(loss, gradient, state))


def note(summary: dict[str, float]) -> str:
    """A line comparing a run's batch with its gradient noise scale; "" if that was not measured."""
    if "noise_scale" not in summary:
        return ""
    tokens, scale = summary["batch_tokens"], summary["noise_scale"]
    said = f"a batch of {tokens:,.0f} tokens is {tokens / scale:.2g} of the gradient noise scale, {scale:,.0f} tokens"
    return f"{said}: its gradient is mostly {'noise' if tokens < scale else 'signal'}"


def draw(found: Mapping[str, Any]) -> dict[str, Any]:
    """{name: figure} of a result of measure_run."""
    drawn = {"spectra": _spectra, "slices": _slices}
    return {name: draw(found[name]) for name, draw in drawn.items() if name in found}


def draw_training(found: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]]) -> Any:
    """The figure of a run over training: results of its checkpoints, in order, and the run's own records."""
    import pandas as pd

    figure, (shares, norms, eigenvalues, sharpness) = _panels(7.5, 5.2, 2, 2, sharex=True)
    summaries = pd.DataFrame([f["summary"] for f in found], index=[f["step"] for f in found])
    own = pd.DataFrame([r.get("all", {}) for r in recorded], index=[r["step"] for r in recorded])

    # two lines, because the batches differ: the run's own records, and measurements of its checkpoints
    for dash, label, frame, keys in (
        ("-", "while training", own, ["logit_norm", "functional_norm"]),
        ("--", "checkpoints", summaries, ["delta_logit_norm", "delta_func_norm"]),
    ):
        if len(frame):
            logit, functional = (frame.reindex(columns=[key]).astype(float)[key] for key in keys)
            share = functional**2 / (logit**2 + functional**2).clip(lower=1e-300)
            shares.semilogy(share, dash, color=plot.GREEN, marker=".", label=label)
            norms.semilogy(logit, dash, color=plot.VERMILION, marker=".", label=f"δ_logit = GGN ε̂, {label}")
            norms.semilogy(functional, dash, color=plot.GREEN, marker=".", label=f"δ_func = NME ε̂, {label}")
    for axes, title in ((shares, "share of δ_func in ‖δ_logit‖² + ‖δ_func‖²"), (norms, "norms")):
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(fontsize=7)

    largest = {f"{key}_lambda_max".removeprefix("hessian_"): of for key, of in _MATRICES.items()}
    rises = {
        "sam_sharpness": ("worst case", plot.BLUE), "logit_sharpness": ("its logit part", plot.VERMILION),
        "functional_sharpness": ("its functional part", plot.GREEN), "average_sharpness": ("average case", plot.GREY),
    }  # fmt: skip
    for axes, title, measures in (
        (eigenvalues, "largest eigenvalue", largest),
        (sharpness, "rise of the loss, nats per token", rises),
    ):
        for key, values in summaries.reindex(columns=list(measures)).astype(float).items():
            label, colour = measures[key]
            axes.plot(values, color=colour, marker=".", label=label)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step")
        if found:
            axes.legend(fontsize=8)
    return figure


_MATRICES = {"hessian": ("H", plot.BLUE), "ggn": ("GGN", plot.VERMILION), "nme": ("NME", plot.GREEN)}


def _panels(width: float, height: float, rows: int, columns: int, **shared):
    """(figure, its axes in row order)."""
    figure = plot.figure(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def _spectra(spectra: Mapping[str, Any]) -> Any:
    figure, panels = _panels(9, 2.9, 1, 3, sharey=True)
    for axes, (key, (name, colour)) in zip(panels, _MATRICES.items(), strict=True):
        spectrum = spectra[key]
        axes.semilogy(spectrum["grid"], spectrum["density"], color=colour)
        axes.fill_between(spectrum["grid"], 1e-30, spectrum["density"], color=colour, alpha=0.2)
        said = f"λ {spectrum['lambda_min']:.3g} to {spectrum['lambda_max']:.4g}, trace {spectrum['trace']:.4g}"
        axes.set_title(f"{name}: {said}", loc="left", fontsize=9)
        axes.set_xlabel("eigenvalue")
    tallest = max(max(spectra[key]["density"]) for key in _MATRICES)
    # about the height of a single eigenvalue
    alone = min(1 / spectra["hessian"]["dimension"], 1e-3) * 0.01 * tallest
    panels[0].set_ylim(alone, 3 * tallest)
    panels[0].set_ylabel("density")
    return figure


def _slices(slices: Mapping[str, Any]) -> Any:
    import numpy as np

    figure, (lines, noise, plane) = _panels(9, 3, 1, 3)
    for axes, name, label, colour in (
        (lines, "gradient", "along ε̂", plot.BLUE),
        (lines, "nme", "NME's top eigenvector", plot.GREEN),
        (noise, "random", "a random direction", plot.GREY),
    ):
        axes.plot(slices[name]["at"], np.array(slices[name]["loss"], float), color=colour, marker=".", label=label)
        axes.set_xlabel("distance from θ")
        axes.legend(fontsize=8)
    lines.set_ylabel("loss, nats per token")
    losses = np.array(slices["plane"]["loss"], float)
    if np.isfinite(losses).all() and np.ptp(losses) > 0:
        drawn = plane.contourf(slices["plane"]["gradient"], slices["plane"]["nme"], losses, levels=12, cmap="viridis")
        figure.colorbar(drawn, ax=plane)
    plane.grid(False)
    plane.plot(0, 0, marker="+", color="white")
    plane.set_xlabel("along ε̂")
    plane.set_ylabel("along NME's top eigenvector", fontsize=8)
    return figure
