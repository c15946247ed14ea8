"""Colours and markers of methods, and how the commands format numbers."""

import collections
import itertools
import re
from collections.abc import Iterable

from steppe.lm.plot import BLACK, BLUE, GREEN, ORANGE, PALE, PINK, SKY, VERMILION

# (colour, marker, dash), all different, for colour-blind readers and for print; fixed for the methods of the study
OF_METHOD = {
    "adamw": (BLACK, "o", "-"),
    "sam": (VERMILION, "s", "--"),
    "functional_sam": (BLUE, "^", "-."),
    "logit_sam": (ORANGE, "v", (0, (4, 1, 1, 1, 1, 1))),
    "precond_sam": (PINK, "D", (0, (5, 2))),
    "precond_functional_sam": (GREEN, "P", (0, (1, 1))),
    "msam": (SKY, "X", (0, (3, 1, 1, 1))),
}
SPARE = (
    (PALE, "<", "--"),
    ("#7A5C00", ">", "-."),
    ("#004D40", "*", ":"),
    ("#8B0000", "h", (0, (6, 2, 1, 2))),
    ("#4B0082", "p", (0, (2, 2))),
)


def of_variants(names: Iterable[str]) -> dict[str, tuple]:
    """{name: (colour, marker, dash)}. A variant has its method's colour, with another marker and dash."""
    names = list(names)
    spare, styles = collections.defaultdict(lambda: itertools.cycle(SPARE)), {}
    for name in names:
        if name in OF_METHOD:
            styles[name] = OF_METHOD[name]
            continue
        known = OF_METHOD.get(method := re.split("[ ,]", name)[0])
        colour, marker, dash = next(spare[method if known else ""])
        styles[name] = (known[0] if known else colour, marker, dash)
    return styles


def series(count: int) -> list[tuple]:
    """(colour, marker, dash) of `count` series, none of them black."""
    known = [style for name, style in OF_METHOD.items() if name != "logit_sam"]
    return [known[i % len(known)] for i in range(1, count + 1)]


def si(number: float) -> str:
    """A number with three digits and an SI prefix: 442k, 1.77M."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or letter == "P":
            break
        number /= 1000
    return f"{number:.3g}{letter}"


_IN_WORDS = {
    "lambda_max": "largest Hessian eigenvalue",
    "lambda_min": "smallest Hessian eigenvalue",
    "trace": "Hessian trace",
    "ggn_lambda_max": "largest eigenvalue of the Gauss-Newton part",
    "ggn_trace": "trace of the Gauss-Newton part",
    "nme_lambda_max": "largest eigenvalue of the functional part",
    "nme_trace": "trace of the functional part",
    "logit_trace": "trace over the logits",
    "logit_lambda_max": "largest eigenvalue over the logits",
    "sam_sharpness": "worst-case sharpness",
    "functional_sharpness": "functional sharpness",
    "average_sharpness": "average sharpness",
    "critical_sharpness": "critical sharpness",
    "noise_scale": "gradient noise scale",
    "delta_func_share": "functional share of the perturbed gradient",
    "forgetting_at_equal_gain": "forgotten at equal gain",
    "forgetting_at_equal_loss": "forgotten at equal fine-tuning loss",
}
_PATTERNS = (
    (r"noise_(\d[\d.]*(?:e[+-]?\d+)?)", lambda found: f"weight noise of {float(found[1]):.3g} rms"),
    (r"(q|int)(\d+)_(gptq_)?(channel|group(\d+))(_embedding)?",  # int: before 0.3, values symmetric around 0
     lambda found: f"{f'{found[2]} bits' if found[1] == 'q' else f'int{found[2]}'}{' by GPTQ' * bool(found[3])}, a "
                   f"scale per {f'{found[5]} inputs' if found[5] else 'channel'}{', all tables too' * bool(found[6])}"),
    (r"fine_tune_lr=(.+): gained", lambda found: f"gained on the second text, fine-tuned at {found[1]}"),
    (r"fine_tune_lr=(.+): lost", lambda found: f"forgotten, fine-tuned at {found[1]}"),
    (r"fine_tune_lr=(.+): curvature", lambda found: f"curvature along fine-tuning at {found[1]}"),
)  # fmt: skip

INCREASES = "Every measure but curvature is an increase of the loss, nats per token: smaller is better."  # of retention


def in_words(measure: str) -> str:
    """The readable name of a measure of curvature or retention."""
    for pattern, words in _PATTERNS:
        if found := re.fullmatch(pattern, measure):
            return words(found)
    return _IN_WORDS.get(measure, measure.replace("_", " "))
