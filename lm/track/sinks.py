"""Followers of metrics.jsonl: wandb and TensorBoard. Their content is a function of that file.

Every start and rollback rebuilds them from it, so a kill leaves no gaps and no steps that are not the run's. If one
fails, a note says so once and the run continues without it. Each has row(row), for rows in the file's order from the
first on, facts(values) of the run, and close(good).
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from steppe.data import files, stored
from steppe.lm.track.goodput import share
from steppe.lm.track.lines import METRICS, records

_AXES = ("tokens", "seconds", "tokens_per_second", "mfu")  # of a step, to draw other values over
_PLACES = {"evaluate": "held_out", "average": "held_out", "choices": "choices"}


class Row(NamedTuple):
    """A record's numbers by "group/name". axes: values to draw them over; own: whether the record has them itself."""

    step: int
    values: dict[str, Any]
    axes: dict[str, Any]
    own: bool
    elapsed: float  # seconds of all the run's starts so far


class Rows:
    """Converts records to rows, in the order of metrics.jsonl."""

    def __init__(self):
        self._axes = {"tokens": 0, "seconds": 0.0}
        self._before = 0.0

    def of(self, record: dict[str, Any]) -> Row | None:
        """The row of a record; None if the record has none."""
        values = {key: value for key, value in record.items() if key not in ("kind", "step", "name", "weights")}
        kind, axes = record["kind"], self._axes
        if kind == "train":
            axes = {name: values.pop(name) for name in _AXES if name in values}
            last, self._axes = self._axes, {name: axes.get(name, before) for name, before in self._axes.items()}
            if self._axes["seconds"] < last["seconds"]:  # another start, whose clock began at 0
                self._before += last["seconds"]
            values = {f"train/{name}": value for name, value in values.items()}
        elif kind in _PLACES:
            place = "/".join(filter(None, (_PLACES[kind], record["name"], record.get("weights", ""))))
            values = {f"{place}/{name}": value for name, value in values.items()}
        elif kind == "goodput":
            spent = record["goodput"]
            values = {"goodput": share(spent), **{f"goodput/{each}": seconds for each, seconds in spent.items()}}
        else:
            return None
        return Row(record["step"], values, axes, kind == "train", self._before + self._axes["seconds"])


class Wandb:
    """A wandb run, continued by a resumed run. workdir: its directory; id: of the wandb run.

    Offline, its directories are rebuilt, except those already synchronised. Online, rows that wandb has are not sent
    again; if it has rows that metrics.jsonl has lost, another wandb run starts, because wandb cannot delete rows.
    """

    def __init__(self, workdir: Path, config: ConfigDict, id: str):
        import wandb

        log = config.log
        offline = log.wandb == "offline"
        for old in workdir.glob(f"wandb/offline-run-*-{id}") if offline else ():
            if old.is_dir() and not old.is_symlink() and not any(old.glob("*.synced")):
                # wandb's own process outlives a killed run for a while and may still write there
                gone = old.rename(old.with_name(f"removed-{uuid.uuid4().hex[:8]}"))
                shutil.rmtree(gone, ignore_errors=True)
        self._run = wandb.init(
            mode=log.wandb,
            project=log.project,
            group=log.group or None,
            name=log.name or workdir.resolve().name,
            tags=list(log.tags) or None,
            id=id,
            resume="allow",
            dir=workdir,
            config=config.to_dict(),
            # wandb's capture of the terminal conflicts with the live line; an outage must not delay a run for long
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, login_timeout=30, finish_timeout=60),
        )
        # steps as a metric, because wandb's own counter counts rows
        self._run.define_metric("*", step_metric="step")
        for axis in ("tokens", "seconds"):
            self._run.define_metric(axis, step_metric="step")
        self.ahead = 0 if offline else self._run.step  # rows that wandb has and that have not been replayed

    def row(self, row: Row) -> None:
        if self.ahead:
            self.ahead -= 1
        else:
            self._run.log({"step": row.step, **row.axes, **row.values})

    def facts(self, values: dict[str, Any]) -> None:
        self._run.config.update({"run": values}, allow_val_change=True)

    def close(self, good: bool) -> None:
        import wandb

        self._run.finish(exit_code=0 if good else 1)
        wandb.teardown()  # otherwise its service takes an earlier id for one in use


class TensorBoard:
    """The event file in WORKDIR/tensorboard. Its times are the run's, counted from when the run began."""

    def __init__(self, workdir: Path):
        from tensorboardX import SummaryWriter

        begun, folder = workdir / "run_id", workdir / "tensorboard"
        self._begin = begun.stat().st_mtime if begun.exists() else time.time()
        for old in folder.glob("events.out.tfevents.*"):
            if old.is_file() and not old.is_symlink():
                old.unlink()
        # purge_step makes a running TensorBoard forget the previous file
        self._writer = SummaryWriter(str(folder), purge_step=0)

    def row(self, row: Row) -> None:
        from tensorboardX.proto import summary_pb2
        from tensorboardX.summary import scalar

        messages: Any = summary_pb2  # its classes are created at import, so type checkers do not see them
        shown = {**row.values, **(row.axes if row.own else {})}
        numbers = {name: value for name, value in shown.items() if isinstance(value, int | float)}
        summary = messages.Summary(value=[scalar(name, value).value[0] for name, value in numbers.items()])
        file: Any = self._writer.file_writer
        file.add_summary(summary, row.step, self._begin + row.elapsed)

    def facts(self, values: dict[str, Any]) -> None:
        self._writer.add_text("run", f"```json\n{json.dumps(values, indent=1, default=str)}\n```", 0)

    def close(self, good: bool) -> None:
        self._writer.close()


class Sinks:
    """The sinks that config.log asks for, filled from metrics.jsonl. note(line): prints a line for the user.

    wandb_id: of a checkpoint, or ""; afterwards of the present wandb run, if there is one.
    """

    def __init__(self, workdir: Path, config: ConfigDict, *, wandb_id: str, note: Callable[[str], None]):
        self._workdir, self._config, self._note, self._facts = workdir, config, note, None
        asked = {Wandb: config.log.wandb != "disabled", TensorBoard: config.log.tensorboard}
        self.wandb_id = _id(workdir, wandb_id) if asked[Wandb] else wandb_id
        self._open([kind for kind in asked if asked[kind]])
        if any(isinstance(sink, Wandb) and sink.ahead for sink in self._sinks):
            self.again()

    def _open(self, kinds: Iterable[Any]) -> None:
        self._sinks: list[Wandb | TensorBoard] = []
        self._rows = Rows()
        for kind in kinds:
            try:
                given = {Wandb: (self._config, self.wandb_id), TensorBoard: ()}[kind]
                self._sinks.append(kind(self._workdir, *given))
            except Exception as error:
                self._failed(kind, error)
        for record in records(self._workdir / METRICS) if self._sinks else ():
            self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        """Sends the numbers of a record that was just added to metrics.jsonl."""
        if self._sinks and (row := self._rows.of(record)):
            self._each(lambda sink: sink.row(row))

    def facts(self, values: dict[str, Any]) -> None:
        """Sends the run's facts."""
        self._facts = values
        self._each(lambda sink: sink.facts(values))

    def again(self) -> None:
        """Rebuilds the sinks after metrics.jsonl was truncated."""
        self.close(True)
        kinds = list(map(type, self._sinks))
        if Wandb in kinds and self._config.log.wandb == "online":
            self.wandb_id = uuid.uuid4().hex[:8]
            files.write(self._workdir / "wandb_id", self.wandb_id + "\n")
            self._note(f"wandb       continues as run {self.wandb_id}, because wandb cannot delete the old run's rows")
        self._open(kinds)
        if self._facts is not None:
            self.facts(self._facts)

    def close(self, good: bool) -> None:
        """Closes all; good: whether the run did not fail."""
        self._each(lambda sink: sink.close(good))

    def _each(self, call: Callable[[Wandb | TensorBoard], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self._failed(type(sink), error)

    def _failed(self, kind: type, error: Exception) -> None:
        reason, name = " ".join(f"{type(error).__name__}: {error}".split()), kind.__name__.lower()
        self._note(f"{name} failed and is not used from here on; metrics.jsonl has everything ({reason[:200]})")


def _id(workdir: Path, given: str) -> str:
    file = workdir / "wandb_id"
    if file.exists():  # newer than the checkpoint's id if a rollback started another wandb run
        given = stored.content_of(file, 1000).decode(errors="replace").strip() or given
    given = given or uuid.uuid4().hex[:8]
    files.write(file, given + "\n")
    return given
