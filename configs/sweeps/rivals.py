"""One-pass rivals of sharpness-aware methods: averages, high rates, no decay, short anneals, other bases.

    steppe sweep --config=quickstart --sweep=rivals --out=sweeps/rivals

33 runs at AdamW's cost, three seeds each: one, two and four times the peak learning rate; no weight decay; wsd with a
short and a long anneal; nadamw, muon and soap; lion at a fifth of the rate; schedule_free at a constant rate. Every run
also evaluates EMA and LAWA averages. The argument is the peak learning rate: --sweep=rivals:0.004; default 0.003.
"""

from steppe.configs import sweeps


def get_spec(rate: str = "0.003") -> list[dict]:
    try:
        peak = float(rate)
    except ValueError:
        raise ValueError(f"the argument {rate!r} must be a peak learning rate, such as 0.003") from None
    variants = [
        *({"optim.peak_learning_rate": float(f"{factor * peak:.3g}")} for factor in (1, 2, 4)),
        {"optim.weight_decay": 0.0},
        {"optim.schedule": "wsd", "optim.cooldown": "5%"},
        {"optim.schedule": "wsd", "optim.cooldown": "20%"},
        {"optim.base": "nadamw"},
        {"optim.base": "muon"},
        {"optim.base": "soap"},
        {"optim.base": "lion", "optim.peak_learning_rate": float(f"{0.2 * peak:.3g}")},
        {"optim.base": "schedule_free", "optim.schedule": "constant"},
    ]
    shared = {
        "optim.method": "adamw",
        "optim.rho": None,
        "optim.peak_learning_rate": peak,
        "average.weights": ("ema", "lawa"),
    }
    return [{"set": {**shared, **variant}, "grid": {"seed": sweeps.SEEDS}} for variant in variants]
