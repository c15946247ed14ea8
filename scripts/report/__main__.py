"""Draw a sweep as one page: best rho, loss against AdamW's, cost, fits and measurements; or compare two runs.

    steppe report DIR [RUN ...] [--only=KEY=V,V] [--out=DIR/report]
    steppe report compare RUN_A RUN_B [--out=FILE.html]
    steppe report rivals DIR [--only=KEY=V,V] [--against=NAME] [--out=DIR/report]
    steppe report transfer DIR [--out=DIR/report]
    steppe report pack DIR [RUN ...] --out=FILE.jsonl

DIR is the directory of a sweep, finished or not, or a file that `pack` made. Several of them, and workdirs of runs, may
be given together. The command writes index.html, one file, to OUT. It also writes each figure as PNG and the numbers of
figures and tables as CSV.
"""

import contextlib
import importlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm.keep.exits import STATUSES
from steppe.scripts import command, process
from steppe.scripts.cli import KINDS

PAGE = "index.html"
WRITTEN = "files.json"  # {name: hash} of a report's files, so that the next one in its place leaves none behind
MANY = 50  # runs of which a report draws long enough for a second process
SHARED = ("optim.peak_learning_rate", "optim.schedule", "optim.weight_decay")  # keys of AdamW too


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Writes a report, or compares two runs; returns the exit status, 2 for bad input."""
    if argv and argv[0] in KINDS["report"]:  # a function of that name in a module of that name
        return getattr(importlib.import_module(f"steppe.scripts.report.{argv[0]}"), argv[0])(argv[1:])
    parser = command.parser("report", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a sweep, or workdirs of runs")
    command.add_only(parser)
    parser.add_argument("--out", type=command.writable_directory, metavar="OUT", help="default: DIR/report")
    options = command.options_of(argv, parser)

    import pandas as pd

    from steppe.scripts import results
    from steppe.scripts.report import drawing

    directories = options.directories
    out = results.report_place(directories, options.out)
    with pd.option_context("mode.string_storage", "python"):  # Arrow's are slow in frames of a few hundred rows
        found = results.read(directories, options.only)
        name = ", ".join(map(_called, directories[:3])) + ", …" * (len(directories) > 3)
        with drawing.saving(len(found) >= MANY) as save:
            path = write(found, out, name, _adding(directories), save)
    process.say(f"wrote {path}")
    return 0


def write(found: list, out: Path, name: str, add_adamw: str, save: Callable) -> Path:
    """Writes the report of results.read(...) into a directory; returns the path of its page."""
    from steppe.scripts import results, style
    from steppe.scripts.report import answer, drawing, figures, page, tables
    from steppe.scripts.report.numbers import analysis as an
    from steppe.scripts.report.numbers import differences, entries

    study = entries.analyse(results.with_averages(found))
    made, compared = differences.answer(study.entries), an.comparison(study)
    optima, (scaled, refused), measures = an.best_rho(study), an.scaling_laws(study), an.measures(study)
    laws, steady = an.power_laws(optima), an.unsteadiness(study) <= an.STEADY

    introduction = (
        f"{len(study.trained)} runs in {len(study.cells)} cell{'s' * (len(study.cells) != 1)} of scale and budget. "
        "Losses are held-out, nats per token, after the last step. Intervals are of 95 %, for this text, model and "
        "schedule."
    )

    out.mkdir(parents=True, exist_ok=True)
    before, written = _before(out), []

    def add(section, *parts, folded=True):
        """Tables and figures of a section, each also written to a file next to the page."""
        for part in parts:
            if part is None or not len(part.frame):
                continue
            is_table = isinstance(part, tables.Table)
            stem = f"{part.name}_table" if is_table else part.name
            files.write(out / f"{stem}.csv", tables.to_csv(part.frame))
            written.append(f"{stem}.csv")
            if is_table:
                section.table(part, folded)
            elif part.figure is not None:
                section.figure(part, save(part, out), folded)
                written.append(f"{stem}.png")
        return section

    with drawing.styled():
        first, *rest = answer.figures(made) or [None]
        shown = first.frame["entry"] if first else []
        styles = style.of_variants(dict.fromkeys(["adamw", *shown, *an.variants(study), *made.rows.get("name", ())]))
        opening = page.Section("Answer").text(*answer.sentences(made), kind="answer")
        if len(made.rows):
            opening.text(
                f"Better: by a 95 % interval without zero, of paired seeds at {made.first}, which has most of them. "
                "Kept: of fine-tuning and of rounded weights.", kind="caption",
            )  # fmt: skip
        if not any(entry.adamw for entry in study.entries):
            opening.text("There is no AdamW among these runs, so nothing is compared. This command adds it:").code(
                add_adamw
            )
        sections = [
            add(add(opening, first, tables.of("answer", differences.shown(made)), folded=False), *rest),
            add(
                page.Section("Basis").points(summary(study, compared)),
                tables.of("counts", differences.in_words(differences.counts(made))),
                tables.of("power", differences.power(made)),
            ),
            add(
                page.Section("Methods"), tables.against_adamw(made), tables.of("comparison", compared),
                tables.of("cost", an.costs(compared, study.names)),
            ),
            add(
                page.Section("Radius"), figures.loss_against_rho(an.loss_against_rho(study), styles),
                figures.best_rho(optima, laws, study.names), tables.of("power_law", an.laws_table(optima, laws)),
                tables.of("best_rho", an.optima_table(optima, study.names)),
            ),
            add(
                page.Section("Tokens, compute, time"), figures.differences(an.on_the_way(study), styles),
                figures.frontier(an.frontier(study), styles, steady), figures.curves(an.curves(study), styles, steady),
                figures.scaling(an.scaling(study, scaled)), tables.of("scaling_law", an.scaling_table(scaled)),
            ).points([f"{name}: no scaling law; {reason}." for name, reason in refused.items()]),
        ]  # fmt: skip
        for source, own in measures.groupby("source", observed=True):
            parts = figures.sharpness(source, own, styles)
            if source == "curvature":
                parts = [*parts, figures.curvature_over_training(an.over_training(study), styles)]
            elif source == "retention":
                kept, costs = differences.kept_against_rho(study.entries), differences.forgetting(made)
                kept, costs = figures.kept_against_rho(kept, styles), figures.forgetting(costs, styles)
                parts = [kept, costs, *parts, tables.fine_tuning(made)]
            sections.append(add(page.Section(source.capitalize()), tables.sharpness(source, own), *parts))
        correlated = tables.of("rank_correlation", an.correlations(measures))
        sections.append(add(page.Section("Runs"), correlated, tables.of("runs", an.runs(study))))
    files.write(out / PAGE, page.page(f"{name}: report", introduction, sections))
    for each in set(before) - set(written):
        _remove(out, each, before[each])
    files.write_json(out / WRITTEN, {"hashes": {each: files.content_hash(out / each) for each in written}})
    return out / PAGE


def _before(out: Path) -> dict[str, str]:
    """{name: hash} of the files of the report that stands there. Only what is still so was written by a report."""
    try:
        return stored.read(out / WRITTEN, dict[str, dict[str, str]]).get("hashes", {})
    except (FileNotFoundError, DataError):
        return {}


def _remove(out: Path, name: str, content: str) -> None:
    """Removes a file of an earlier report, unless it is none, or another one by now."""
    with contextlib.suppress(OSError, DataError):
        path = files.below(out, name)
        ours = path.parent == out and path.suffix in (".csv", ".png") and not path.is_symlink()
        if ours and files.content_hash(path) == content:
            path.unlink()


def _called(directory: str) -> str:
    """The name of a sweep; of a pack that has none, its folder's."""
    path = Path(directory).resolve()
    return path.parent.name if path.stem == "runs" else path.stem


def _adding(directories: Sequence[str]) -> str:
    """The command that adds AdamW to a sweep: on each seed, model, text, length and rate of its runs."""
    import pandas as pd

    from steppe.scripts import results

    packed = len(directories) > 1 or results.is_pack(directories[0])
    sweep = {} if packed else results.read_sweep(Path(directories[0]))
    if not sweep:
        return "steppe sweep --config=FILE --out=DIR --grid optim.method=adamw --grid seed=0,1,2"
    runs = [{**sweep["base"], **own} for own in sweep["resolved"].values()]
    ours = [key for key in results.varying_keys(runs) if not key.startswith("optim.") or key in SHARED]
    each = pd.DataFrame([[f"{run[key]}" for key in ours] for run in runs], columns=ours).drop_duplicates()
    values = [f"--zip {shlex.quote(key + '=' + ','.join(each[key]))}" for key in ours]
    words = ["steppe sweep", f"--config={sweep['config']}", f"--out={directories[0]}", "--grid optim.method=adamw"]
    return " ".join([*words, *values])


def summary(study, compared) -> list[str]:
    """The basis of the numbers, as sentences."""
    from steppe.scripts.report.numbers import analysis as an

    counts = study.trained["status"].value_counts()
    words = {status: status for status in STATUSES} | {"unfinished": "missing or unfinished"}
    listed = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts.get(status))
    pairs = compared["difference_n"].max() if len(compared) else 0
    several = compared[(compared["tried"] > 1) & compared["variant"].isin(study.names)] if len(compared) else compared
    tried = several.groupby("variant", sort=False)["tried"].last() if len(several) else {}
    grids = ", ".join(f"{name} {count}" for name, count in tried.items())
    chosen = compared.loc[compared["selection"] != 0, "selection"] if len(compared) else compared
    known = chosen.dropna()
    flattery = (
        f"up to {known.min():.4f} to {known.max():.4f} nats if all rho were equally good" if len(known)
        else "an amount unknown with one seed"
    )  # fmt: skip
    unsteady, adamw = an.unsteadiness(study), any(entry.adamw for entry in study.entries)
    branches = [result.branch for result in study.trained["result"] if result.branch]
    said = {
        f"{len(study.trained)} runs: {listed}.": True,
        "The sweep is not complete: everything below is of the runs that have ended.": counts.get("unfinished"),
        "There is no AdamW run: losses are shown, no differences to it.": not adamw,
        "No method shares a seed with a finished AdamW run yet: there are no differences.": adamw and not pairs,
        "One seed a method: no difference has an interval, and none can be told from seed noise.": pairs == 1,
        f"Numbers of rho tried differ ({grids}): more of them are more chances to look good by luck.":
            len(set(tried)) > 1,
        "Best rho is the best of a grid on the mean over the seeds that every rho has, judged by the same held-out "
        f"text as the final loss, which flatters the methods over AdamW on those seeds, by {flattery}.": len(chosen),
        f"Seconds a token of runs that do the same work differ by up to a factor of {unsteady:.2g}: the machine did "
        "other things meanwhile, so measured times and their ratios say little; FLOPs are exact.":
            unsteady > an.STEADY,
        f"{len(branches)} runs are branches of others ({', '.join(sorted(set(branches)))}): tokens, FLOPs and curves "
        "begin with those of the trunk, which they share.": branches,
    }  # fmt: skip
    return [text for text, holds in said.items() if holds] + regimes(study.trained["result"]) + study.notes


def regimes(found) -> list[str]:
    """How each batch compares with the gradient noise scale, by the median of the runs in which both were measured."""
    from statistics import median

    from steppe.lm.measure.curvature import note

    scales = {}
    for newest in (run.curvature[-1] for run in found if run.curvature and "noise_scale" in run.curvature[-1]):
        scales.setdefault(newest["batch_tokens"], []).append(newest["noise_scale"])
    return [
        f"Noise of the gradient: {note({'batch_tokens': tokens, 'noise_scale': median(own)})} (newest checkpoints of "
        f"{len(own)} runs)."
        for tokens, own in scales.items()
    ]
