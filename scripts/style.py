"""How methods look and how numbers read, wherever the commands show them."""

from collections.abc import Iterable

from steppe.lm.plot import BLACK, BLUE, GREEN, ORANGE, PALE, PINK, SKY, VERMILION

# (colour, marker, dash), each its own, for colour-blind readers and print; the methods of the study always look alike
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
    ("#8B0000", "h", "-"),
    ("#4B0082", "p", "--"),
)


def of_variants(names: Iterable[str]) -> dict[str, tuple]:
    """{name: (colour, marker, dash)}: a method's own, or one of those to spare."""
    spare, styles = list(SPARE), {}
    for name in names:
        if name in OF_METHOD:
            styles[name] = OF_METHOD[name]
        else:
            styles[name] = spare.pop(len(styles) % len(spare))
            spare = spare or list(SPARE)
    return styles


def series(count: int) -> list[tuple]:
    """So many (colour, marker, dash), none of them black."""
    known = [style for name, style in OF_METHOD.items() if name != "logit_sam"]
    return [known[i % len(known)] for i in range(1, count + 1)]


def si(number: float) -> str:
    """Three digits and a metric letter: 442k, 1.77M."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or letter == "P":
            break
        number /= 1000
    return f"{number:.3g}{letter}"
