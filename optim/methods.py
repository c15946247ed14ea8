"""The table of named methods, each a first pass, an ascent and a second pass. Code, configs and help read it."""

import functools
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

from steppe.optim import ascent, references
from steppe.optim.ascent import Ascent
from steppe.optim.base import BASES, Base, kind_of
from steppe.optim.base import moments as read_moments
from steppe.optim.options import AT_LEAST_ONE, NOT_NEGATIVE, Declared, Option, make, nearest, needs, options
from steppe.optim.passes import first_pass, second_pass
from steppe.optim.passes.second_pass import SecondPass
from steppe.optim.passes.two_pass import SWITCHES, Plain, Switches, TwoPass
from steppe.optim.rule import OptionError, Rule
from steppe.optim.schedules import is_number


class Method(NamedTuple):
    """One row of the table. Its options are rho and those that its parts declare.

    equation: the gradient handed to the base optimizer. memory: beyond the base step; theta is one copy of the
    parameters, h the hidden states; default: theta and what the second pass reuses. ascent, second, first, period:
    functions that make the parts, see optim.options; with a period of n, every n-th step perturbs. rule: makes the
    whole rule instead of these parts; its parameters may name rho, microbatches, base and the switches. passes:
    (forwards, backwards) of a step that perturbs, over the sequences that `first` selects; default: two of each if the
    direction needs a gradient, else one, and one more forward if the second pass is anchored. products: products with
    the readout's weights; default: one per forward and two per backward. share(sequences, shards, ...options): the
    fraction of the sequences that `first` selects. rho: default radius. second_derivatives: whether the method
    differentiates the model twice.
    """

    equation: str
    source: str
    ascent: Callable[..., Ascent] | None = None
    second: Callable[..., SecondPass] | None = None
    passes: tuple[float, float] | None = None
    memory: str = ""
    rho: float = 0.05
    products: float | None = None
    first: Callable[..., first_pass.FirstPass] | None = None
    period: Callable[..., int] | None = None
    share: Callable[..., float] | None = None
    second_derivatives: bool = False
    rule: Callable[..., Rule] | None = None

    def makers(self) -> list[Callable]:
        """The functions that make its parts."""
        return [part for part in (self.ascent, self.first, self.second, self.period, self.rule) if part]

    def declared(self) -> dict[str, Declared]:
        """{name: Declared} of its options."""
        rho = Declared(float, self.rho, Option("perturbation radius, l2 norm over all parameters", *NOT_NEGATIVE))
        shared = {"rho": rho} if self.rule is None or "rho" in needs(self.rule) else {}
        return functools.reduce(lambda known, part: known | options(part), self.makers(), shared)

    def counted(self) -> tuple[float, float]:
        """`passes`, or their default."""
        if self.passes or not (self.ascent and self.second):
            return self.passes or (1, 1)
        if "gradient" in _defaults(self.ascent).needs:
            return 2, 2
        return 1 + _defaults(self.second).anchored, 1

    def stored(self) -> str:
        """`memory`, or its default."""
        second = _defaults(self.second) if self.second else None
        reused = " + activations" if second and second.pulls else " + h" if second and second.anchored else ""
        return self.memory or f"1 θ{reused}"

    def needs(self) -> dict[str, bool]:
        """{need: whether it is required}. Today only "frequency": the frequencies of tokens [V]."""
        all_needs = functools.reduce(lambda known, part: known | needs(part), self.makers(), {})
        supplied = {"shards", *Switches._fields, "base"} if self.rule else {"shards"}  # by `method`
        return {need: must for need, must in all_needs.items() if need not in supplied}


def _every(k: Annotated[int, Option("perturb every k-th step", *AT_LEAST_ONE)] = 5) -> int:
    return k


METHODS: dict[str, Method | None] = {
    "adamw": None,
    "sam": Method("J(θ+ε)ᵀ∇ℓ(F(θ+ε)), ε = ρ g/‖g‖", "Foret et al. 2021", ascent.gradient, second_pass.full),
    "functional_sam": Method(
        "J(θ+ε)ᵀ∇ℓ(F(θ)), ε = ρ g/‖g‖", "Singh et al. 2025", ascent.gradient, second_pass.functional
    ),
    "logit_sam": Method(
        "J(θ)ᵀ∇ℓ(F(θ+ε)), ε = ρ g/‖g‖", "Baek, Kolter, Raghunathan 2024", ascent.gradient, second_pass.logit
    ),
    "precond_sam": Method("sam with ε = ρ D⁻¹g/‖D⁻¹g‖", "Singh et al. 2025", ascent.preconditioned, second_pass.full),
    "precond_functional_sam": Method(
        "functional_sam with ε = ρ D⁻¹g/‖D⁻¹g‖", "Singh et al. 2025", ascent.preconditioned, second_pass.functional
    ),
    "mixture_sam": Method(
        "α functional_sam + (1-α) logit_sam",
        "ours",
        ascent.gradient,
        second_pass.mixture,
        passes=(2, 3),
        products=9,
        memory="2 θ + activations",
    ),
    "random_sam": Method("sam with ε = ρ z/‖z‖, z Gaussian", "control", ascent.random, second_pass.full),
    "penalty_sam": Method(
        "g + H ε, ε = ρ g/‖g‖",
        "exact first-order form of sam",
        ascent.gradient,
        second_pass.penalty,
        passes=(4, 3.5),
        memory="2 θ + activations",
        second_derivatives=True,
    ),
    "asam": Method(
        "sam with ε = ρ T²g/‖T g‖, T = |θ| + 0.01", "Kwon et al. 2021", ascent.adaptive, second_pass.full, rho=0.2
    ),
    "msam": Method("∇L(θ - ρ m/‖m‖)", "Becker, Altrock, Risse 2024", ascent.momentum, second_pass.full, rho=1.0),
    "functional_msam": Method(
        "J(θ+ε)ᵀ∇ℓ(F(θ)), ε = -ρ m/‖m‖", "ours", ascent.momentum, second_pass.functional, rho=1.0
    ),
    "precond_msam": Method(
        "∇L(θ - ρ u/‖u‖), -u the base's update for a zero gradient (Adam: u = D⁻¹m)",
        "ours",
        ascent.update,
        second_pass.full,
        rho=1.0,
    ),
    "precond_functional_msam": Method(
        "J(θ+ε)ᵀ∇ℓ(F(θ)), ε = -ρ u/‖u‖ as in precond_msam", "ours", ascent.update, second_pass.functional, rho=1.0
    ),
    "k_sam": Method(
        "sam on the k sequences of highest loss in each data shard",
        "Ni et al. 2022",
        ascent.gradient,
        second_pass.full,
        share=lambda k, shards, sequences: k * shards / sequences,
        first=first_pass.hardest,
    ),
    "cr_sam": Method(
        "g₊ + γ(g₊+g₋-2g) + β(g₊-g₋), g± = ∇L(θ ± ρ g/‖g‖)",
        "Wu, Luo, Wunsch 2024",
        ascent.gradient,
        second_pass.curvature_regularized,
        passes=(3, 3),
        memory="3 θ",
        rho=0.1,
    ),
    "focal_sam": Method(
        "∇Σ(1-c)ℓ(θ) + ∇Σcℓ(θ+ε), ε along ∇Σcℓ(θ), c_y = λ(1-π_y)^γ",
        "Li et al. 2025",
        ascent.gradient,
        second_pass.focused,
        passes=(2, 3),
        products=9,
        memory="2 θ",
        rho=0.2,
        first=first_pass.focal,
    ),
    "look_sam": Method(
        "sam on every k-th step; else g + α ‖g‖/‖v‖ v, v the part of the last sam gradient orthogonal to g",
        "Liu et al. 2022",
        ascent.gradient,
        second_pass.reused,
        period=_every,
        memory="2 θ",
    ),
    "friendly_sam": Method(
        "sam with ε along g - σ EMA(g)", "Li et al. 2024", ascent.friendly, second_pass.full, memory="2 θ"
    ),
    "gsam": Method(
        "g_p - α (part of g orthogonal to g_p), g_p the sam gradient",
        "Zhuang et al. 2022",
        ascent.gradient,
        second_pass.surrogate_gap,
        memory="2 θ",
    ),
}
ALIASES = {"j_sam": "functional_sam", "l_sam": "logit_sam", "base": "adamw"}


def canonical(name: str) -> str:
    """Resolves an alias; returns a method's name or a reference unchanged. Raises OptionError for an unknown name."""
    name = ALIASES.get(name, name)
    if name not in METHODS and not references.is_reference(name):
        names = [*METHODS, *ALIASES]
        raise OptionError("method", name, f"one of {', '.join(names)}, or {references.ACCEPTED}{nearest(name, names)}")
    return name


def row_of(name: str) -> Method | None:
    """The row of a method, alias or reference; None for adamw. Runs the file of a reference."""
    name = canonical(name)
    return METHODS[name] if name in METHODS else _row_from_outside(name)


@functools.cache
def _row_from_outside(reference: str) -> Method:
    made = references.load("method", reference).made
    if isinstance(made, Method):
        return made
    if "learning_rate" in needs(made):
        raise OptionError("method", reference, f"a direction, a rule or a row; {reference} is a base for optim.base")
    says = (made.__doc__ or reference).partition("\n")[0]
    if needs(made).keys() & {"rho", "microbatches", "base"}:
        return Method(equation=says, source=reference, rule=made)
    with references.running("method", reference, "a function that returns a direction from its defaults"):
        part = _defaults(made)
    if isinstance(part, Ascent):
        return Method(says, reference, made, second_pass.full)
    if not (hasattr(part, "init") and hasattr(part, "gradient")):
        accepted = f"a function that returns an Ascent or a Rule, or a Method; it returns a {type(part).__name__}"
        raise OptionError("method", reference, accepted)
    return Method(equation=says, source=reference, rule=made)


def _options() -> dict[str, tuple[type, str, str]]:
    """{option: (type, meaning with each method's default, accepted)} over all methods, for the config keys."""
    table = {}
    for name, row in METHODS.items():
        for option, declared in (row.declared() if row else {}).items():
            entry = table.setdefault(option, (declared.kind, {}, declared.option.accepted))
            entry[1].setdefault(declared.option.meaning, {}).setdefault(declared.default, []).append(name)

    def text(meaning: str, defaults: dict[Any, list[str]]) -> str:
        most = max(map(len, defaults.values()))
        shown = [f"{value}" + f" ({', '.join(of)})" * (len(of) < most) for value, of in defaults.items()]
        return f"{meaning}; None: {', '.join(shown)}"

    return {
        option: (kind, "; ".join(text(*each) for each in meanings.items()), accepted)
        for option, (kind, meanings, accepted) in table.items()
    }


OPTIONS = _options()


def former(name: str, known: Collection[str]) -> dict[str, Any]:
    """{option: old default} of a method, for options whose default changed when an option not in `known` was added."""
    row = row_of(name) if name in (*METHODS, *ALIASES) else None  # other code refuses unknown names
    declared = {option: each.option.former for option, each in (row.declared() if row else {}).items()}
    return {option: then[0] for option, then in declared.items() if then and then[1] not in known}


def options_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's options; absent ones and None get defaults. Raises OptionError for an invalid option or value."""
    row = row_of(name)
    declared = row.declared() if row else {}
    given = {option: value for option, value in given.items() if value is not None}
    for option in foreign(name, given):
        raise OptionError(option, given[option], f"None: {option} is not an option of {name}, which {takes(name)}")
    for option, value in given.items():
        if option not in declared:
            continue  # every method accepts a rho of 0
        known = option != "rho" or is_number(value)
        if known and not declared[option].option.allows(value):
            raise OptionError(option, value, declared[option].option.accepted)
    return {option: each.default for option, each in declared.items()} | given


def foreign(name: str, given: Mapping[str, Any]) -> list[str]:
    """The options with a value other than None that are not options of the method; [] for an unknown method."""
    if name not in (*METHODS, *ALIASES) and not references.is_reference(name):
        return []
    row = row_of(name)
    declared = row.declared() if row else {}
    unknown = {option: value for option, value in given.items() if value is not None and option not in declared}
    # rho = 0 means the base's gradient, with every method
    return [option for option, value in unknown.items() if not (option == "rho" and is_number(value) and value == 0)]


def takes(name: str) -> str:
    """ "takes rho, k": the end of a sentence about a method."""
    row = row_of(name)
    return f"takes {', '.join(row.declared() if row else ()) or 'no options'}"


def perturbs(name: str, rho: float | Callable) -> bool:
    """Whether a method can differ from its base: it has a row, and its radius (if any) is not known to be 0."""
    row = row_of(name)
    return row is not None and ("rho" not in row.declared() or not (is_number(rho) and rho == 0))


def needed_moments(name: str) -> set[str]:
    """The moments of the base, "first" or "second", that the method's direction needs."""
    row = row_of(name)
    return set(_defaults(row.ascent).needs) & {"first", "second"} if row and row.ascent else set()


def accepted_bases(name: str) -> list[str]:
    """Steppe's base optimizers whose state has the moments that the method needs."""
    return [base for base, kind in BASES.items() if needed_moments(name) <= set(kind.moments)]


def second_of(name: str) -> SecondPass:
    """The method's second pass with default options; the full one, which reuses nothing, if it has none."""
    row = row_of(name)
    return _defaults(row.second if row and row.second else second_pass.full)


def only_climbs(name: str) -> bool:
    """Whether the method uses the gradient at theta for the ascent only."""
    row = row_of(name)
    return bool(row and row.ascent and second_of(name).only_climbs and "gradient" in _defaults(row.ascent).needs)


def _defaults(part: Callable) -> Any:
    return make(part, {name: declared.default for name, declared in options(part).items()})


def method(name: str, *, base: Base | None = None, b2: float = 0.999, shards: int = 1, **given) -> Rule:
    """Makes a gradient rule by name.

    rho: 0 gives the base gradient, None the method's published default. A traced rho is taken to be above 0, so one
    compiled step serves every radius. base: the optim.base.Base whose moments the direction may need. Without it, the
    rule reads the only moments in the optax state and corrects Adam's second moment with b2. shards: equal blocks of a
    batch's rows, one per device; methods that select sequences take equally many from each. given: the method's
    options, fields of Switches, and Method.needs.
    Raises OptionError for an unknown name or option, a switch without effect, a missing need, or an unsuitable base.
    """
    row = row_of(name)
    needed = {need: given.pop(need, None) for need in (row.needs() if row else ())}
    switches, own = _switches(given)
    values = options_of(name, own)
    rho = values.get("rho", 0.0)
    over, fraction = switches.ascent_over, switches.ascent_fraction
    if base is not None and not needed_moments(name) <= set(kind_of(base.name).moments):
        raise OptionError("base", base.name, f"one of {', '.join(accepted_bases(name))} with {name}")
    if fraction != 1 and over != "subset":
        raise OptionError("ascent_fraction", fraction, f"1.0 unless ascent_over is subset, and it is {over}")
    if row and row.period:
        if switches.every != 1:
            accepted = f"1 with optim.method = {name}; set optim.{next(iter(options(row.period)))} instead"
            raise OptionError("every", switches.every, accepted)
        switches = switches._replace(every=make(row.period, values))
    switches = switches._replace(rho=rho)
    if row is None or not perturbs(name, rho):
        return Plain(switches)
    if row.rule:
        rule = _own_rule(name, row.rule, values, switches, base)
        return _guarded(name, rule) if references.is_reference(name) else rule
    for need, must in row.needs().items():
        if must and needed[need] is None:
            raise OptionError(need, None, f"given, because {name} needs it: see optim.methods.Method.needs")
    values |= {need: value for need, value in needed.items() if value is not None} | {"shards": shards}
    assert row.ascent is not None
    assert row.second is not None
    up, down = make(row.ascent, values), make(row.second, values)
    if references.is_reference(name):
        guard = references.running("method", name, "a direction whose functions run")
        up = up._replace(direction=guard(up.direction), init=guard(up.init))
    if switches.widening != 1 and switches.layerwise_rho != "none":
        raise OptionError("layerwise_rho", switches.layerwise_rho, "none under mup, which scales rho itself")
    if switches.widening != 1 and up.widths is None:
        raise OptionError(
            "method", name, f"another method under mup, because the scaling of {name} with width is unknown"
        )
    if switches.rho_budget and "gradient" not in up.needs:
        raise OptionError("rho_budget", switches.rho_budget, f"0 with {name}, whose direction uses no gradient")
    return TwoPass(
        ascent=up,
        second=down,
        switches=switches,
        moments=base.moments if base else lambda state, params: read_moments(state, params, b2),
        first=_first(name, row, values, switches, up, down),
    )


def _own_rule(name: str, rule: Callable[..., Rule], values: dict, switches: Switches, base: Base | None) -> Rule:
    """The rule that a row's `rule` makes. Raises OptionError for a switch that is set but not a parameter of `rule`."""
    taken, plain = needs(rule), Switches()
    for switch, value in switches._asdict().items():
        is_set = switch not in ("rho", "groups", "matrix_axes") and value != getattr(plain, switch)
        if is_set and switch not in taken:
            if switch == "widening":
                raise OptionError(
                    "method", name, f"another method under mup, because the rule of {name} does not take `widening`"
                )
            raise OptionError(switch, value, f"{getattr(plain, switch)!r} with {name}, whose rule does not take it")
    return make(rule, {**switches._asdict(), **values, "rho": switches.rho, "base": base})


def _guarded(name: str, rule: Rule) -> Any:
    """The rule of a user's file, whose errors are OptionErrors."""
    guard = references.running("method", name, "a rule whose functions run")
    return SimpleNamespace(**{part: guard(getattr(rule, part)) for part in ("init", "gradient", "perturbing")})


def _switches(given: Mapping[str, Any]) -> tuple[Switches, dict[str, Any]]:
    """(checked switches, the other arguments) from the keyword arguments of `method`."""
    chosen = {name: given[name] for name in Switches._fields if name in given and name != "rho"}
    chosen |= {name: tuple(chosen[name]) for name in chosen if SWITCHES.get(name) and SWITCHES[name].kind is tuple}
    for name, value in chosen.items():
        option = SWITCHES[name].option if name in SWITCHES else None
        if option and not option.allows(value):
            raise OptionError(name, value, option.accepted)
    if chosen.get("microbatches", 1) < 1:
        raise OptionError("microbatches", chosen["microbatches"], "an integer >= 1")
    return Switches(**chosen), {name: value for name, value in given.items() if name not in chosen}


def _first(
    name: str, row: Method, values: dict, switches: Switches, up: Ascent, down: SecondPass
) -> first_pass.FirstPass:
    subset, why = switches.ascent_over == "subset", ""
    if subset and row.first:
        why = "chooses its own tokens"
    elif subset and "gradient" not in up.needs:
        why = "uses no gradient for the ascent"
    elif subset and (down.combine or down.remember):
        why = "also descends along the gradient of the whole batch"
    if why:
        raise OptionError("ascent_over", "subset", f"global or microbatch with {name}, which {why}")
    if row.first:
        return make(row.first, values)
    if "gradient" not in up.needs:
        return first_pass.forward_only(down.anchored)
    fraction = switches.ascent_fraction
    return first_pass.subset(fraction, down.anchored, values["shards"]) if subset else first_pass.whole


class Cost(NamedTuple):
    """Cost of a step: forwards and backwards of the trunk, and products with the readout's weights."""

    forwards: float = 1.0
    backwards: float = 1.0
    products: float = 3.0

    def averaged(self, share: float) -> "Cost":
        """The mean cost of a step if a `share` of the steps cost this and the others cost the base step."""
        return Cost(*(own + share * (one - own) for one, own in zip(self, Cost(), strict=True)))


def cost(name: str, *, sequences: int = 1, shards: int = 1, keep: bool = False, **given) -> Cost:
    """The Cost of a step that perturbs, over all of its microbatches.

    sequences: number per step. shards, given: see method. keep: whether the readout stores its loss derivative.
    """
    row = row_of(name)
    if row is None or row.second is None:
        return Cost()
    switches, own = _switches(given)
    over, fraction, microbatches = switches.ascent_over, switches.ascent_fraction, switches.microbatches
    values, each = options_of(name, own), sequences // microbatches
    forwards, backwards = row.counted()
    products, second = row.products or forwards + 2 * backwards, make(row.second, values)
    if row.share:
        # One forward over all sequences selects the share that the two passes process.
        share = make(row.share, values | {"shards": shards, "sequences": each})
        forwards, backwards, products = 1 + forwards * share, backwards * share, 1 + products * share
    if over == "subset":
        # The ascent processes part of the batch; an anchored path also needs the whole forward at theta.
        missing = 1 - first_pass.subset_rows(fraction, each, shards) / each
        again = 1 if second.anchored else 0
        forwards, backwards, products = forwards - missing + again, backwards - missing, products - 3 * missing + again
    if second.pulls and (over == "subset" or (over == "global" and microbatches > 1)):
        forwards += 1  # the pass at theta is not stored, so its forward runs again
    return Cost(forwards, backwards, products - (1 if keep and second.frozen else 0))
