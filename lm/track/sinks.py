"""Where rows go besides metrics.jsonl: wandb, TensorBoard. One that fails is said once and costs the run nothing."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from steppe.lm.track.lines import number


class Sink(Protocol):
    """row(step, values): numbers of a step, by "group/name". facts(values): what the run is. close(good): the end."""

    name: str

    def row(self, step: int, values: dict[str, Any]) -> None: ...

    def facts(self, values: dict[str, Any]) -> None: ...

    def close(self, good: bool) -> None: ...


class Wandb:
    """A wandb run that a resumed run continues. workdir: where it writes; id: of the wandb run."""

    name = "wandb"

    def __init__(self, workdir: Path, config: ConfigDict, id: str):
        import wandb

        log = config.log
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
            # its capture of the terminal would fight the live line, and no outage may hold up a run for long
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, login_timeout=30, finish_timeout=60),
        )
        # steps as a metric, not wandb's own counter, which drops what a resumed run writes again
        self._run.define_metric("*", step_metric="step")
        for axis in ("tokens", "seconds"):
            self._run.define_metric(axis, step_metric="step")

    def row(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def facts(self, values: dict[str, Any]) -> None:
        self._run.config.update({"run": values}, allow_val_change=True)

    def close(self, good: bool) -> None:
        self._run.finish(exit_code=0 if good else 1)


class TensorBoard:
    """Event files in WORKDIR/tensorboard; what an earlier start wrote after `start_step` is purged from view."""

    name = "tensorboard"

    def __init__(self, workdir: Path, start_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def row(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def facts(self, values: dict[str, Any]) -> None:
        import json

        self._writer.add_text("run", f"```json\n{json.dumps(values, indent=1, default=str)}\n```", 0)

    def close(self, good: bool) -> None:
        self._writer.close()


class Sinks:
    """All that config.log asks for. wandb_id: of a checkpoint, or "". sent: {(kind, name): the last step of it that an
    earlier start recorded}. note(line): what a reader must know.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        *,
        start_step: int,
        wandb_id: str,
        sent: dict[tuple[str, str], int],
        note: Callable[[str], None],
    ):
        # wandb cannot take back what it has: rows that a run makes again after a kill are the same, and sent once
        self.wandb_id, self._sent, self._note, self._sinks = wandb_id, dict(sent), note, []
        if config.log.wandb != "disabled":
            self.wandb_id = _id(workdir, wandb_id)
            self._start(lambda: Wandb(workdir, config, self.wandb_id), "wandb")
        if config.log.tensorboard:
            self._start(lambda: TensorBoard(workdir, start_step), "tensorboard")

    def row(self, kind: str, name: str, step: int, values: dict[str, Any]) -> None:
        """Sends numbers of a step; kind, name: of the record that they are."""
        new = step > self._sent.get((kind, name), -1)
        self._sent[kind, name] = max(step, self._sent.get((kind, name), -1))
        values = {key: number(value) for key, value in values.items()}
        self._each(lambda sink: sink.row(step, values) if new or sink.name != "wandb" else None)

    def facts(self, values: dict[str, Any]) -> None:
        """Sends what the run is."""
        self._each(lambda sink: sink.facts(values))

    def close(self, good: bool) -> None:
        """Ends all; good: whether the run did not fail."""
        self._each(lambda sink: sink.close(good))

    def _start(self, make: Callable[[], Sink], name: str) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:
            self._drop(name, error)

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self._drop(sink.name, error)

    def _drop(self, name: str, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._note(f"{name} failed and is left out from here on; metrics.jsonl has everything ({reason[:200]})")


def _id(workdir: Path, given: str) -> str:
    file = workdir / "wandb_id"
    if not given and file.exists():
        given = file.read_text().strip()
    given = given or uuid.uuid4().hex[:8]
    file.write_text(given + "\n")
    return given
