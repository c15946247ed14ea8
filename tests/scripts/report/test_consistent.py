"""Every number of one entry against one reference is the same wherever a report has it, whatever was run."""

import itertools
import math

import numpy as np
import pytest

from helpers.report_runs import plan, write_sweep
from steppe.scripts import results
from steppe.scripts.report import rivals, tables
from steppe.scripts.report.numbers import analysis, differences, entries

RATES, RHOS, SEEDS = (0.01, 0.02), (0.03, 0.1), (0, 1, 2, 3)
KINDS = [("adamw", "adamw"), ("adamw", "nadamw"), ("sam", "adamw"), ("msam", "nadamw"), ("msam", "adamw")]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """One finished run, of which others are made."""
    directory = tmp_path_factory.mktemp("consistent")
    name, overrides = plan("adamw")
    write_sweep(directory, {name: (overrides, 2.0)})
    return results.read(directory)[0]


def runs(number):
    """{settings: (loss, its average's, what rounding adds, how it ends)}, random and not complete: of each kind a grid
    at seed 0, some of its settings at more seeds."""
    random, found = np.random.default_rng(number), {}
    for method, base in [KINDS[0], *(kind for kind in KINDS if random.random() < 0.6)]:
        for steps, schedule in ((1000, "cosine"), (1000, "wsd"), (2000, "cosine")):
            if random.random() < (0.9 if (method, steps, schedule) == ("adamw", 1000, "cosine") else 0.4):
                for rate, rho in itertools.product(RATES, (None,) if method == "adamw" else RHOS):
                    for seed in SEEDS if random.random() < 0.5 else SEEDS[:1]:
                        if random.random() < 0.9:
                            drawn = (*random.uniform(1.5, 3.0, 2), random.random(), random.integers(20))
                            found[method, base, rho, rate, seed, steps, schedule] = drawn
    return found


def made(template, given):
    """Results of `runs`: most with an average of their weights, a few diverged."""
    found = []
    for (method, base, rho, rate, seed, steps, schedule), (loss, averaged, kept, fate) in given.items():
        config = template.config | {
            "optim.method": method, "optim.base": base, "optim.rho": rho, "optim.peak_learning_rate": rate,
            "optim.schedule": schedule, "seed": seed, "train.duration": f"{steps} steps",
        }  # fmt: skip
        cost = steps / 1000 * (2 if method == "sam" else 1)
        points = ((steps // 2, loss + 1), (steps, loss))
        whole = template._replace(
            config=config, loss=loss, steps=steps, tokens=1024 * steps, flops=cost * template.flops,
            adamw_flops=steps / 1000 * template.adamw_flops, status="diverged" if fate == 19 else "finished",
            curve=[results.Point(step, 1024 * step, float(step), float(step), at) for step, at in points],
            retention={"int4_channel": kept},
        )  # fmt: skip
        found.append(whole)
        if fate % 4:
            curve = [point._replace(loss=point.loss + averaged - loss) for point in whole.curve]
            found.append(whole._replace(weights="ema", loss=averaged, curve=curve))
    varied = results.varying_keys([result.config for result in found])
    return [result._replace(varied={key: result.config[key] for key in varied}) for result in found]


@pytest.mark.parametrize("number", range(12))
def test_an_entry_and_its_reference_have_one_difference(template, number):
    study = entries.analyse(made(template, runs(number)))
    answered = differences.answer(study.entries)
    expected = {
        (entry.cell, entry.name): (way.interval.value, way.interval.low, way.interval.high, way.interval.n)
        for entry in study.entries if (way := entries.difference(entry, entry.tokens))
    }  # fmt: skip
    for entry in study.entries:  # one reference an entry, of its scale and budget, its average and with a seed of it
        assert entry.tokens is None or entry.tokens in study.entries
        if (entry.cell, entry.name) in expected:
            assert (entry.tokens.cell, entry.tokens.adamw) == (entry.cell, True)
            averaged = entry.tokens.weights == entry.weights
            assert averaged or entry.adamw or not any(
                each.adamw and each.weights and set(each.best.index) & set(entry.best.index)
                for each in study.entries if each.cell == entry.cell
            )  # fmt: skip

    def same(source, label, row, keys):
        shown = tuple(row[key] for key in keys)
        assert shown == pytest.approx(expected[label], nan_ok=True), (source, label)

    compared = analysis.comparison(study)
    compared["label"] = list(zip(compared["scale"] + ", " + compared["budget"], compared["variant"], strict=True))
    assert {row["label"] for _, row in compared.iterrows() if row["difference_n"]} == set(expected)
    for _, row in compared[compared["difference_n"] > 0].iterrows():
        same("comparison", row["label"], row, ("difference", "difference_low", "difference_high", "difference_n"))
        if row["difference_n"] > 1:
            assert row["difference_pooled"] == pytest.approx(row["difference"])
    on_the_way = analysis.on_the_way(study)
    for _, row in on_the_way[on_the_way["share"] == 1].iterrows() if len(on_the_way) else ():
        label = (row["cell"], row["variant"])
        same("on the way", label, row, ("difference", "difference_low", "difference_high", "difference_n"))
    table, shown = tables.against_adamw(answered).frame, differences.shown(answered)
    for _, row in table[table["basis"] == entries.BASES["tokens"]].iterrows() if len(table) else ():
        if (row["group"], row["entry"]) in expected:  # not AdamW on more tokens
            same("against_adamw", (row["group"], row["entry"]), row, ("loss", "loss_low", "loss_high", "loss_n"))
    columns = tables.of("answer", shown).columns if len(answered.rows) else ()
    for row in shown.to_dict("records"):
        if label := expected.get((row["group"], row["entry"])):
            assert columns[1].header == "held-out loss, at equal tokens"
            assert columns[1].of(row).startswith(f"{label[0]:.4f} (n ".replace("-", "−"))
    kept = differences.kept_against_rho(study.entries)
    best = {(entry.cell, entry.name): entry.chosen("rho") for entry in study.entries}
    for _, row in kept[kept["aspect"] == "held-out loss"].iterrows() if len(kept) else ():
        label = (row["cell"], row["entry"])
        if best[label] == row["rho"]:
            same("against rho", label, row, ("less_adamw", "low", "high", "pairs"))
    for reference in {entry.tokens for entry in study.entries if entry.tokens}:
        rows = rivals.table(study.entries, reference).set_index("entry")
        for entry in study.entries:
            if entry.tokens is reference and (entry.cell, entry.name) in expected and entry.name in rows.index:
                alike = [each for each in study.entries if each.name == entry.name]
                if len(alike) == 1:
                    value = rows.loc[entry.name, f"less {reference.name}"]
                    assert value == f"{expected[entry.cell, entry.name][0]:+.4f}"


def test_losses_of_one_entry_are_one_number(template):
    """Where a panel, a table and the answer show the loss of AdamW at its best, it is at one rate."""
    given = {("adamw", "adamw", None, rate, seed, 1000, "cosine"): (loss, loss, 0.0, 0)
             for rate, loss in ((0.01, 2.5), (0.02, 2.4)) for seed in SEEDS}  # fmt: skip
    given |= {("sam", "adamw", rho, 0.01, seed, 1000, "cosine"): (2.3, 2.3, 0.0, 0) for rho in RHOS for seed in SEEDS}
    study = entries.analyse(made(template, given))
    compared = analysis.comparison(study).set_index("variant")
    assert compared["loss"]["adamw"] == pytest.approx(2.4)
    frontier, curves = analysis.frontier(study).set_index("variant"), analysis.curves(study)
    assert frontier["loss"]["adamw"] == pytest.approx(2.4)
    last = curves[(curves["variant"] == "adamw") & (curves["share"] == 1)]
    assert list(last["loss"]) == pytest.approx([2.4])
    over_rho = analysis.loss_against_rho(study)
    assert over_rho.loc[over_rho["variant"] == "adamw", "loss"].mean() == pytest.approx(2.4)
    table = tables.against_adamw(differences.answer(study.entries)).frame.set_index("basis")
    assert table["loss"][differences.ITSELF] == pytest.approx(2.4)
    assert math.isclose(compared["difference"]["sam"], -0.1)
