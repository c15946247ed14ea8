"""First passes: the gradients of a method at theta, their sequences, and the results that the second pass reuses."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.optim.options import AT_LEAST_ONE, FINITE, NOT_NEGATIVE, Option
from steppe.optim.rule import Anchor, Objective, OptionError, Tree, backward, by_rows, clean_pass, row_count


class Gradients(NamedTuple):
    """Loss at theta; clean: its gradient; ascent: the gradient to climb. Summed over microbatches; None if absent."""

    loss: Any
    clean: Tree
    ascent: Tree


class Residuals(NamedTuple):
    """Inputs of the second pass over the same microbatch: its rows, the anchor, the loss, and the trunk's pullback.

    aux: the readout's `returned` for all rows at theta; None if not computed or absent.
    """

    batch: Tree
    anchor: Anchor | None
    loss: Any
    pull: Callable | None = None
    aux: Tree = None


# (objective, params, (micro)batch) -> (the gradients at theta, the residuals for the second pass over the same rows)
FirstPass = Callable[[Objective, Tree, Tree], tuple[Gradients, Residuals]]


def whole(objective: Objective, params: Tree, batch: Tree) -> tuple[Gradients, Residuals]:
    """Gradient of the whole batch at theta: one forward, one backward."""
    clean = clean_pass(objective, params, batch)
    residuals = Residuals(batch, clean.anchor, clean.loss, clean.pull, clean.aux.get("returned"))
    return Gradients(clean.loss, clean.gradient, clean.gradient), residuals


def forward_only(anchored: bool) -> FirstPass:
    """For directions without a gradient: one forward at theta if the path is anchored there, else nothing."""

    def first(objective, params, batch):
        if not anchored:
            return Gradients(None, None, None), Residuals(batch, None, jnp.nan)
        hidden = objective.trunk(params, batch)
        loss, aux = objective.readout(params, hidden, batch)
        anchor = Anchor(params, hidden, aux.get("kept"))
        return Gradients(loss, None, None), Residuals(batch, anchor, loss, aux=aux.get("returned"))

    return first


def subset_rows(fraction: float, sequences: int, shards: int) -> int:
    """Number of sequences in a `fraction` of a batch: equally many from each data shard, at least one."""
    return max(1, round(fraction * sequences / shards)) * shards


def subset(fraction: float, anchored: bool, shards: int = 1) -> FirstPass:
    """Takes the ascent gradient of an evenly spread `fraction` of the sequences; the descent uses all of them."""

    def first(objective, params, batch):
        size = row_count(batch)
        each, taken = size // shards, subset_rows(fraction, size, shards) // shards
        spread = np.arange(taken) * each // taken

        def rows(x):
            return x.reshape(shards, each, *x.shape[1:])[:, spread].reshape(shards * taken, *x.shape[1:])

        clean = clean_pass(objective, params, by_rows(batch, rows))
        whole, residuals = forward_only(anchored)(objective, params, batch)
        return Gradients(whole.loss if anchored else clean.loss, clean.gradient, clean.gradient), residuals

    return first


def hardest(
    shards: int = 1, k: Annotated[int, Option("sequences from each data shard", *AT_LEAST_ONE)] = 4
) -> FirstPass:
    """The k sequences of highest loss in each of `shards` equal blocks of rows (K-SAM, Ni et al. 2022).

    Needs aux["per_sequence_loss"] [B] from the readout. Reports the loss of the chosen sequences.
    """

    def first(objective, params, batch):
        _, aux = objective.readout(params, objective.trunk(params, batch), batch)
        if "per_sequence_loss" not in aux:
            raise ValueError(f'k_sam needs aux["per_sequence_loss"] [B] from the loss; its aux has {sorted(aux)}')
        size = len(aux["per_sequence_loss"])
        if size % shards or k > size // shards:
            raise OptionError("k", k, f"at most the sequences of a shard; {shards} shards have {size}")
        losses = aux["per_sequence_loss"].reshape(shards, -1)
        chosen = jax.lax.top_k(losses, k)[1]

        def rows(x):
            blocks = x.reshape(shards, -1, *x.shape[1:])
            picked = jnp.take_along_axis(blocks, chosen.reshape(shards, k, *(1,) * (x.ndim - 1)), axis=1)
            return picked.reshape(shards * k, *x.shape[1:])

        gradients, residuals = whole(objective, params, by_rows(batch, rows))
        return gradients, residuals._replace(aux=aux.get("returned"))

    return first


def focal(
    frequency: jax.Array,
    gamma: Annotated[float, Option("focus on rare tokens", *FINITE)] = 1.0,
    lam: Annotated[float, Option("weight of the focused loss", *NOT_NEGATIVE)] = 0.5,
) -> FirstPass:
    """Weights rare tokens more in the ascent: c_y = lam (1 - frequency_y)^gamma (Focal-SAM, Li et al. 2025).

    clean is the gradient of the loss; ascent is the gradient of the loss with tokens weighted by c. The second pass
    uses those weights. frequency: [V], sums to 1. Needs batch["targets"], batch["weights"], and a loss that multiplies
    by the weights and divides by the number of tokens of positive weight, so that both losses share one normaliser.
    """

    def first(objective, params, batch):
        # Above zero, because the mean does not count tokens of weight 0, and a weight may underflow.
        share = jnp.maximum(lam * (1 - frequency) ** gamma, 1e-30)
        focused = {**batch, "weights": batch["weights"] * share[batch["targets"]]}
        loss, aux, clean, (_, hidden, _), pull = clean_pass(objective, params, batch)
        (focused_loss, own), ascent = backward(objective.readout, pull, params, hidden, focused, has_aux=True)
        anchor = Anchor(params, hidden, own.get("kept"))
        # The second pass computes the focused loss only, so pass on the difference to report the whole loss.
        residuals = Residuals(focused, anchor, loss - focused_loss, pull, aux.get("returned"))
        return Gradients(loss, clean, ascent), residuals

    return first
