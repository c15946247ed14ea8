"""Coordinate check: do activations, updates and perturbations keep their size as a model is widened?

steppe coordinates --config=NAME --out=DIR [--widths=64,128,256,512,1024] [--steps=4] [--config.key=value ...]

Each width is a model of the config's head width and ratio of MLP to width, trained for a few steps, in the standard
parametrisation and in mup with the first width as its base. Writes coordinates.csv and coordinates.png: under mup the
lines are flat (Yang et al. 2021, arXiv 2203.03466, appendix D; of perturbations Haas et al. 2024, arXiv 2411.00075).
"""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from steppe.configs.keys import count, integer, listed
from steppe.configs.read import UsageError
from steppe.lm import plot

WIDTHS = listed(integer(1, 1 << 16), least=2)


class Settings(NamedTuple):
    """Which models are made, and how far they are trained."""

    widths: Annotated[tuple[int, ...], "of the models", WIDTHS] = (64, 128, 256, 512, 1024)
    steps: Annotated[int, "of training", count(1)] = 4


COLUMNS = ("parametrisation", "width", "quantity", "rms")
STANDARD, MUP = "standard", "mup"
KINDS = ("residual", "logits")  # the residual stream after the last block, before its norm


def configs(config: Any, settings: Settings) -> dict[tuple[str, int], Any]:
    """The configs that are measured, by parametrisation and width."""
    widths = sorted(settings.widths)
    return {(form, width): at_width(config, width, form, widths[0]) for form in (STANDARD, MUP) for width in widths}


def at_width(config: Any, width: int, parametrisation: str, base: int) -> Any:
    """A copy of a config at another width, of the same head width and ratio of MLP to width."""
    from steppe.configs import sizes

    made = sizes.resolve(config.copy_and_resolve_references())
    model = made.model
    head = model.head_width or model.width // model.heads
    grouped = model.kv_heads and model.heads // model.kv_heads
    heads = width // head
    if heads * head != width:
        raise UsageError(f"--widths = {width}: must be multiples of {head}, the head width of the config")
    model.mlp_width = max(1, round(model.mlp_width * width / model.width))
    model.update(size="", width=width, heads=heads, kv_heads=heads // grouped if grouped else 0, head_width=0)
    model.update(parametrisation=parametrisation, base_width=base)
    return made


def cost(config: Any) -> float:
    """What measuring costs, in a unit that is the same for all widths: compiling, and parameters to be moved."""
    return 1e6 + config.model.width**2


def measure_config(
    config: Any, settings: Settings, tick: Callable[[str], None] = lambda stage: None
) -> dict[str, float]:
    """{"KIND", "KIND update", "KIND perturbation": root mean square} on the first batch of the config's own text.

    KIND: at the start. KIND update: what the steps, each on a batch of its own, have changed of it. KIND perturbation:
    what the method's epsilon after them changes; absent where it has none. tick(stage): called when a stage begins.
    """
    import jax.numpy as jnp

    from steppe.lm.model.ordered import jitted
    from steppe.lm.parts.assembly import batch_reader, open_parts
    from steppe.lm.parts.state import create
    from steppe.lm.parts.step import compile_step
    from steppe.optim.passes.two_pass import TwoPass

    tick("preparing")
    corpus, parts, _ = open_parts(config, lambda line: None)
    read = batch_reader(config, corpus, parts, lambda step: step)
    batches = [read(step) for step in range(settings.steps)]
    outputs = jitted(lambda params: _outputs(parts, params, batches[0]), parts.mesh, "outputs")
    state = create(parts.mesh, parts.initialise)
    tick("activations")
    first = outputs(state.params)
    tick("compiling the training step")
    step = compile_step(parts, batches[0])
    tick("training")
    for each in batches:
        state, _ = step(state, each, jnp.float32(jnp.inf))
    last = outputs(state.params)
    found = {kind: _rms(first[kind]) for kind in KINDS}
    found |= {f"{kind} update": _rms(last[kind] - first[kind]) for kind in KINDS}
    if isinstance(parts.optimizer.rule, TwoPass):
        moved = outputs(jitted(lambda state: _perturbed(parts, state, batches[0]), parts.mesh, "perturbation")(state))
        found |= {f"{kind} perturbation": _rms(moved[kind] - last[kind]) for kind in KINDS}
    return found


def _outputs(parts: Any, params: Any, batch: dict) -> dict[str, Any]:
    import flax.linen as nn
    import jax.numpy as jnp

    from steppe.lm.model.objective import readout_kernel

    residual = []

    def catch(function: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.name == "final_norm":
            residual.append(args[0])
        return function(*args, **kwargs)

    with nn.intercept_methods(catch):
        hidden_BxTxD = parts.objective.trunk(params, batch)
    kernel_VxD = readout_kernel(params, parts.shape)[: parts.options.vocabulary]
    logits = jnp.einsum("btd,vd->btv", hidden_BxTxD.astype(jnp.float32), kernel_VxD)
    return {"residual": residual[0], "logits": logits}


def _perturbed(parts: Any, state: Any, batch: dict) -> Any:
    """theta + epsilon of the next step, were it on this batch."""
    import jax
    import jax.numpy as jnp

    from steppe.optim.ascent import AscentInput
    from steppe.optim.passes.two_pass import perturbation
    from steppe.optim.rule import plain_gradient

    rule = parts.optimizer.rule
    _, gradient = plain_gradient(parts.objective, state.params, batch)
    moments, stored = rule.moments(state.optimizer, state.params), state.rule[0]
    known = AscentInput(gradient=gradient, params=state.params, moments=moments, state=stored, step=state.step)
    epsilon, _ = perturbation(rule.ascent, known, rule.switches.radius(state.step), rule.switches)
    return jax.tree.map(jnp.add, state.params, epsilon)


def _rms(x: Any) -> float:
    import jax.numpy as jnp

    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))


def slope(sizes: Mapping[int, float]) -> float:
    """The least-squares power of the width with which a quantity grows, of {width: size}; NaN of fewer than two."""
    points = [(math.log(width), math.log(size)) for width, size in sizes.items() if size > 0]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan


def note(frame: Any) -> str:
    """The powers of the width. frame: a row a parametrisation and width, a column a quantity."""
    powers = frame.groupby(level=0, sort=False).agg(lambda sizes: slope(sizes.droplevel(0))).T
    return f"power of the width with which each grows:\n{powers.to_string(float_format='{:+.2f}'.format)}"


def draw(frame: Any) -> Any:
    """A panel a quantity: its size over the width, both parametrisations."""
    from matplotlib.ticker import LogLocator

    rows = math.ceil(len(frame.columns) / 2)
    drawn = plot.figure(7.5, 2.4 * rows)
    panels = drawn.subplots(rows, 2, squeeze=False, sharex=True)
    for axes, quantity in zip(panels.flat, frame, strict=False):
        for form, colour, marker in ((STANDARD, plot.VERMILION, "s"), (MUP, plot.BLUE, "o")):
            sizes = frame.loc[form, quantity].dropna()
            axes.plot(sizes, color=colour, marker=marker, markersize=4, label=f"{form}: width^{slope(sizes):+.2f}")
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes.index, sizes.index.map(str), fontsize=8)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high < 10 * low:  # a flat line is to look flat
            middle = math.sqrt(low * high)
            low, high = middle / 10**0.5, middle * 10**0.5
            axes.set_ylim(low, high)
        # a tick at every decade alone would leave a panel of one decade with one or none
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(quantity, fontsize=10, loc="left")
        axes.legend(fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("width")
    for axes in panels[:, 0]:
        axes.set_ylabel("root mean square")
    return drawn
