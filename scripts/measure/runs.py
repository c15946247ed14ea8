"""Measured runs side by side: of the same text, those that differ only in their seed as one.

This is an experiment over runs and no measurement of one: it takes the numbers of all of them, those of commands before
too, and their configs, of which lm knows nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.configs.read import UsageError
from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm import plot
from steppe.scripts import process, results


def known(asked: Any, targets: Sequence[Any]) -> dict[Path, dict]:
    """What the files of targets have of these checkpoints, measured with these settings."""
    found, settings = {}, files.plain(asked.settings._asdict())
    for target in targets:
        try:
            record = stored.read(target.path, asked.measurement.Record)
        except (FileNotFoundError, DataError):
            continue
        had = {key: value for key, value in record["settings"].items() if key != "devices"}  # up to the order of sums
        if (had, record["step"]) == (settings, target.step):
            found[target.path] = record
    return found


def check(asked: Any, targets: Sequence[Any], found: Mapping[Path, dict], log: Callable[[str], None]) -> None:
    """Refuses before anything is measured what cannot be: runs of other text, batches that no device can share."""
    import jax

    from steppe.lm.keep import saved
    from steppe.lm.keep.workdir import config_of

    first, trust = None, asked.options.trust
    for target in targets:
        if target.path in found:
            texts = asked.measurement.texts_of(found[target.path])
        else:
            config = config_of(target.directory)
            corpus = saved.corpus_of(target.directory, config, log, trust)
            devices = len(jax.devices()) if saved.spreads(config) else 1
            data = saved.own_data(config, corpus, trust)
            texts = asked.measurement.texts(config, data, corpus, asked.settings, devices=devices, log=log)
        first = first or texts
        if texts != first:
            raise UsageError(
                f"--workdir = {target.directory}: must be of the same text, vocabulary and sequence length as the "
                f"first (corpora {', '.join(map(str, texts))} here, {', '.join(map(str, first))} there)"
            )


def conclude(asked: Any, targets: Sequence[Any], measured: Mapping[Path, dict]) -> None:
    """Compares, writes what that adds to the files of the runs, and prints and draws the comparison."""
    from steppe.lm.keep import mirror

    measurement, found = asked.measurement, {target.name: measured[target.path] for target in targets}
    measurement.compare(found)
    for target in targets:
        files.write_json(target.path, found[target.name])
    labels = labels_of({target.name: {**target.config, "weights": target.weights} for target in targets})
    frame = measurement.frame(found)
    named = frame.set_axis([f"{target.name}:{target.step}" for target in targets])
    process.say(tables(named.rename(columns=measurement.title), list(labels.values())))
    process.say(measurement.note_runs(found))
    out = asked.options.out or (targets[0].path.parent if len(targets) == 1 else None)
    if out is None:
        process.say("--out=DIR writes this table and its plots")
        return
    out.mkdir(parents=True, exist_ok=True)
    sheet, picture = (out / f"{asked.name}.{kind}" for kind in ("csv", "png"))
    frame.insert(0, "step", [target.step for target in targets])
    files.write(sheet, frame.to_csv(index_label="run"))
    with plot.styled():
        plot.save(measurement.draw_runs(found, labels), picture, dpi=160)
    process.say(f"wrote {sheet} and {picture}")
    mirror.add(out, sheet.name, picture.name)


def labels_of(configs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """{run: its group}: one of runs whose flat configs differ in the seed alone, labelled by what differs between."""
    keys = [key for key in results.varying_keys(list(configs.values())) if key != "seed"]
    labels = {}
    for name, flat in configs.items():
        shown = [
            f"{key.split('.')[-1]} {flat[key]}".removeprefix("method ") for key in keys if flat.get(key) is not None
        ]
        labels[name] = ", ".join(shown) or (name if len(configs) == 1 else "all")
    return labels


def tables(frame: Any, labels: Sequence[str]) -> str:
    """A line a run, then, where some group has several, one a group: mean and standard error over its seeds."""
    shown = frame.to_string(float_format="{:.5f}".format, na_rep="-")
    grouped = frame.groupby(list(labels), sort=False)
    if len(grouped) == len(frame):
        return f"{shown}\n"
    means = grouped.mean().map(lambda mean: f"{mean:.5f}" if mean == mean else "-")
    means += grouped.sem().map(lambda error: f" ±{error:.5f}" if error == error else "")
    means.index = [f"{label} ({runs})" for label, runs in grouped.size().items()]
    return f"{shown}\n\nmeans and standard errors over runs that differ in their seed alone\n{means.to_string()}\n"
