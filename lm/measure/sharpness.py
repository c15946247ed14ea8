"""The measurements of steppe curvature on one checkpoint and one batch: compiled programs and their results.

Programs depend only on shapes, so runs with equal shapes share them. `settings` are those of lm.measure.curvature.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.lm.measure.in_training import LAYERS, logit_hessian, twice_differentiable
from steppe.lm.model.mesh import AXES
from steppe.lm.model.ordered import jitted
from steppe.lm.parts.assembly import Parts
from steppe.optim.curvature import landscape, products, spectra
from steppe.optim.curvature.along import along, critical, critical_step
from steppe.optim.curvature.noise import noise_scale
from steppe.optim.masks import mask
from steppe.optim.rule import Tree, norm, ratio

OPERATORS = ("hessian", "ggn", "nme")  # and "preconditioned", the preconditioned Hessian


def programs(parts: Parts, microbatches: int, settings: Any) -> SimpleNamespace:
    """Compiled functions of (params, batch, ...) of a run, and conversions between parameters and flat vectors.

    lanczos and start are restricted to parameters of `within`. ValueError if one of its regexes matches none.
    """
    target = twice_differentiable(parts)
    split = NamedSharding(parts.mesh, P(AXES))
    view = spectra.flat(
        parts.abstract.params, parts.mesh.size, lambda vector: jax.lax.with_sharding_constraint(vector, split)
    )
    keep = mask(parts.abstract.params, settings.within) if settings.within else None

    def operator(name, params, batch, scale=None):
        product = partial(products.PRODUCTS[name], target, params, batch, microbatches=microbatches)
        product = product if scale is None else products.preconditioned(product, scale)
        return product if keep is None else products.restricted(product, keep)

    def lanczos(name, params, batch, start, scale=None):
        return spectra.lanczos(operator(name, params, batch, scale), view, start, settings.lanczos)

    def action(name, params, batch, vector):
        product = products.PRODUCTS[name]
        return view.flatten(product(target, params, batch, view.unflatten(vector), microbatches))

    def gaussian(key):
        leaves, structure = jax.tree.flatten(parts.abstract.params)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        drawn = jax.tree.unflatten(structure, drawn)
        return optax.tree.scale(1 / norm(drawn), drawn)

    places = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract.params)
    compiled = partial(jitted, mesh=parts.mesh, name="curvature")
    of_batch = (landscape.ascend, landscape.rise, landscape.loss_at, along)
    return SimpleNamespace(
        flatten=compiled(view.flatten),
        unflatten=compiled(view.unflatten, out_shardings=places),
        lanczos={name: compiled(partial(lanczos, name)) for name in OPERATORS},
        action={name: compiled(partial(action, name)) for name in ("ggn", "nme")},
        **{each.__name__: compiled(partial(each, target, microbatches=microbatches)) for each in of_batch},
        logits=compiled(lambda params, batch, key: logit_hessian(parts, params, batch, key, microbatches)),
        critical=compiled(partial(critical_step, target, microbatches=microbatches)),
        start=compiled(lambda key: spectra.signs(view, key, keep)),
        gaussian=compiled(gaussian, out_shardings=places),
        noise=compiled(partial(noise_scale, target, parts=settings.noise_scale)),
    )


def measure(
    made: SimpleNamespace, params: Tree, batch: dict, groups: dict[str, str], settings: Any, scale: Tree | None = None,
    next_step: Callable[[jax.Array, Tree], tuple[Tree, float]] | None = None, towards: Tree | None = None,
    noisy: dict | None = None, tick: Callable[[str], None] = lambda stage: None,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """(summary: {name: number}, details) of one checkpoint on one batch; all numbers are Python floats.

    scale: the preconditioner D from the base's second moment; None omits preconditioned measures. next_step: (loss,
    gradient) -> (update, learning rate) of the run's base, for its critical sharpness. towards: other parameters, for
    the curvature along the displacement to them. noisy: settings.noise_scale batches of the run, joined, in random
    order. tick(stage): called before each stage, in the order of costs(settings).
    """
    key = jax.random.key(settings.seed)
    summary, details = {}, {}

    def of_noise() -> None:
        assert noisy is not None
        tick("noise scale")
        found = details["noise"] = {name: float(value) for name, value in made.noise(params, noisy).items()}
        tokens = int(jnp.sum(noisy["weights"] > 0))
        summary["batch_tokens"] = tokens / settings.noise_scale
        summary.update(_delta("expected_", found["expected_logit_norm"], found["expected_functional_norm"]))
        if np.isfinite(found["scale"]):
            summary["noise_scale"] = found["scale"] * tokens

    if settings.noise_alone:
        of_noise()
        return summary, details
    tick("gradient")
    zero = jax.tree.map(jnp.zeros_like, params)
    loss, gradient, step = made.ascend(params, batch, zero, settings.rho)
    summary |= {"loss": float(loss), "gradient_norm": float(_norm(gradient)), "parameter_norm": float(_norm(params))}
    logits = made.logits(params, batch, jax.random.fold_in(key, 2))
    summary |= {f"logit_{name}": float(value) for name, value in logits.items()}
    if next_step is not None:
        update, rate = next_step(loss, gradient)
        found = critical(rate, made.critical(params, batch, update))
        summary |= {name: float(value) for name, value in found.items() if np.isfinite(value)}
    if towards is not None:
        way = jax.tree.map(jnp.subtract, towards, params)
        summary |= {f"towards_{name}": float(value) for name, value in made.along(params, batch, way).items()}

    found, tops = _spectra(made, params, batch, settings, scale, jax.random.fold_in(key, 0), tick)
    details["spectra"] = found
    for name, prefix in {"hessian": "", "ggn": "ggn_", "nme": "nme_", "preconditioned": "precond_"}.items():
        if name in found:
            wanted = ("lambda_max", "lambda_max_residual", "lambda_min", "lambda_min_residual", "trace", "trace_error")
            summary |= {prefix + kind: found[name][kind] for kind in wanted}

    tick("delta split")
    directions = {"": gradient}
    if scale is not None:
        directions["precond_"] = jax.tree.map(jnp.divide, gradient, scale)
    for prefix, direction in directions.items():
        split = _split(made, params, batch, direction, groups)
        details[f"{prefix}delta"] = split
        summary |= _delta(prefix, split["all"]["logit_norm"], split["all"]["functional_norm"])
        summary[f"{prefix}delta_cosine"] = split["all"]["cosine"]

    tick("sharpness")
    worst, losses = step, [float(loss)]
    for _ in range(settings.ascent + 1):
        here, _, further = made.ascend(params, batch, step, settings.rho)
        worst = step if float(here) > max(losses[1:], default=-np.inf) else worst
        losses.append(float(here))
        step = further
    parts = {name: float(value) for name, value in made.rise(params, batch, gradient, worst).items()}
    rises = []
    for i in range(settings.draws):  # mirrored pairs cancel the first order
        noise = made.gaussian(jax.random.fold_in(jax.random.fold_in(key, 1), i))
        pair = [_loss(made, params, batch, noise, noise, x) for x in (settings.noise, -settings.noise)]
        rises.append(sum(pair) / 2 - float(loss))
    average = spectra.estimate(rises)
    summary["sam_sharpness"] = parts["rise"]
    summary |= {f"{name}_sharpness": parts[name] for name in ("first_order", "functional", "logit")}
    summary |= {"average_sharpness": average.mean, "average_sharpness_error": average.error}
    details["ascent_losses"] = losses

    if noisy is not None:
        of_noise()

    if settings.slices:
        tick("slices")
        unit = jax.block_until_ready(_unit(gradient))
        random = made.gaussian(jax.random.fold_in(key, 3))
        details["slices"] = _slices(made, params, batch, unit, random, made.unflatten(tops["nme"]), settings)
    return summary, details


def _delta(prefix: str, logit: float, functional: float) -> dict[str, float]:
    """The norms of the two parts of delta, and the share of the second."""
    share = functional**2 / max(logit**2 + functional**2, 1e-300)
    norms = {"delta_logit_norm": logit, "delta_func_norm": functional, "delta_func_share": share}
    return {prefix + name: value for name, value in norms.items()}


PRODUCTS = {"hessian": 2.5, "ggn": 2.0, "nme": 3.0, "preconditioned": 3.5}  # cost of a product, in gradients


def costs(settings: Any) -> dict[str, float]:
    """{stage of `measure`: its cost in gradients of a batch of the run}, in order."""
    size, split = settings.batches, PRODUCTS["ggn"] + PRODUCTS["nme"]
    runs = {f"{name} {i + 1}": size * settings.lanczos * cost for name, cost in PRODUCTS.items()
            for i in range(_runs(name, settings))}  # fmt: skip
    noise, points = settings.noise_scale, 3 * settings.slices + settings.slices**2
    if settings.noise_alone:
        return {"noise scale": noise * (1 + split)}
    return {
        "gradient": 2.0 * size,
        **runs,
        "traces": size * 2 * split * (settings.probes - settings.densities),
        "delta split": size * 2 * split,
        "sharpness": size * (settings.ascent + 3 + settings.draws * 2 / 3),
        **({"noise scale": noise * (1 + split)} if noise else {}),
        **({"slices": size * points / 3} if settings.slices else {}),
    }


def _runs(name: str, settings: Any) -> int:
    return 1 if name == "preconditioned" else settings.densities


def _spectra(made, params, batch, settings, scale, key, tick):
    """({operator: eigenvalues, trace, density ...}, {operator: its top eigenvector, flat})."""
    starts = [made.start(jax.random.fold_in(key, i)) for i in range(settings.probes)]
    chosen = jnp.abs(starts[0])  # 1 for parameters of `within`, 0 for others and for padding

    def act(name, vector):
        if name in made.action:
            return chosen * made.action[name](params, batch, vector)
        if name == "hessian":
            return act("ggn", vector) + act("nme", vector)
        half = jnp.where(chosen > 0, 1 / jnp.sqrt(made.flatten(scale)), 0)
        return half * act("hessian", half * vector)

    found, tops = {}, {}
    for name in (*OPERATORS, *(["preconditioned"] if scale is not None else [])):
        probes, samples, best = [], [], {}
        for i, start in enumerate(starts[: _runs(name, settings)]):
            tick(f"{name} {i + 1}")
            program = made.lanczos["hessian" if name == "preconditioned" else name]
            krylov = program(params, batch, start, *([scale] if name == "preconditioned" else []))
            ritz = spectra.ritz(krylov)
            probes.append(ritz)
            samples.append(float(krylov.diagonal[0] * krylov.square))
            for side, index, sign in (("min", 0, -1), ("max", -1, 1)):
                value = sign * ritz.values[index]
                if side not in best or value > best[side][0]:
                    best[side] = value, spectra.ritz_vector(krylov, ritz, index)
            del krylov
        values = {}
        for side, (_, vector) in best.items():
            values[f"lambda_{side}"], values[f"lambda_{side}_residual"] = spectra.residual(vector, act(name, vector))
        grid, height = spectra.density(probes, points=401)
        found[name] = {
            **values,
            "samples": samples,
            "dimension": int(jnp.sum(chosen)),
            "ritz_values": [probe.values.tolist() for probe in probes],
            "ritz_weights": [probe.weights.tolist() for probe in probes],
            "grid": grid.tolist(),
            "density": height.tolist(),
        }
        tops[name] = best["max"][1]
    tick("traces")
    forms = {
        name: [float(jnp.vdot(start, act(name, start))) for start in starts[_runs(name, settings) :]]
        for name in found
        if name != "hessian"
    }
    # Hutchinson estimates of H need no Hessian product, because v^T H v is the sum over its two parts.
    forms["hessian"] = [a + b for a, b in zip(forms["ggn"], forms["nme"], strict=True)]
    for name, values in found.items():
        values["samples"] += forms[name]
        values["trace"], values["trace_error"] = spectra.estimate(values["samples"])
    return found, tops


def _split(made, params, batch, direction, groups) -> dict[str, dict[str, float]]:
    unit = made.flatten(_unit(direction))
    logit, functional = (made.unflatten(made.action[name](params, batch, unit)) for name in ("ggn", "nme"))
    return jax.tree.map(float, jax.device_get(_compare(logit, functional, tuple(groups.items()))))


@partial(jax.jit, static_argnums=2)
def _compare(logit, functional, groups):
    return products.compare(logit, functional, dict(groups), stacked=LAYERS)


def _loss(made, params, batch, first, second, x, y=0.0) -> float:
    return float(made.loss_at(params, batch, (first, second), jnp.asarray([x, y], jnp.float32)))


# Compiled and awaited, because two concurrent sums over devices can block the threads of a CPU mesh.
_norm = jax.jit(norm)


@jax.jit
def _unit(vector):
    return optax.tree.scale(ratio(1.0, norm(vector), 0.0), vector)


@jax.jit
def _across(vector, unit):
    """(unit vector of the component of a vector orthogonal to `unit`, their inner product)."""
    overlap = optax.tree.vdot(unit, vector)
    return _unit(jax.tree.map(lambda v, u: v - overlap * u, vector, unit)), overlap


def _slices(made, params, batch, gradient, random, nme, settings) -> dict[str, Any]:
    """Losses along the gradient, NME's top vector and a random direction, and over the plane of the first two.

    Radii: four rho, `noise` along the random direction. The plane's second axis is orthogonalised against the first.
    """
    along = np.linspace(-1, 1, settings.slices)
    reach = 4 * settings.rho
    across, overlap = jax.block_until_ready(_across(nme, gradient))
    plane = [[_loss(made, params, batch, gradient, across, x, y) for x in reach * along] for y in reach * along]

    found: dict[str, Any] = {}
    lines = {"gradient": (gradient, reach), "nme": (nme, reach), "random": (random, settings.noise)}
    for name, (direction, radius) in lines.items():
        losses = [_loss(made, params, batch, direction, across, x) for x in radius * along]
        found[name] = {"at": (radius * along).tolist(), "loss": losses}
    at = (reach * along).tolist()
    return found | {"plane": {"gradient": at, "nme": at, "loss": plane}, "nme_overlap": float(overlap)}
