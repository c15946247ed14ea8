"""Curvature of a language model: its logit Hessian, and the cheap measurement that a run makes during training."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from ml_collections import ConfigDict

from steppe.data import loader
from steppe.lm.measure.evaluate import first_batch
from steppe.lm.model import parameters
from steppe.lm.model.attention import differentiable
from steppe.lm.model.mesh import Placement
from steppe.lm.model.objective import objective, readout_kernel
from steppe.lm.model.ordered import ordered
from steppe.lm.model.readout import token_loss
from steppe.lm.parts.assembly import Parts, abstract_batch
from steppe.lm.parts.memo import once
from steppe.lm.parts.progress import Event, Progress, each
from steppe.lm.parts.state import Optimizer, State
from steppe.lm.track.tracker import Tracker
from steppe.optim import Objective
from steppe.optim.base import at_step
from steppe.optim.curvature.along import along, critical, critical_step
from steppe.optim.curvature.products import split_directions
from steppe.optim.rule import Tree, accumulate, microbatched, norm, plain_gradient, ratio

LAYERS = parameters.STACKED  # each layer counts alone, as "layers/mlp/up/kernel/0", so that groups can select layers


def twice_differentiable(parts: Parts) -> Objective:
    """The objective of a run with an attention kernel that has second derivatives (cuDNN and splash have none)."""
    if parts.shape.kernel not in ("cudnn", "splash"):
        return parts.objective
    kernel = differentiable(parts.shape.sequence_length)
    return objective(parts.shape._replace(kernel=kernel), parts.options, parts.options.place)


def make_measurement(parts: Parts, groups: Sequence[str], microbatches: int = 1) -> Any:
    """measure(params, state, origin, batch, scalars) -> the curvature that a run records, at params (None: state's).

    {group: {logit_norm, functional_norm, logit_share, functional_share, cosine}}: delta_logit = GGN u and delta_func =
    NME u for u = g / |g|, the unit ascent direction of SAM on this batch. groups: "name=regex"; "all" is always added.
    critical_sharpness, critical_learning_rate, critical_forwards: along the step that the base optimizer would take on
    this batch from state (optim.curvature.along). displacement: the same module's measures along the displacement from
    origin, the run's initial parameters, to params, with the curvature at origin; absent if origin is None. scalars:
    Parts.scalars of the run. Costs about five gradients and ten forwards; a displacement costs seven gradients more.
    """
    named, objective = named_groups(groups), twice_differentiable(parts)

    def measure(params, state, origin, batch, scalars):
        loss, gradient = last = plain_gradient(objective, state.params, batch, microbatches)
        update, rate = next_step(parts.optimizer_at(**scalars), loss, gradient, state)
        found = critical(rate, critical_step(objective, state.params, batch, update, microbatches))
        at = objective.after(state.params if params is None else params, found["critical_forwards"])
        _, gradient = last if params is None else plain_gradient(objective, at, batch, microbatches)
        direction = optax.tree.scale(ratio(1.0, norm(gradient), 0.0), gradient)
        found |= split_directions(objective, at, batch, direction, named, stacked=LAYERS, microbatches=microbatches)
        if origin is not None:
            begin = objective.after(origin, found["all"]["functional_norm"])
            found["displacement"] = along(objective, begin, batch, jax.tree.map(jnp.subtract, at, origin), microbatches)
        return found

    return jax.jit(measure)


class Curvature:
    """Measures curvature at theta during a run, always on the same held-out batch.

    judged: State -> the parameters it is judged by, None for its own; origin: those it started from, None if unknown.
    """

    def __init__(
        self,
        config: ConfigDict,
        corpus: loader.Corpus,
        parts: Parts,
        tracker: Tracker,
        *,
        judged: Callable[[State], Any] | None,
        origin: Any,
    ):
        self._tracker, self._judged, self._origin, self._scalars = tracker, judged, origin, parts.scalars
        size = config.train.batch_size
        self._batch = lambda: first_batch(corpus, parts.mesh, size)
        self.events = [Event(each(config.curvature.every), self.measure)]

        def compiled():
            made = make_measurement(parts, config.curvature.groups, config.train.microbatches)
            params, began = (None if tree is None else parts.abstract.params for tree in (judged, origin))
            lowered = made.lower(params, parts.abstract, began, abstract_batch(parts, corpus, size), parts.scalars)
            return ordered(lowered.compile(), parts.mesh, "curvature of the run")

        self._measure = once("curvature", (parts.key, origin is None), compiled)
        self._began, self._spent = time.monotonic(), []

    def measure(self, at: Progress) -> None:
        """Records a measurement."""
        jax.block_until_ready(at.state)  # so that pending steps do not count in the measurement's time
        since = time.monotonic()
        with self._tracker.goodput.spending("curvature"):
            params = None if self._judged is None else self._judged(at.state)
            found = self._measure(params, at.state, self._origin, self._batch(), self._scalars)
            found = jax.tree.map(float, jax.device_get(found))
        self._spent.append(time.monotonic() - since)
        self._tracker.measurement("curvature", at.done, {**found, "seconds": self._spent[-1]})

    def conclude(self) -> None:
        """Prints how long the measurements took."""
        if self._spent:
            spent = sum(self._spent)
            share = spent / (time.monotonic() - self._began)
            self._tracker.note(f"curvature   {len(self._spent)} times, {spent:.1f} s, {share:.1%} of this start's time")


def next_step(optimizer: Optimizer, loss: jax.Array, gradient: Tree, state: State) -> tuple[Tree, jax.Array]:
    """(update, learning rate) of the base optimizer for a loss and its gradient at this state."""
    counted = at_step(state.optimizer, state.step)
    update, _ = optimizer.base.transform.update(gradient, counted, state.params, value=loss)
    return update, optimizer.learning_rate(state.step)


def named_groups(groups: Sequence[str]) -> dict[str, str]:
    """{name: regex} of config.curvature.groups."""
    return dict(group.split("=", 1) for group in groups)


def logit_hessian(
    parts: Parts, params, batch: dict, key: jax.Array, microbatches: int = 1, iterations: int = 20
) -> dict[str, jax.Array]:
    """The Hessian of a token's loss by its logits [V]: trace and largest eigenvalue.

    trace, lambda_max: means over tokens; lambda_max_worst: of the worst token. The whole logit Hessian is block
    diagonal over tokens, each block divided by their number. The trace is 1 - |p|^2 for plain or smoothed
    cross-entropy; with a soft cap or z-loss it is estimated with a vector of random signs per token. lambda_max uses
    `iterations` power iterations.
    """
    options = parts.options._replace(place=Placement())

    def one(state, part):
        hidden_BxTxD = parts.objective.trunk(params, part)
        kernel_VxD = readout_kernel(params, parts.shape).astype(hidden_BxTxD.dtype)

        def chunk(start):
            take = lambda x: lax.dynamic_slice_in_dim(x, start, options.chunk, axis=1)  # noqa: E731
            wide = jnp.promote_types(jnp.float32, hidden_BxTxD.dtype)
            raw = jnp.einsum("bcd,vd->bcv", take(hidden_BxTxD), kernel_VxD, preferred_element_type=wide)

            def product(vector):
                slope = lambda logits: token_loss(options, logits, take(part["targets"]))[1]  # noqa: E731
                return jax.jvp(slope, (raw,), (vector,))[1]

            def again(_, vector):
                further = product(vector)
                length = jnp.linalg.norm(further, axis=-1, keepdims=True)
                return further / jnp.where(length > 0, length, 1)

            drawn = jax.random.rademacher(jax.random.fold_in(key, start), raw.shape, raw.dtype)
            if options.soft_cap or options.z_loss:
                trace = jnp.sum(drawn * product(drawn), axis=-1)
            else:
                real = jnp.arange(raw.shape[-1]) < options.vocabulary
                trace = 1 - jnp.sum(jax.nn.softmax(jnp.where(real, raw, -jnp.inf)) ** 2, axis=-1)
            top = lax.fori_loop(0, iterations, again, drawn)
            return trace, jnp.sum(top * product(top), axis=-1)

        starts = jnp.arange(0, hidden_BxTxD.shape[1], options.chunk)
        trace, top = (x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in lax.map(chunk, starts))  # [B, T]
        counted = part["weights"] > 0
        tokens = jnp.maximum(jnp.sum(counted), 1)
        means = [jnp.sum(jnp.where(counted, x, 0)) / tokens for x in (trace, top)]
        return state, means, jnp.max(jnp.where(counted, top, -jnp.inf))

    _, (trace, top), worst = accumulate(one, (), *microbatched(parts.objective, batch, microbatches))
    return {"trace": trace, "lambda_max": top, "lambda_max_worst": jnp.max(worst)}
