"""Small language-model-like problems for the tests of optim: nonlinear trunk, tied or untied readout, token weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from steppe import optim
from steppe.optim import methods
from steppe.optim.outside.toy import LAYERS, B, D, T, V, batch, language_model, parameters, token_loss, tokens_of, trunk
from steppe.optim.rule import Objective

__all__ = ["LAYERS", "B", "D", "T", "V", "batch", "language_model", "parameters", "token_loss", "tokens_of", "trunk"]


def split_language_model():
    """The same problem split at the hidden state, as a large-vocabulary model splits it."""

    def readout(params, hidden, batch):
        return token_loss(hidden @ params["readout"], batch)

    def frozen_readout(params, hidden, anchor, batch):
        at_anchor = jax.lax.stop_gradient(anchor.hidden @ anchor.params["readout"])
        derivative = jax.lax.stop_gradient(jax.grad(lambda logits: token_loss(logits, batch)[0])(at_anchor))
        return jnp.sum(derivative * (hidden @ params["readout"] - at_anchor))

    return Objective(trunk, readout, frozen_readout, tokens_of)


def loss_of(params, batch):
    """The loss as one plain function, for oracles."""
    return token_loss(trunk(params, batch) @ params["readout"], batch)[0]


def needs(name):
    """What a method needs beyond its defaults on this problem."""
    if name == "focal_sam":
        return {"frequency": jnp.arange(1, V + 1) / (V * (V + 1) / 2)}
    return {"k": 2} if name in ("k_sam", "look_sam") else {}


def telling(*kinds):
    """The methods that bring a part of these kinds ("ascent", "first", "second", "period") that none before them has.

    The others are made of these methods' parts: where the way that a test looks at goes through these kinds alone, a
    test of all methods leaves the others to the night.
    """
    seen = set()
    for name, row in methods.METHODS.items():
        parts = {(kind, getattr(row, kind, None)) for kind in kinds}
        if parts - seen:
            yield name
        seen |= parts


class Problem:
    """One problem as functions of a flat vector, and its dense matrices at theta."""

    def __init__(self):
        self.params, self.batch = parameters(jnp.float64), batch()
        self.objective = language_model()
        self.flat, self.tree = ravel_pytree(self.params)
        self.theta = np.asarray(self.flat)
        loss = lambda x, b: loss_of(self.tree(x), b)  # noqa: E731
        self._loss, self._gradient = jax.jit(loss), jax.jit(jax.grad(loss))

    def loss(self, x, batch=None):
        return float(self._loss(jnp.asarray(x), batch or self.batch))

    def gradient(self, x, batch=None):
        return np.asarray(self._gradient(jnp.asarray(x), batch or self.batch))

    def matrices(self):
        """Dense Hessian, GGN and NME at theta, the NME from second derivatives of the logits."""
        logits = lambda x: self.objective.trunk(self.tree(x), self.batch)  # noqa: E731
        loss = lambda out: token_loss(out, self.batch)[0]  # noqa: E731

        def dense(x):
            at = logits(x)
            slope = jax.grad(loss)(at)
            jacobian = jax.jacfwd(logits)(x).reshape(at.size, -1)
            outer = jax.hessian(loss)(at).reshape(at.size, at.size)
            nme = jax.hessian(lambda y: jnp.sum(slope * logits(y)))(x)
            return jax.hessian(lambda y: loss(logits(y)))(x), jacobian.T @ outer @ jacobian, nme

        return tuple(map(np.asarray, jax.jit(dense)(self.flat)))

    def run(self, name, steps=1, theta=None, transform=None, batches=None, objective=None, **options):
        """Flat gradients of successive steps and the flat parameters after them; transform None leaves theta."""
        rule = optim.method(name, **{**needs(name), **options})
        transform = transform or optax.set_to_zero()
        params = self.params if theta is None else self.tree(jnp.asarray(theta))
        state, inner_state, gradients = rule.init(params), transform.init(params), []
        gradient = jax.jit(rule.gradient, static_argnums=0)
        for step in range(steps):
            batch = batches[step] if batches else self.batch
            g, state, self.report = gradient(objective or self.objective, params, batch, inner_state, state, step)
            updates, inner_state = transform.update(g, inner_state, params)
            params = optax.apply_updates(params, updates)
            gradients.append(np.asarray(ravel_pytree(g)[0]))
        return gradients, np.asarray(ravel_pytree(params)[0])


def unit(x):
    return x / np.linalg.norm(x)


def close(got, wanted, tolerance=1e-11):
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)
