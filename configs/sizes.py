"""Model sizes by name, and `resolve`, which writes the shape of a named size into a config.

In style nanodo, N layers of width D with an MLP of width F = 4D have 12 N D^2 weights, the count next to each size.
Norm scales and embeddings add to it; lm/budget.py counts everything exactly. 24m to 1.2b are the sizes of the
Functional-SAM paper (arXiv 2502.02407). It prints 23.9M, 42.5M, 117.9M and ~1.2B; we inferred these (N, D) from the
counts. They give 23.89M, 42.47M, 117.96M and 1.208B.
"""

from ml_collections import ConfigDict

from steppe.configs.keys import named

SIZES = {
    # for studies of minutes on a CPU: four blocks, head width 8
    "0.003m": dict(layers=4, width=8, heads=1, mlp_width=32),  # 3,072
    "0.01m": dict(layers=4, width=16, heads=2, mlp_width=64),  # 12,288
    "0.03m": dict(layers=4, width=24, heads=3, mlp_width=96),  # 27,648
    "0.05m": dict(layers=4, width=32, heads=4, mlp_width=128),  # 49,152
    # for studies of hours on a CPU: four blocks, each size twice as wide as the last
    "0.1m": dict(layers=4, width=48, heads=3, mlp_width=192),  # 110,592; head width 16
    "0.4m": dict(layers=4, width=96, heads=6, mlp_width=384),  # 442,368; head width 16
    "1.8m": dict(layers=4, width=192, heads=6, mlp_width=768),  # 1,769,472; head width 32
    # the paper's scales, head width 64
    "24m": dict(layers=6, width=576, heads=9, mlp_width=2304),  # 23,887,872
    "42m": dict(layers=6, width=768, heads=12, mlp_width=3072),  # 42,467,328
    "118m": dict(layers=6, width=1280, heads=20, mlp_width=5120),  # 117,964,800
    "1.2b": dict(layers=24, width=2048, heads=32, mlp_width=8192),  # 1,207,959,552
    # the shapes of Watts et al. (arXiv 2605.02105), whose names count embeddings too; head width 64
    "20m": dict(layers=8, width=256, heads=4, mlp_width=1024),  # 6,291,456
    "60m": dict(layers=8, width=512, heads=8, mlp_width=2048),  # 25,165,824
    "150m": dict(layers=12, width=768, heads=12, mlp_width=3072),  # 84,934,656
    "1b": dict(layers=16, width=2048, heads=32, mlp_width=8192),  # 805,306,368
    # width and head width (128) of common 8B models; a plain MLP of 4D needs 40 blocks to reach 8B
    "8b": dict(layers=40, width=4096, heads=32, mlp_width=16384),  # 8,053,063,680
}


def resolve(config: ConfigDict) -> ConfigDict:
    """Writes the shape named by `config.model.size` into `config.model` and returns the config; "" changes nothing.

    Raises ValueError for an unknown name.
    """
    size = config.model.size
    if size:
        if size not in SIZES:
            hint = named("optim.options:nearest")(size, list(SIZES))
            raise ValueError(f"config.model.size = {size!r}: must be one of {', '.join(SIZES)}, or empty{hint}")
        config.model.update(SIZES[size])
    return config
