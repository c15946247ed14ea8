"""Where epsilon lies with a vocabulary of 32,000 pieces, most of which a batch does not meet."""

from pathlib import Path

import pytest

from steppe.scripts.bench.shares import shares

C4_MODEL = Path(__file__).parents[4] / "shared" / "t5_cc_all_32000_100extra.model"
SMALL = {
    "model.size": "0.4m", "data.vocabulary": str(C4_MODEL), "data.sequence_length": "128", "train.batch_size": "4",
    "train.duration": "20 steps", "optim.b2": "0.98", "mesh.data": "1", "mesh.fsdp": "1",
}  # fmt: skip


@pytest.mark.skipif(not C4_MODEL.exists(), reason="the C4 vocabulary is not beside the repository")
def test_preconditioning_leaves_the_layers_at_least_a_tenth_of_their_share(tmp_path):
    """Of |epsilon|^2, beside plain g; without this gradient in the moment and without a floor they keep nothing."""

    def layers(method, **options):
        given = {"optim.method": method, "data.cache": str(tmp_path), **options}
        ((_, _, (attention, mlp)),) = shares({**SMALL, **given}, [20], ["attention", "mlp"])
        return attention + mlp

    plain = layers("sam")
    stale = {"optim.precond_moment": "stale"}
    assert layers("precond_functional_sam") > 0.1 * plain
    assert layers("precond_functional_sam", **stale) > 0.1 * plain
    assert layers("precond_functional_sam", **stale, **{"optim.precond_floor": "0.0"}) < 0.1 * plain
