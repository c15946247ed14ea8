"""The Transformer's parameters, one per line: sharding, kind, and the axes that each reads and writes.

It is a module of its own because the mesh reads it and the Transformer imports the mesh.
"""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from steppe.optim.masks import matrix_axes


class Parameter(NamedTuple):
    """A line of the table. path: regex; spec: its sharding; kind: table, matrix or norm.

    reads: the axes that a matrix sums over; writes: the axes of its result. Other axes stack matrices.
    """

    path: str
    kind: str
    spec: P
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """The name it is reported under: embeddings, norms, attention or mlp."""
        return {"table": "embeddings", "norm": "norms"}.get(self.kind) or self.path.partition("/")[0]


# fsdp splits the width; tensor splits heads, the MLP's hidden features and the vocabulary. The first axis of stacked
# layers is not split, because the scan walks along it. A lookup returns rows of a table, so it writes rows.
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

# Axes of the matrices, for muon and layerwise rho; tables are not matrices.
MATRIX_AXES = matrix_axes(tuple((line.path, line.reads, line.writes) for line in TABLE if line.kind == "matrix"))


def of(path: str) -> Parameter:
    """The table's line for a parameter path. Raises ValueError if there is none."""
    for line in TABLE:
        if re.search(line.path, path):
            return line
    raise ValueError(f"parameter {path!r} is not in the table: add a line to TABLE in lm/model/parameters.py")


def name_of(path: Any) -> str:
    """The name of a jax.tree_util path, such as "layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
