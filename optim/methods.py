"""Every named method as look x ascent x descent: the table that code, documentation and help are made from."""

from collections.abc import Callable
from typing import Any, NamedTuple

from steppe.optim import ascent
from steppe.optim import first_pass as looks
from steppe.optim import second_pass as descent
from steppe.optim.base import BASES, Base
from steppe.optim.base import moments as read_moments
from steppe.optim.rule import Rule
from steppe.optim.schedules import is_number
from steppe.optim.two_pass import ASCENT_OVER, LAYERWISE, Switches, plain, sharpness_aware

CHOICES = {"precond_norm": ("l2", "ellipsoid"), "precond_moment": ("stale", "fresh")}
_PRECOND = {"precond_power": 0.5, "precond_eps": 1e-8, "precond_norm": "l2", "precond_moment": "stale"}


class Method(NamedTuple):
    """One row of the table; ascent, descent and look take the options (defaults overridden by the user's).

    equation: the gradient handed to the base optimizer. cost: (forwards, backwards) of one step, in those of the model,
    or a function of (options, sequences) giving them. memory: what is held beyond the base step, theta standing for one
    copy of the parameters and h for the hidden states. look: None looks at the whole batch.
    """

    equation: str
    source: str
    ascent: Callable[[dict], ascent.Ascent]
    descent: Callable[[dict], descent.Descent]
    cost: tuple[float, float] | Callable
    memory: str
    defaults: dict[str, Any]
    look: Callable[[dict], looks.Look] | None = None


def _along_gradient(options):
    return ascent.gradient()


def _preconditioned(options):
    return ascent.preconditioned(*(options[key] for key in _PRECOND))


def _momentum(options):
    return ascent.momentum()


def _k_sam_cost(options, sequences):
    share = options["k"] * options["shards"] / sequences
    return 1 + 2 * share, 2 * share


METHODS: dict[str, Method | None] = {
    "adamw": None,
    "sam": Method(
        equation="J(θ+ε)ᵀ∇ℓ(F(θ+ε)), ε = ρ g/‖g‖",
        source="Foret et al. 2021",
        ascent=_along_gradient,
        descent=lambda o: descent.full(),
        cost=(2, 2),
        memory="1 θ",
        defaults={"rho": 0.05},
    ),
    "functional_sam": Method(
        equation="J(θ+ε)ᵀ∇ℓ(F(θ)), ε = ρ g/‖g‖",
        source="Singh et al. 2025",
        ascent=_along_gradient,
        descent=lambda o: descent.functional(),
        cost=(2, 2),
        memory="1 θ + h",
        defaults={"rho": 0.05},
    ),
    "logit_sam": Method(
        equation="J(θ)ᵀ∇ℓ(F(θ+ε)), ε = ρ g/‖g‖",
        source="Baek, Kolter, Raghunathan 2024",
        ascent=_along_gradient,
        descent=lambda o: descent.logit(),
        cost=(2, 2),
        memory="1 θ + activations",
        defaults={"rho": 0.05},
    ),
    "precond_sam": Method(
        equation="sam with ε = ρ D⁻¹g/‖D⁻¹g‖",
        source="Singh et al. 2025",
        ascent=_preconditioned,
        descent=lambda o: descent.full(),
        cost=(2, 2),
        memory="1 θ",
        defaults={"rho": 0.05, **_PRECOND},
    ),
    "precond_functional_sam": Method(
        equation="functional_sam with ε = ρ D⁻¹g/‖D⁻¹g‖",
        source="Singh et al. 2025",
        ascent=_preconditioned,
        descent=lambda o: descent.functional(),
        cost=(2, 2),
        memory="1 θ + h",
        defaults={"rho": 0.05, **_PRECOND},
    ),
    "mixture_sam": Method(
        equation="α functional_sam + (1-α) logit_sam",
        source="ours",
        ascent=_along_gradient,
        descent=lambda o: descent.mixture(o["alpha"]),
        cost=(2, 3),
        memory="2 θ + activations",
        defaults={"rho": 0.05, "alpha": 0.5},
    ),
    "random_sam": Method(
        equation="sam with ε = ρ z/‖z‖, z Gaussian",
        source="control",
        ascent=lambda o: ascent.random(o["seed"]),
        descent=lambda o: descent.full(),
        cost=(1, 1),
        memory="1 θ",
        defaults={"rho": 0.05, "seed": 0},
    ),
    "penalty_sam": Method(
        equation="g + H ε, ε = ρ g/‖g‖",
        source="exact first-order form of sam",
        ascent=_along_gradient,
        descent=lambda o: descent.penalty(),
        cost=(3, 3),
        memory="2 θ + activations",
        defaults={"rho": 0.05},
    ),
    "asam": Method(
        equation="sam with ε = ρ T²g/‖T g‖, T = |θ| + 0.01",
        source="Kwon et al. 2021",
        ascent=lambda o: ascent.adaptive(),
        descent=lambda o: descent.full(),
        cost=(2, 2),
        memory="1 θ",
        defaults={"rho": 0.2},
    ),
    "msam": Method(
        equation="∇L(θ - ρ m/‖m‖)",
        source="Becker, Altrock, Risse 2024",
        ascent=_momentum,
        descent=lambda o: descent.full(),
        cost=(1, 1),
        memory="1 θ",
        defaults={"rho": 1.0},
    ),
    "functional_msam": Method(
        equation="J(θ+ε)ᵀ∇ℓ(F(θ)), ε = -ρ m/‖m‖",
        source="ours",
        ascent=_momentum,
        descent=lambda o: descent.functional(),
        cost=(2, 1),
        memory="1 θ + h",
        defaults={"rho": 1.0},
    ),
    "k_sam": Method(
        equation="sam on the k sequences of highest loss in each data shard",
        source="Ni et al. 2022",
        ascent=_along_gradient,
        descent=lambda o: descent.full(),
        cost=_k_sam_cost,
        memory="1 θ",
        defaults={"rho": 0.05, "k": 4, "shards": 1},
        look=lambda o: looks.hardest(o["k"], o["shards"]),
    ),
    "cr_sam": Method(
        equation="g₊ + γ(g₊+g₋-2g) + β(g₊-g₋), g± = ∇L(θ ± ρ g/‖g‖)",
        source="Wu, Luo, Wunsch 2024",
        ascent=_along_gradient,
        descent=lambda o: descent.curvature_regularized(o["gamma"], o["beta"]),
        cost=(3, 3),
        memory="3 θ",
        defaults={"rho": 0.1, "gamma": 0.1, "beta": 0.01},
    ),
    "focal_sam": Method(
        equation="∇Σ(1-c)ℓ(θ) + ∇Σcℓ(θ+ε), ε along ∇Σcℓ(θ), c_y = λ(1-π_y)^γ",
        source="Li et al. 2025",
        ascent=_along_gradient,
        descent=lambda o: descent.focused(),
        cost=(2, 3),
        memory="2 θ",
        defaults={"rho": 0.2, "gamma": 1.0, "lam": 0.5, "frequency": None},
        look=lambda o: looks.focal(o["frequency"], o["lam"], o["gamma"]),
    ),
    "look_sam": Method(
        equation="sam on every k-th step; else g + α ‖g‖/‖v‖ v, v the last sam gradient's part orthogonal to g",
        source="Liu et al. 2022",
        ascent=_along_gradient,
        descent=lambda o: descent.look(o["alpha"]),
        cost=lambda o, sequences: (1 + 1 / o["k"], 1 + 1 / o["k"]),
        memory="2 θ",
        defaults={"rho": 0.05, "k": 5, "alpha": 0.7},
    ),
    "friendly_sam": Method(
        equation="sam with ε along g - σ EMA(g)",
        source="Li et al. 2024",
        ascent=lambda o: ascent.friendly(o["sigma"], o["decay"]),
        descent=lambda o: descent.full(),
        cost=(2, 2),
        memory="2 θ",
        defaults={"rho": 0.05, "sigma": 1.0, "decay": 0.9},
    ),
    "gsam": Method(
        equation="g_p - α (part of g orthogonal to g_p), g_p the sam gradient",
        source="Zhuang et al. 2022",
        ascent=_along_gradient,
        descent=lambda o: descent.surrogate_gap(o["alpha"]),
        cost=(2, 2),
        memory="2 θ",
        defaults={"rho": 0.05, "alpha": 0.4},
    ),
}
ALIASES = {"j_sam": "functional_sam", "l_sam": "logit_sam", "base": "adamw"}


def canonical(name: str) -> str:
    """The table's name of a method or alias; ValueError naming the accepted ones."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"optim.method = {name!r}: must be one of {', '.join([*METHODS, *ALIASES])}")
    return name


def options_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The method's options, defaults where one is None or absent; ValueError for one it does not take."""
    defaults = METHODS[canonical(name)].defaults if METHODS[canonical(name)] else {}
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"optim.{key} = {value!r}: {name} takes {', '.join(defaults) or 'no options'}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"optim.{key} = {value!r}: must be one of {', '.join(CHOICES[key])}")
    return {**defaults, **given}


def accepted_bases(name: str) -> list[str]:
    """The base optimizers that keep what the method's direction needs."""
    row = METHODS[canonical(name)]
    needs = set(row.ascent(row.defaults).needs) & {"first", "second"} if row else set()
    return [base for base, has in BASES.items() if needs <= set(has)]


def is_anchored(name: str) -> bool:
    """Whether the method's second pass uses the loss derivative kept from the first."""
    row = METHODS[canonical(name)]
    return bool(row) and row.descent(row.defaults).anchored


def method(
    name: str, *, rho: float | Callable | None = None, base: Base | None = None, b2: float = 0.999, every: int = 1,
    start: int = 0, stop: int | None = None, microbatches: int = 1, ascent_over: str = "global",
    ascent_fraction: float = 1.0, perturb: tuple[str, ...] = (".*",), layerwise_rho: str = "none",
    matrix_axes: Callable | None = None, clip_norm: float | None = None, **options,
) -> Rule:  # fmt: skip
    """A gradient rule by name. rho = 0 is the base gradient itself; rho None is the method's published default.
    It may be traced, and is then taken to be above 0, so that one compiled step serves every radius.

    base: the optim.base.Base whose moments a direction may need; without one, moments are read from any optax state
    that holds a single one, Adam's second moment corrected with b2. The other switches: see Switches.
    ValueError for an unknown name, an option the method does not take, a switch that would be ignored, or a base
    without the moment it needs.
    """
    name, row = canonical(name), METHODS[canonical(name)]
    options = options_of(name, options)
    rho = options.get("rho", 0.0) if rho is None else rho
    one_of = lambda accepted: (f"one of {', '.join(accepted)}", lambda value: value in accepted)  # noqa: E731
    for key, value, (accepted, allowed) in (
        ("ascent_over", ascent_over, one_of(ASCENT_OVER)),
        ("layerwise_rho", layerwise_rho, one_of(LAYERWISE)),
        ("rho", rho, ("at least 0", lambda value: not is_number(value) or value >= 0)),
        ("every", every, ("at least 1", lambda value: value >= 1)),
        ("microbatches", microbatches, ("at least 1", lambda value: value >= 1)),
        ("ascent_fraction", ascent_fraction, ("above 0 and at most 1", lambda value: 0 < value <= 1)),
        (
            "precond_eps",
            options.get("precond_eps", 1.0),
            ("above 0", lambda value: value > 0),
        ),
    ):
        if not allowed(value):
            raise ValueError(f"optim.{key} = {value!r}: must be {accepted}")
    if base is not None and base.name not in accepted_bases(name):
        raise ValueError(f"optim.base = {base.name!r}: {name} needs one of {', '.join(accepted_bases(name))}")
    if name == "look_sam":
        if every != 1:
            raise ValueError(
                f"optim.every = {every}: must be 1 with look_sam, whose period is optim.k = {options['k']}"
            )
        every = options["k"]
    switches = Switches(
        rho, start, stop, every, microbatches, ascent_over, ascent_fraction, tuple(perturb), layerwise_rho, matrix_axes,
        clip_norm,
    )  # fmt: skip
    if row is None or (is_number(rho) and rho == 0):
        return plain(switches)
    if "frequency" in options and options["frequency"] is None:
        raise ValueError(
            f"optim.frequency = None: must be the training frequency of each token [V], as {name} needs it"
        )
    read = base.moments if base else lambda state, params: read_moments(state, params, b2)
    return sharpness_aware(row.ascent(options), row.descent(options), switches, read, _look(name, options, switches))


def _look(name: str, options: dict[str, Any], switches: Switches) -> looks.Look:
    row = METHODS[name]
    up, down = row.ascent(options), row.descent(options)
    subset = switches.ascent_over == "subset"
    why = ""
    if subset and row.look:
        why = "chooses its own tokens"
    elif subset and "gradient" not in up.needs:
        why = "climbs no gradient"
    elif subset and (down.combine or down.remember):
        why = "also descends along the gradient of the whole batch"
    elif switches.ascent_fraction != 1 and not subset:
        raise ValueError(f"optim.ascent_fraction = {switches.ascent_fraction}: must be 1 unless ascent_over is subset")
    if why:
        raise ValueError(f"optim.ascent_over = 'subset': must be global or microbatch with {name}, which {why}")
    if row.look:
        return row.look(options)
    if "gradient" not in up.needs:
        return looks.forward_only(down.anchored)
    return looks.subset(switches.ascent_fraction, down.anchored) if subset else looks.whole


def cost(
    name: str, *, sequences: int = 1, every: int = 1, ascent_fraction: float = 1.0, **options
) -> tuple[float, float]:
    """(forwards, backwards) of an average perturbing step; with every = k, of an average step."""
    row = METHODS[canonical(name)]
    if row is None:
        return 1.0, 1.0
    options = options_of(name, options)
    forwards, backwards = row.cost(options, sequences) if callable(row.cost) else row.cost
    if ascent_fraction < 1 and row.look is None and "gradient" in row.ascent(options).needs:
        # The ascent takes a fraction of a pass; an anchored path needs the whole forward at theta besides.
        forwards += ascent_fraction - 1 + (1 if row.descent(options).anchored else 0)
        backwards += ascent_fraction - 1
    return 1 + (forwards - 1) / every, 1 + (backwards - 1) / every


def table() -> str:
    """METHODS as a Markdown table."""

    def row_of(name, row):
        if row is None:
            return f"`{name}`, or any base | ∇L(θ) | | 1, 1 | 1.00 | |"
        if not callable(row.cost):
            passes, times = "{}, {}".format(*row.cost), f"{(row.cost[0] + 2 * row.cost[1]) / 3:.2f}"
        elif name == "k_sam":
            passes, times = "1 + 2s, 2s", "(1 + 6s)/3, s = k/B"
        else:
            passes, times = "1 + 1/k, 1 + 1/k", "1 + 1/k"
        defaults = ", ".join(f"{key} {value}" for key, value in row.defaults.items() if value is not None)
        equation = row.equation.replace("|", "\\|")
        return f"`{name}` | {equation} | {row.source} | {passes} | {times} | {row.memory} | {defaults}"

    head = "name | gradient handed to the base | source | F, B | cost | memory | defaults"
    lines = [head, "|".join(["---"] * 7), *(row_of(name, row) for name, row in METHODS.items())]
    aliases = ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items())
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nAliases: {aliases}.\n"
