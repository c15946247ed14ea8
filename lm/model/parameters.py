"""Every parameter of the Transformer, a line each: where it lives on a mesh, its kind, which axes it reads and writes.

A module beside the Transformer, because the mesh reads it and the Transformer needs the mesh.
"""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from steppe.optim.masks import matrix_axes


class Parameter(NamedTuple):
    """A line of the table. path: regex; spec: its place; kind: table, matrix or norm.

    reads, writes: the axes that a matrix sums over and those of its result; the others stack matrices.
    """

    path: str
    kind: str
    spec: P
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """What it is reported with: embeddings, norms, attention or mlp."""
        return {"table": "embeddings", "norm": "norms"}.get(self.kind) or self.path.partition("/")[0]


# fsdp splits the width, tensor what is computed apart: heads, the MLP's hidden features, the vocabulary. Layer stacks
# keep their first axis whole: the scan walks along it. A table is read by its rows, so a row is what it writes.
TABLE = (
    Parameter(r"(embed/embedding|readout/kernel)$", "table", P("tensor", "fsdp"), (1,), (0,)),
    Parameter(r"position/embedding$", "table", P(None, "fsdp"), (1,), (0,)),
    Parameter(r"attention/(query|key|value)/kernel$", "matrix", P(None, "fsdp", "tensor", None), (1,), (2, 3)),
    Parameter(r"attention/out/kernel$", "matrix", P(None, "tensor", None, "fsdp"), (1, 2), (3,)),
    Parameter(r"mlp/(up|gate)/kernel$", "matrix", P(None, "fsdp", "tensor"), (1,), (2,)),
    Parameter(r"mlp/down/kernel$", "matrix", P(None, "tensor", "fsdp"), (1,), (2,)),
    Parameter(r"norm/scale$", "norm", P()),
)
# {group: regex of its parameters}
GROUPS = {line.group: "|".join(other.path for other in TABLE if other.group == line.group) for line in TABLE}
STACKED = r"^layers/"  # parameters of all layers in one array, the layer first

# What muon and layerwise rho take; tables are no matrices.
MATRIX_AXES = matrix_axes(tuple((line.path, line.reads, line.writes) for line in TABLE if line.kind == "matrix"))


def of(path: str) -> Parameter:
    """The line of a parameter, by its path. ValueError if there is none."""
    for line in TABLE:
        if re.search(line.path, path):
            return line
    raise ValueError(f"parameter {path!r} is not in the table: add a line to TABLE in lm/model/parameters.py")


def name_of(path: Any) -> str:
    """ "layers/mlp/up/kernel" of a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
