"""Every named method as look x ascent x descent: the table that code, documentation and help are made from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optim import ascent, descent, looks
from optim.base import BASES, Base
from optim.base import moments as read_moments
from optim.rule import Rule
from optim.sharpness_aware import ASCENT_OVER, LAYERWISE, Switches, plain, sharpness_aware

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


_FOCAL = descent.Descent(
    descent.full().path,
    lambda looked, vectors: jax.tree.map(lambda g, a, v: (g - a) + v, looked.clean, looked.ascent, vectors),
)

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
        memory="1 θ + h",
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
        memory="2 θ + h",
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
        equation="∇Σ(1-c)ℓ(θ) + ∇Σcℓ(θ+ε), ε ∝ ∇Σcℓ(θ), c_y = λ(1-π_y)^γ",
        source="Li et al. 2025",
        ascent=_along_gradient,
        descent=lambda o: _FOCAL,
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
    clip_norm: float | None = None, **options,
) -> Rule:  # fmt: skip
    """A gradient rule by name. rho = 0 is the base gradient itself; rho None is the method's published default.

    base: the optim.base.Base whose moments a direction may need; without one, moments are read from any optax state
    that holds an Adam, Lion or momentum state, second moments corrected with b2. The other switches: see Switches.
    ValueError for an unknown name, an option the method does not take, or a base without the moment it needs.
    """
    name, row = canonical(name), METHODS[canonical(name)]
    options = options_of(name, options)
    rho = options.get("rho", 0.0) if rho is None else rho
    for key, value, accepted in (
        ("ascent_over", ascent_over, ASCENT_OVER),
        ("layerwise_rho", layerwise_rho, LAYERWISE),
    ):
        if value not in accepted:
            raise ValueError(f"optim.{key} = {value!r}: must be one of {', '.join(accepted)}")
    if not callable(rho) and rho < 0:
        raise ValueError(f"optim.rho = {rho!r}: must be at least 0")
    if base is not None and base.name not in accepted_bases(name):
        raise ValueError(f"optim.base = {base.name!r}: {name} needs one of {', '.join(accepted_bases(name))}")
    if name == "look_sam":
        every = options["k"]
    switches = Switches(
        rho, start, stop, every, microbatches, ascent_over, ascent_fraction, tuple(perturb), layerwise_rho, clip_norm
    )
    if row is None or (not callable(rho) and rho == 0):
        return plain(switches)
    up, down = row.ascent(options), row.descent(options)
    if row.look:
        look = row.look(options)
    elif "gradient" not in up.needs:
        look = looks.forward_only(down.anchored)
    elif ascent_over == "subset":
        look = looks.subset(ascent_fraction, down.anchored)
    else:
        look = looks.whole
    read = base.moments if base else lambda state: read_moments(state, b2)
    return sharpness_aware(up, down, switches, read, look)


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
