"""What a method looks at before it perturbs: which gradients, of which tokens, and what the second pass reuses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.optim.rule import Anchor, Objective, Tree, backward, clean_pass

# look(objective, params, batch) -> (Looked, Kept)
Look = Callable[[Objective, Tree, Tree], tuple["Looked", "Kept"]]


class Looked(NamedTuple):
    """Summed over microbatches: loss at theta; clean, its gradient; ascent, the gradient climbed. None where absent."""

    loss: Any
    clean: Tree
    ascent: Tree


class Kept(NamedTuple):
    """Kept for the second pass over the same microbatch: its rows, the anchor, the loss, and the trunk's pullback."""

    batch: Tree
    anchor: Anchor | None
    loss: Any
    pull: Callable | None = None


def whole(objective: Objective, params: Tree, batch: Tree) -> tuple[Looked, Kept]:
    """Gradient of the whole batch at theta: one forward, one backward."""
    clean = clean_pass(objective, params, batch)
    return Looked(clean.loss, clean.gradient, clean.gradient), Kept(batch, clean.anchor, clean.loss, clean.pull)


def forward_only(anchored: bool) -> Look:
    """No gradient at theta, for directions that need none; one forward if the path is anchored there, else nothing."""

    def look(objective, params, batch):
        if not anchored:
            return Looked(None, None, None), Kept(batch, None, jnp.nan)
        hidden = objective.trunk(params, batch)
        loss, aux = objective.readout(params, hidden, batch)
        return Looked(loss, None, None), Kept(batch, Anchor(params, hidden, aux.get("kept")), loss)

    return look


def subset(fraction: float, anchored: bool) -> Look:
    """The ascent gradient from the first `fraction` of the sequences; the descent still sees all of them."""

    def look(objective, params, batch):
        size = len(jax.tree.leaves(batch)[0])
        rows = max(1, round(fraction * size))
        # Every (size // rows)-th row, so that each device's rows take part.
        clean = clean_pass(objective, params, jax.tree.map(lambda x: x[:: size // rows][:rows], batch))
        seen, kept = forward_only(anchored)(objective, params, batch)
        return Looked(seen.loss if anchored else clean.loss, clean.gradient, clean.gradient), kept

    return look


def hardest(k: int, shards: int = 1) -> Look:
    """The k sequences of highest loss in each of `shards` equal blocks of rows (K-SAM, Ni et al. 2022).

    Needs aux["per_sequence_loss"] [B] from the readout; the reported loss is that of the chosen ones.
    """

    def look(objective, params, batch):
        _, aux = objective.readout(params, objective.trunk(params, batch), batch)
        if "per_sequence_loss" not in aux:
            raise ValueError(f'k_sam needs aux["per_sequence_loss"] [B] from the loss, whose aux has {sorted(aux)}')
        size = len(aux["per_sequence_loss"])
        if size % shards or k > size // shards:
            raise ValueError(f"optim.k = {k}: must be at most the sequences of a shard; there are {size} in {shards}")
        losses = aux["per_sequence_loss"].reshape(shards, -1)
        chosen = jax.lax.top_k(losses, k)[1]

        def rows(x):
            blocks = x.reshape(shards, -1, *x.shape[1:])
            picked = jnp.take_along_axis(blocks, chosen.reshape(shards, k, *(1,) * (x.ndim - 1)), axis=1)
            return picked.reshape(shards * k, *x.shape[1:])

        return whole(objective, params, jax.tree.map(rows, batch))

    return look


def focal(frequency: jax.Array, lam: float = 0.5, gamma: float = 1.0) -> Look:
    """Rare tokens weigh more in the ascent: c_y = lam (1 - frequency_y)^gamma (Focal-SAM, Li et al. 2025).

    clean is the gradient of the loss, ascent that of the loss with each token weighted by c; the second pass sees those
    weights. Needs batch["targets"], batch["weights"], and a loss that multiplies by weights but divides by the number
    of tokens of positive weight, so that both share one normaliser. frequency: [V], summing to 1.
    """

    def look(objective, params, batch):
        share = lam * (1 - frequency) ** gamma
        focused = {**batch, "weights": batch["weights"] * share[batch["targets"]]}
        hidden, pull = jax.vjp(lambda p: objective.trunk(p, batch), params)
        (loss, _), clean = backward(objective.readout, pull, params, hidden, batch, has_aux=True)
        (focused_loss, aux), ascent = backward(objective.readout, pull, params, hidden, focused, has_aux=True)
        anchor = Anchor(params, hidden, aux.get("kept"))
        # The second pass sees the focused loss only: what it lacks of the loss is kept, to report the whole.
        return Looked(loss, clean, ascent), Kept(focused, anchor, loss - focused_loss, pull)

    return look
