"""Does what few bits keep survive the rounding of epsilon? The smallest cell in bfloat16 compute, on three seeds.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/bfloat16.py --out=runs/bfloat16 --order=listed

Parameters, their updates and theta + epsilon stay in float32; what is multiplied is rounded to 8 bits, and an epsilon
that is smaller than half of a weight's last bit moves nothing there. The float32 runs of the same seeds are those of
overtrained.py.
"""

TUNED = {
    "model.size": "0.01m",
    "model.compute_dtype": "bfloat16",
    "optim.base": "adamw",
    "optim.method": "adamw",
    "optim.schedule": "cosine",
    "optim.peak_learning_rate": 0.008,
}
ENTRIES = ({}, {"optim.method": "functional_sam", "optim.rho": 0.1}, {"optim.method": "msam", "optim.rho": 0.3})


def get_spec() -> list[dict]:
    return [{"set": {**TUNED, **entry, "seed": seed}} for seed in (1, 2, 3) for entry in ENTRIES]
