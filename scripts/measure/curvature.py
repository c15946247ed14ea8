"""How trained models bend: spectra of H, GGN and NME, delta split, sharpness, slices.

steppe curvature --workdir=RUN_OR_SWEEP [--workdir=...] [--only=KEY=V,V] [--step=K|all] [--batches=N] [--probes=N] ...

Writes DIR/curvature/STEP.json and its plots beside it. Runs of equal shapes share one compilation. Every number is of
the first held-out set's first batches, at theta, in the run's own loss.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steppe.configs import keys
from steppe.data import files
from steppe.scripts import command, process

SHOWN = {
    "loss": "loss", "lambda_max": "λmax", "ggn_lambda_max": "GGN λmax", "nme_lambda_max": "NME λmax", "trace": "trace",
    "nme_trace": "NME trace", "delta_func_share": "δ_func share", "sam_sharpness": "worst case",
    "functional_sharpness": "functional", "average_sharpness": "average", "critical_sharpness": "critical",
    "noise_scale": "noise scale",
}  # fmt: skip


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Measures, writes and prints; returns the exit status: 1 if a checkpoint was passed over, 2 for bad input."""
    parser = command.parser("curvature", command.headline(__doc__), config=False)
    parser.add_argument(
        "--workdir", required=True, action="append", help="a run, a sweep, or a pattern of them; repeatable"
    )
    command.add_only(parser)
    parser.add_argument("--step", default="last", metavar="K|all", help="checkpoints to measure; default: the newest")
    parser.add_argument(
        "--batches", type=command.integer(1), default=2, metavar="N", help="held-out batches of the run's size"
    )
    parser.add_argument(
        "--probes", type=command.integer(1), default=4, metavar="N", help="random vectors that traces are taken of"
    )
    parser.add_argument(
        "--densities", type=command.integer(1), default=2, metavar="N", help="of which so many run Lanczos"
    )
    parser.add_argument(
        "--lanczos", type=command.integer(2), default=20, metavar="N", help="products of one Lanczos run"
    )
    parser.add_argument(
        "--rho", type=keys.number(above=0), default=0.05, metavar="X", help="radius of the worst case, l2"
    )
    parser.add_argument("--ascent", type=command.integer(), default=5, metavar="N", help="ascent steps after SAM's own")
    parser.add_argument(
        "--noise", type=keys.number(above=0), default=1.0, metavar="X", help="norm of the average case's noise, l2"
    )
    parser.add_argument("--draws", type=command.integer(1), default=6, metavar="N", help="mirrored pairs of noise")
    parser.add_argument(
        "--slices", type=command.integer(), default=7, metavar="N", help="points of a line of the slices; 0: none"
    )
    parser.add_argument(
        "--within",
        action="append",
        default=[],
        type=keys.PATTERN,
        metavar="REGEX",
        help="spectra of these parameters only",
    )
    parser.add_argument(
        "--noise_scale", type=command.integer(), default=16, metavar="N",
        help="held-out batches that the gradient noise scale is taken from; 0: none, else at least 2",
    )  # fmt: skip
    parser.add_argument("--seed", type=command.integer(), default=0, metavar="N", help="of every random vector")
    parser.add_argument("--skip_done", action="store_true", help="leave out checkpoints whose file is there already")
    command.add_weights(parser)
    command.add_trust(parser)
    parser.add_argument(
        "--towards", metavar="RUN", help="also the curvature along the way to this run's model, as fine-tuning made it"
    )
    options = command.options_of(argv, parser)
    if options.densities > options.probes:
        return process.fail(f"--densities={options.densities}: must be at most --probes={options.probes}")
    if options.noise_scale == 1:
        return process.fail("--noise_scale=1: must be 0, or at least 2")
    if options.step not in ("last", "all") and not options.step.isdecimal():
        return process.fail(f"--step={options.step}: must be a number of steps, or all")

    process.ready_to_compute()
    from steppe.lm.keep import mirror
    from steppe.lm.keep.exits import REFUSALS
    from steppe.lm.track.lines import AVERAGES
    from steppe.scripts.measure import curvature_plots

    todo, rows, passed_over, made = checkpoints(options), [], 0, {}
    with Progress(len(todo)) as progress:
        for directory, step in todo:
            try:
                rows.append((directory, step, examine(directory, step, options, made, progress)))
            except REFUSALS as error:
                if len(todo) == 1:
                    raise
                progress.end(f"{directory} step {step} IS PASSED OVER: {error}")
                passed_over = 1
    for directory in dict.fromkeys(directory for directory, _, _ in rows):
        curvature_plots.over_training(directory)
        mirror.add(directory, "curvature" if options.weights is None else AVERAGES)
    print(table(rows))
    for directory, step, summary in rows:
        if "noise_scale" in summary:
            print(f"{Path(directory).resolve().name}:{step}  {regime(summary)}")
    return passed_over


def regime(summary: dict[str, float]) -> str:
    """How a run's batch compares with the gradient noise scale, and what follows."""
    tokens, scale = summary["batch_tokens"], summary["noise_scale"]
    said = f"a batch of {tokens:,.0f} tokens is {tokens / scale:.2g} of the gradient noise scale, {scale:,.0f} tokens"
    follows = "differ little here" if tokens < scale else "can part here"
    return f"{said}: SAM and a functional method {follows}"


def checkpoints(options) -> list[tuple[str, int]]:
    """The (workdir, step) pairs asked for, what has none of them named. WorkdirError where there are none."""
    from steppe.lm.keep import saved
    from steppe.lm.keep.exits import REFUSALS, WorkdirError
    from steppe.scripts import results
    from steppe.scripts.sweep import spec

    once = {place.resolve(): place for _, place in results.places(options.workdir)}
    begun = [place for place in once.values() if (place / "config.json").exists()]
    flats, found, lacking = {}, [], []
    for place in begun:
        try:
            flats[place] = results.config_of(place / "config.json")
        except results.ResultsError as error:
            lacking.append(str(error))
    for place in spec.matching(list(flats), options.only, flats.__getitem__):
        try:
            steps = saved.steps(str(place), options.trust)
        except REFUSALS as error:
            lacking.append(str(error))
            continue
        if options.step.isdecimal():
            wanted = [step for step in steps if step == int(options.step)]
        else:
            wanted = steps if options.step == "all" else steps[-1:]
        found += [(str(place), step) for step in wanted]
        if not wanted:
            have = ", ".join(map(str, steps)) or "none"
            lacking.append(f"{place}: --step={options.step}: must be one of its checkpoints, which are {have}")
    if not found:
        raise WorkdirError(lacking[0] if lacking else f"--workdir={', '.join(options.workdir)}: must hold a run")
    for line in lacking:
        print(f"left out  {line}", flush=True)
    if options.skip_done:
        found = [each for each in found if not path_of(*each, options.weights).exists()]
    return found


def path_of(directory: str, step: int, weights: str | None = None) -> Path:
    """Where the results of a checkpoint stand, of weights by name."""
    from steppe.lm.keep import saved

    return files.below(saved.measured_in(directory, weights), f"curvature/{step}.json")


def examine(directory: str, step: int, options, made: dict, progress: "Progress") -> dict[str, float]:
    """Measures one checkpoint, writes its file and plots, and returns the summary. made: programs by their key."""
    import jax
    import jax.numpy as jnp

    from steppe.data import loader
    from steppe.lm.keep import saved
    from steppe.lm.keep.exits import Unusable, WorkdirError
    from steppe.lm.keep.weights import LAST
    from steppe.lm.measure import sharpness
    from steppe.lm.measure.in_training import named_groups
    from steppe.lm.model.mesh import local_rows, place_batch
    from steppe.optim.ascent import preconditioner
    from steppe.optim.base import BASES
    from steppe.scripts.measure import curvature_plots

    began = time.perf_counter()
    settings = sharpness.Settings(
        **{name: getattr(options, name) for name in sharpness.Settings._fields if name != "within"},
        within=tuple(options.within),
    )
    progress.begin(f"{directory} step {step}", len(sharpness.stages(settings)))
    run = saved.load(
        directory, step, log=lambda line: None, optimizer=True, weights=options.weights, trust=options.trust
    )
    if jax.tree.reduce(lambda bad, leaf: bad or not bool(jnp.all(jnp.isfinite(leaf))), run.params, False):
        raise Unusable(f"{directory}: the checkpoint of step {step} holds parameters that are not finite")
    name, size = next(iter(run.corpus.held_out)), run.config.train.batch_size
    most = loader.held_out_steps(run.corpus, name, size)
    batches, parts = min(options.batches, most), min(options.noise_scale, most)
    settings = settings._replace(noise_scale=parts if parts > 1 else 0)

    def placed(count):
        rows = loader.held_out_rows(run.corpus, name, 0, count * size)
        rows.pop("bytes")
        return place_batch(run.parts.mesh, count * size, local_rows(run.parts.mesh, count * size), rows)

    batch = placed(batches)

    scale = None
    if "second" in BASES[run.parts.optimizer.base.name].moments:
        moments = run.parts.optimizer.base.moments(run.optimizer, run.params)
        scale = preconditioner(moments.second, moments.count == 0)
    key = sharpness.compile_key(run.parts, batches, settings)
    if key not in made:
        try:
            made[key] = sharpness.programs(run.parts, batches, settings)
        except ValueError as error:
            raise WorkdirError(f"--within={','.join(options.within)}: {error}") from None
    groups = named_groups(run.config.curvature.groups)
    summary, details = sharpness.measure(
        made[key],
        run.params,
        batch,
        groups,
        settings,
        scale,
        next_step=_next_step(run, step) if run.weights == LAST else None,
        towards=_other(options.towards, run, options.trust) if options.towards else None,
        noisy=placed(settings.noise_scale) if settings.noise_scale else None,
        tick=progress.tick,
    )
    found = {
        "summary": summary,
        "step": step,
        "weights": run.weights,
        "held_out": name,
        "tokens": int(jnp.sum(batch["weights"] > 0)),
        "settings": {**settings._asdict(), "batches": batches, "devices": run.parts.mesh.size},
        "seconds": time.perf_counter() - began,
        **details,
    }
    path = path_of(directory, step, options.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found, digits=6)
    curvature_plots.of_checkpoint(path)
    progress.end(f"{path}  {found['seconds']:.1f} s")
    return summary


def _next_step(run, step: int):
    """gradient -> (update, learning rate): what the run's base would do with it after so many steps."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from steppe.lm.measure.in_training import next_step
    from steppe.lm.parts.state import State

    state = State(jnp.int32(step), run.params, run.optimizer, rule=(), averages={})
    taken = jax.jit(partial(next_step, run.parts.optimizer))
    return lambda gradient: jax.block_until_ready(taken(gradient, state))


def _other(directory: str, run, trust: bool):
    """The parameters of another run of the same model."""
    import jax

    from steppe.lm.keep import saved
    from steppe.lm.keep.exits import WorkdirError

    other = saved.load(directory, log=lambda line: None, trust=trust).params
    shapes = [jax.tree.map(lambda leaf: leaf.shape, params) for params in (other, run.params)]
    if shapes[0] != shapes[1]:
        raise WorkdirError(f"--towards={directory}: must be a run of the same model")
    return other


def table(rows: list[tuple[str, int, dict[str, float]]]) -> str:
    """One line per checkpoint."""
    names = [f"{Path(directory).resolve().name}:{step}" for directory, step, _ in rows]
    width = max([10, *map(len, names)])
    wide = {key: max(8, len(title)) + 2 for key, title in SHOWN.items()}
    lines = [f"{'run:step':<{width}}" + "".join(f"{title:>{wide[key]}}" for key, title in SHOWN.items())]
    for name, (_, _, summary) in zip(names, rows, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{summary.get(key, math.nan):>{wide[key]}.4g}" for key in SHOWN))
    return "\n".join(lines)


class Progress:
    """Stages on a terminal as a live bar, elsewhere one line per checkpoint, both on standard error."""

    def __init__(self, total: int):
        self._total, self._done, self._bar, self._task = total, 0, None, None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.BarColumn(bar_width=16), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, stages: int) -> None:
        """A checkpoint of so many stages is next."""
        self._name = f"[{self._done + 1}/{self._total}] {name}"
        if self._bar is not None:
            self._task = self._bar.add_task(f"{self._name}  loading", total=stages)

    def tick(self, stage: str) -> None:
        """A stage begins."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{self._name}  {stage}")

    def end(self, text: str) -> None:
        """The checkpoint is done."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.console.print(f"[{self._done}/{self._total}] {text}", markup=False, highlight=False)
        else:
            print(f"[{self._done}/{self._total}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
