"""The language model as an optim.Objective: trunk, chunked readout, frozen readout."""

import jax.numpy as jnp

from steppe.lm.model.mesh import Placement
from steppe.lm.model.readout import Options, cross_entropy, frozen_change
from steppe.lm.model.transformer import Shape, Trunk
from steppe.optim import Objective


def readout_kernel(params, shape: Shape):
    """The readout weights [V, D]; if tied, the embedding table."""
    return params["embed"]["embedding"] if shape.tie_embeddings else params["readout"]["kernel"]


def objective(shape: Shape, options: Options, constrain: Placement, ascent_reduction: str = "") -> Objective:
    """Mean cross-entropy of next-token prediction, as an Objective.

    batch: inputs, targets [B, T] int32 and weights [B, T] float32 (0: not counted); for packed documents also segments
    and positions [B, T] int32. constrain: Placement of activations in the trunk; options.place: in the readout.
    ascent_reduction: replaces options.place.reduction for an ascent gradient that is only climbed; "": no change.
    """
    trunk = Trunk(shape, constrain)

    def hidden(params, batch):
        return trunk.apply({"params": params}, batch["inputs"], batch.get("positions"), batch.get("segments"))

    def readout_of(options):
        def readout(params, hidden_BxTxD, batch):
            loss, per_sequence, kept = cross_entropy(
                options, readout_kernel(params, shape), hidden_BxTxD, batch["targets"], batch["weights"]
            )
            return loss, {"per_sequence_loss": per_sequence, "kept": kept}

        return readout

    def frozen_readout(params, hidden_BxTxD, anchor, batch):
        fixed = (readout_kernel(anchor.params, shape), anchor.hidden, anchor.kept)
        return frozen_change(
            options, readout_kernel(params, shape), hidden_BxTxD, fixed, batch["targets"], batch["weights"]
        )

    def weight(batch):
        return jnp.sum(batch["weights"] > 0).astype(jnp.float32)

    climbing = options.place._replace(reduction=ascent_reduction or options.place.reduction)
    return Objective(
        trunk=hidden,
        readout=readout_of(options),
        frozen_readout=frozen_readout,
        weight=weight,
        compute_dtype=shape.dtype,
        ascent_readout=readout_of(options._replace(place=climbing)),
        sharded=constrain.mesh is not None and constrain.mesh.size > 1,
    )
