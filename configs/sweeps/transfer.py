"""Tests whether the best learning rate and rho stay the same as width grows, with the standard parametrisation and mup.

    steppe sweep --config=study --sweep=transfer --out=sweeps/transfer
    steppe report transfer sweeps/transfer

192 runs of 300 steps: SAM at four widths, six peak rates and four rho, in both parametrisations. Heads have one width.
The smallest width is the base of mup. Another method than SAM: --sweep=transfer:precond_functional_sam.
"""

WIDTHS = [16, 32, 64, 128]


def get_spec(method: str = "sam") -> dict:
    return {
        "set": {
            "model.size": "",
            "model.layers": 2,
            "model.base_width": WIDTHS[0],
            "optim.method": method,
            "train.duration": "300 steps",
            "evaluate.every": "100%",
            "checkpoint.every": "100%",
            "checkpoint.keep_every": "0%",
        },
        "zip": {
            "model.width": WIDTHS,
            "model.heads": [width // 8 for width in WIDTHS],
            "model.mlp_width": [4 * width for width in WIDTHS],
        },
        "grid": {
            "model.parametrisation": ["standard", "mup"],
            "optim.peak_learning_rate": [0.002, 0.004, 0.008, 0.016, 0.032, 0.064],
            "optim.rho": [0.003, 0.01, 0.03, 0.1],
            "seed": [0],
        },
    }
