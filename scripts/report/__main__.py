"""A sweep as one page: best rho, loss beside AdamW's, cost, fits, and what else was measured; or two runs compared.

    steppe report DIR [RUN ...] [--only=KEY=V,V] [--out=DIR/report]
    steppe report compare RUN_A RUN_B [--out=FILE.html]
    steppe report rivals DIR [--only=KEY=V,V] [--against=NAME] [--out=DIR/report]
    steppe report transfer DIR [--out=DIR/report]
    steppe report pack DIR [RUN ...] --out=FILE.jsonl

DIR is the directory of a sweep, finished or not, or a file that `pack` made; several of them, and workdirs of runs, may
stand there together. OUT takes index.html, which needs nothing beside it, and each figure as PNG with the numbers
behind figures and tables as CSV.
"""

import collections
import contextlib
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.scripts import command
from steppe.scripts.cli import KINDS

PAGE = "index.html"
WRITTEN = "files.json"


class Written(TypedDict, total=False):
    """files.json: {name: hash} of a report's files, so that the next one in its place leaves none of them behind."""

    hashes: dict[str, str]


@command.refusing
def main(argv: Sequence[str]) -> int:
    """Writes a report, or compares two runs; returns the exit status, 2 for bad input."""
    if argv and argv[0] in KINDS["report"]:  # a function of that name in a module of that name
        return getattr(importlib.import_module(f"steppe.scripts.report.{argv[0]}"), argv[0])(argv[1:])
    parser = command.parser("report", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a sweep, or workdirs of runs")
    command.add_only(parser)
    parser.add_argument("--out", type=command.writable_directory, metavar="OUT", help="default: DIR/report")
    options = command.options_of(argv, parser)

    from steppe.scripts import results

    directories = options.directories
    out = results.report_place(directories, options.out)
    found = results.read(directories, options.only)
    name = Path(directories[0]).resolve().stem if len(directories) == 1 else f"{len(found)} runs"
    path = write(found, out, name)
    print(f"wrote {path}")
    return 0


def write(found: list, out: Path, name: str) -> Path:
    """Writes the report of results.read(...) into a directory; returns the path of its page."""
    from steppe.scripts import results
    from steppe.scripts.report import answer as report_answer
    from steppe.scripts.report import drawing as report_drawing
    from steppe.scripts.report import figures as report_figures
    from steppe.scripts.report import measured as report_measured
    from steppe.scripts.report import page as report_page
    from steppe.scripts.report import tables as report_tables
    from steppe.scripts.report.numbers import analysis as an
    from steppe.scripts.report.numbers import entries as report_entries
    from steppe.scripts.report.numbers import groups as report_groups

    found = results.with_averages(found)
    study = report_groups.analyse(found)
    entries = report_entries.entries(study.runs)
    laws = an.power_laws(study)
    scaling, refused = an.scaling_laws(study)
    measured = {source: by_measure for source, by_measure in an.measures(study).items() if by_measure}

    out.mkdir(parents=True, exist_ok=True)
    before, written = _before(out), []
    Section, tables, figures = report_page.Section, report_tables, report_figures

    def add(section, *parts):
        """Tables and figures of a section, each also written beside the page."""
        for part in parts:
            if part is None or not part.rows:
                continue
            stem = f"{part.name}_table" if isinstance(part, tables.Table) else part.name
            files.write(out / f"{stem}.csv", tables.to_csv(part.rows))
            written.append(f"{stem}.csv")
            if isinstance(part, tables.Table):
                section.table(part)
            else:
                section.figure(part, report_drawing.save(part, out))
                written.append(f"{stem}.png")
        return section

    with report_drawing.styled():
        compared, answer = tables.comparison(study), report_answer.answer(entries)
        sections = [
            add(Section("Answer").points(report_answer.sentences(answer)), *report_answer.figures(answer)).points(
                report_answer.lines(answer)
            ),
            add(Section("What it rests on").points(summary(study, compared)), report_answer.power(answer)),
            add(Section("Methods"), report_answer.beside(answer), compared, tables.costs(study)),
            add(Section("Loss against rho"), figures.loss_against_rho(study)),
            add(
                Section("Best rho against size"), figures.best_rho(study, laws), tables.power_laws(study, laws),
                tables.optima(study),
            ),
            add(
                Section("Tokens, compute, time"), figures.differences(study), figures.frontier(study),
                figures.curves(study),
            ),
            add(Section("Scaling law"), figures.scaling(study, scaling), tables.scaling_laws(scaling)).points(
                [f"{name}: no scaling law; {reason}." for name, reason in refused.items()]
            ),
        ]  # fmt: skip
        for source, by_measure in measured.items():
            drawn = an.shown(by_measure)
            parts = [
                report_measured.sharpness(study, source, drawn, part)
                for part in range(math.ceil(len(drawn) / report_measured.PART))
            ]
            if source == "curvature":
                parts.append(report_measured.curvature_over_training(study))
            else:
                parts = [report_measured.kept_against_rho(entries), report_measured.forgetting(answer), *parts]
                parts.append(report_answer.fine_tuning(answer))
            told = tables.sharpness(study, source, by_measure)
            sections.append(add(Section(source.capitalize()), told, *parts))
        sections.append(add(Section("Rank correlations"), tables.correlations(study, measured)))
        sections.append(add(Section("Runs"), tables.runs(study)))
    files.write(out / PAGE, report_page.page(f"Report: {name}", _introduction(study), sections))
    for each in set(before) - set(written):
        _remove(out, each, before[each])
    files.write_json(out / WRITTEN, {"hashes": {each: files.content_hash(out / each) for each in written}})
    return out / PAGE


def _before(out: Path) -> dict[str, str]:
    """{name: hash} of the files of the report that stands there. Only what is still so was written by a report."""
    try:
        return stored.read(out / WRITTEN, Written).get("hashes", {})
    except (FileNotFoundError, DataError):
        return {}


def _remove(out: Path, name: str, content: str) -> None:
    """Removes a file of an earlier report, unless it is none, or another one by now."""
    with contextlib.suppress(OSError, DataError):
        path = files.below(out, name)
        ours = path.parent == out and path.suffix in (".csv", ".png") and not path.is_symlink()
        if ours and files.content_hash(path) == content:
            path.unlink()


def _introduction(study) -> str:
    cells = len(study.cells)
    return (
        f"{len(study.trained)} runs in {cells} {'cell' if cells == 1 else 'cells'} of scale and budget. Losses are "
        "held-out, in nats per token, after the last step. Runs of one seed share initialisation and data order, so "
        "differences are taken seed by seed. An interval is a 95 % confidence interval unless it says otherwise: it "
        "concerns the mean over seeds of this very setting (text, model, schedule), not other settings."
    )


def summary(study, compared) -> list[str]:
    """What the numbers allow to say, as sentences."""
    from steppe.scripts.report.numbers import analysis as report_analysis

    counts = collections.Counter(run.result.status for run in study.trained)
    names = {"unfinished": "missing or unfinished"}
    said = [
        f"{len(study.trained)} runs: "
        + ", ".join(
            f"{counts[status]} {names.get(status, status)}"
            for status in ("finished", "diverged", "failed", "pruned", "unfinished")
            if counts[status]
        )
        + "."
    ]
    if counts["unfinished"]:
        said.append("The sweep is not complete: everything below is of the runs that have ended.")
    rows = [row for row in compared.rows if row["difference_all"].n]
    if not any(run.variant.split(",")[0] == "adamw" for run in study.runs):
        said.append("There is no AdamW run: losses are shown, no differences to it.")
    elif not rows:
        said.append("No method shares a seed with a finished AdamW run yet: there are no differences.")
    if rows and max(row["difference_all"].n for row in rows) < 2:
        said.append("One seed a method: no difference has an interval, and none can be told from seed noise.")
    grids = {row["variant"]: row["tried"] for row in compared.rows if row["tried"] > 1}
    if len(set(grids.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in grids.items())
        said.append(f"Numbers of rho tried differ ({listed}): more of them are more chances to look good by luck.")
    chosen = [row for row in compared.rows if row["selection"] or math.isnan(row["selection"])]
    if chosen:
        known = [row["selection"] for row in chosen if math.isfinite(row["selection"])]
        said.append(
            "Best rho is the best of a grid on the mean over the seeds that every rho has, judged by the same held-out "
            "text as the final loss, which flatters the methods over AdamW on those seeds, "
            + (
                f"by up to {min(known):.4f} to {max(known):.4f} nats if all rho were equally good."
                if known
                else "by an amount unknown with one seed."
            )
        )
    unsteady = report_analysis.unsteadiness(study)
    if unsteady > report_analysis.STEADY:
        said.append(
            f"Seconds a token of runs that do the same work differ by up to a factor of {unsteady:.2g}: the machine "
            "did other things meanwhile, so measured times and their ratios say little; FLOPs are exact."
        )
    branches = sorted({run.result.branch for run in study.runs} - {""})
    if branches:
        count = sum(bool(run.result.branch) for run in study.trained)
        said.append(
            f"{count} runs are branches of others ({', '.join(branches)}): tokens, FLOPs and curves begin with "
            "those of the trunk, which they share."
        )
    return said + study.notes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
