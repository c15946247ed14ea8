"""What a run shows and keeps: progress on the terminal, metrics.jsonl, and wandb where it is wanted.

Lines of metrics.jsonl are JSON objects with a `kind`: `run` (one per start: what the run is), `train` (one per step),
`evaluate`, `curvature`, `checkpoint`, `anomaly` (a bad step), `rollback`, and `change` (of a config key, by a restart
after `step`); each has the `step` it belongs to, the number of updates made. NaN is null, infinities are the strings
"inf" and "-inf", since JSON has no others; what a method does not compute is left out.
"""

import array
import collections
import errno
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ml_collections import ConfigDict

from steppe.data import files

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Tracker:
    """Records one run in `workdir`, continuing after `start_step` updates.

    tokens_per_step: predicted tokens of one step over all devices; tokens_before: those beyond so many for every step.
    flops_per_step: FLOPs of one step over all devices, 0 where unknown. peak_flops: FLOP/s of all devices together, 0
    where unknown. wandb_id: the id a checkpoint brought, "" for the one in the workdir or a new one. primary: False
    makes every method do nothing (all processes but the first). clock: seconds that only grow. stream: where progress
    goes; live if it is a terminal.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: ConfigDict,
        *,
        total_steps: int,
        tokens_per_step: int,
        tokens_before: int = 0,
        start_step: int = 0,
        flops_per_step: float = 0.0,
        peak_flops: float = 0.0,
        wandb_id: str = "",
        primary: bool = True,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self.wandb_id = wandb_id
        self._primary = primary
        if not primary:
            return
        self._workdir, self._config = Path(workdir), config
        self._total, self._tokens_per_step, self._tokens_before = total_steps, tokens_per_step, tokens_before
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._clock, self._stream = clock, stream or sys.stdout
        self._begin = clock()
        self._first: tuple[float, int] | None = None  # when the first step of this start was seen, for the ETA
        self._marks = collections.deque(maxlen=32)  # (time, step) since the last pause, for the rate
        self._rate = 0.0  # steps per second
        self._held_out: tuple[str, float] | None = None  # the first held-out set and its latest loss
        self._bar = self._task = self._wandb = None

        self._workdir.mkdir(parents=True, exist_ok=True)
        # wandb cannot take back what it has: rows that a run makes again after a kill are the same, and sent once
        self._sent = last_steps(self._workdir) if config.log.wandb != "disabled" else {}
        problems = rewind(self._workdir / METRICS, start_step or -1)
        self._open()
        if self._stream.isatty():
            self._start_bar(start_step)
        for problem in problems:
            self.note(problem)
        if config.log.wandb != "disabled":
            self._start_wandb()

    def run(self, step: int, facts: dict[str, Any]) -> None:
        """Records what this run is (parameters, tokens, FLOPs, versions, baselines ...), once per start."""
        if self._primary:
            self._write("run", step, facts)
            self._send(lambda: self._wandb.config.update({"run": _plain(facts)}, allow_val_change=True))

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of the step that made update number `step`; values are numbers or scalar arrays."""
        if not self._primary:
            return
        now = self._clock()
        self._first = self._first or (now, step)
        self._marks.append((now, step))
        then, before = self._marks[0]
        if now > then:
            self._rate = (step - before) / (now - then)
        tokens, sound = self._tokens(step), not metrics.get("nonfinite")
        rate = self._rate * self._tokens_per_step
        # NaN in a sound step is what its method does not compute
        numbers = {name: _number(value) for name, value in metrics.items()}
        known = {name: n for name, n in numbers.items() if not (sound and isinstance(n, float) and math.isnan(n))}
        self._write("train", step, {"tokens": tokens, "seconds": now - self._begin, "tokens_per_second": rate, **known})
        self._send_row("train", "", step, {f"train/{k}": v for k, v in known.items()})
        line = self._line(now, step, metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif step % self._config.log.every == 0 or step == self._total:
            self._print(f"step {step}/{self._total}  {line}")

    def evaluation(self, step: int, name: str, metrics: dict[str, Any]) -> None:
        """Records an evaluation on the held-out set `name` of the parameters after `step` updates."""
        if not self._primary:
            return
        self._pause(step)
        if "loss" in metrics and (self._held_out is None or self._held_out[0] == name):
            self._held_out = name, _number(metrics["loss"])
        self._write("evaluate", step, {"name": name, **metrics})
        self._send_row("evaluate", name, step, {f"held_out/{name}/{k}": v for k, v in metrics.items()})
        shown = "  ".join(f"{key} {_short(_number(value))}" for key, value in metrics.items())
        self.note(f"step {step}  held-out {name}  {shown}")

    def checkpoint(self, step: int, facts: dict[str, Any] | None = None) -> None:
        """Records that a checkpoint of `step` was begun."""
        if self._primary:
            self._pause(step)
            self._write("checkpoint", step, facts or {})

    def event(self, kind: str, step: int, facts: dict[str, Any]) -> None:
        """Records something rare: an `anomaly`, a `rollback`, a `change`."""
        if self._primary:
            self._write(kind, step, facts)

    def measurement(self, kind: str, step: int, facts: dict[str, Any]) -> None:
        """Records what was measured between steps; the time it took stays out of the rate of steps."""
        if self._primary:
            self._pause(step)
            self._write(kind, step, facts)

    def sync(self) -> None:
        """Returns once everything recorded is safely on disk, as it must be before a checkpoint that follows it."""
        if self._primary:
            os.fsync(self._file.fileno())

    def roll_back(self, step: int) -> None:
        """Forgets what was recorded after `step` updates: the run goes on from there."""
        if self._primary:
            self._file.close()
            rewind(self._workdir / METRICS, step)
            self._open()
            self._first = None
            self._pause(step)

    def note(self, text: str) -> None:
        """Shows one line to the reader; it is kept nowhere."""
        if self._primary:
            self._print(text)

    def close(self, status: str) -> None:
        """Ends the record; `status` (finished, stopped, failed ...) is shown and goes to wandb. Safe to call twice."""
        if not self._primary or self._file.closed:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        try:
            self._file.close()
        except OSError as error:  # a full disk: its last line was not written, and whoever wrote it has heard
            status = f"{status} ({error})"
        self._send(lambda: self._wandb.finish(exit_code=0 if status.startswith(("finished", "stopped")) else 1))
        self._print(status)

    def _line(self, now: float, step: int, metrics: dict[str, Any]) -> str:
        parts = [f"tokens {_si(self._tokens(step))}"]
        if "loss" in metrics:
            parts.append(f"loss {_number(metrics['loss']):.4f}")
        if self._held_out is not None:
            parts.append(f"held-out {self._held_out[1]:.4f}")
        if self._rate:
            parts.append(f"{_si(self._rate * self._tokens_per_step)} tokens/s")
            flops = self._rate * self._flops_per_step
            if flops and self._peak_flops:
                parts.append(f"MFU {flops / self._peak_flops:.1%}")
            elif flops:
                parts.append(f"{_si(flops, ' ')}FLOP/s")
        if step > self._first[1]:
            parts.append(f"ETA {clock_face((self._total - step) * (now - self._first[0]) / (step - self._first[1]))}")
        return "  ".join(parts)

    def _tokens(self, step: int) -> int:
        return self._tokens_before + step * self._tokens_per_step

    def _pause(self, step: int) -> None:
        """Keeps time spent outside steps out of the rate (the ETA, which measures the whole, keeps it)."""
        self._marks.clear()
        self._marks.append((self._clock(), step))

    def _open(self) -> None:
        self._file = open(self._workdir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._inode = os.fstat(self._file.fileno()).st_ino

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        path = self._workdir / METRICS
        if not path.exists() or path.stat().st_ino != self._inode:  # else lines would go to a file that nobody sees
            raise OSError(errno.ENOENT, "was removed or replaced while the run was on", str(path))
        self._file.write(json.dumps({"kind": kind, "step": step, **_plain(values)}, allow_nan=False) + "\n")
        self._file.flush()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _start_bar(self, start_step: int) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        self._bar = progress.Progress(
            # where the terminal is narrow the text wraps; bar and count stay
            progress.BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=False)),
            console=Console(file=self._stream),
            get_time=self._clock,
            redirect_stdout=sys.stdout.isatty(),  # what else is printed there goes above the live line
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=self._total, completed=start_step, line="compiling")
        self._bar.start()

    def _start_wandb(self) -> None:
        id_file = self._workdir / "wandb_id"
        if not self.wandb_id and id_file.exists():
            self.wandb_id = id_file.read_text().strip()
        self.wandb_id = self.wandb_id or uuid.uuid4().hex[:8]
        id_file.write_text(self.wandb_id + "\n")
        log = self._config.log

        def start():
            import wandb

            self._wandb = wandb.init(
                mode=log.wandb,
                project=log.project,
                group=log.group or None,
                name=log.name or self._workdir.resolve().name,
                id=self.wandb_id,
                resume="allow",
                dir=self._workdir,
                config=self._config.to_dict(),
                # its capture of the terminal would fight the live line, and no outage may hold up a run for long
                settings=wandb.Settings(
                    console="off", silent=True, init_timeout=30, login_timeout=30, finish_timeout=60
                ),
            )
            # steps as a metric, not wandb's own counter, which drops what a resumed run writes again
            self._wandb.define_metric("*", step_metric="step")

        self._send(start, starting=True)

    def _send_row(self, kind: str, name: str, step: int, row: dict[str, Any]) -> None:
        if step > self._sent.get((kind, name), -1):
            self._sent[kind, name] = step
            self._send(lambda: self._wandb.log({"step": step, **{key: _number(value) for key, value in row.items()}}))

    def _send(self, call: Callable[[], Any], starting: bool = False) -> None:
        """Calls wandb where it is on; whatever goes wrong there is said once and costs the run nothing."""
        if self._wandb is None and not starting:
            return
        try:
            call()
        except Exception as error:
            self._wandb = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.note(f"wandb failed and is left out from here on; metrics.jsonl has everything ({reason[:200]})")


class Train(NamedTuple):
    """The training steps of a record, in order, as arrays [n]; NaN where a step has no such number.

    apart: whether something else was recorded right before the step, or nothing: its clock then also ran for that.
    """

    step: "np.ndarray"
    tokens: "np.ndarray"
    seconds: "np.ndarray"
    loss: "np.ndarray"
    perturbed_loss: "np.ndarray"
    apart: "np.ndarray"


class Records(NamedTuple):
    """What a metrics.jsonl holds: its training steps, and every other record in order."""

    train: Train
    others: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The other records of one kind."""
        return [record for record in self.others if record["kind"] == kind]


# The numbers of lines as `step` writes them, in their order: parsing the whole of them takes several times as long.
_BLOCK = 1 << 20  # bytes read at a time
_NUMBERS = re.compile(rb'"(?:step|tokens|seconds|loss|perturbed_loss)": ([^,}]+)')
_STEP, _END_OF_STEPS = b'{"kind": "train", ', re.compile(rb'\n(?!\{"kind": "train", )')


def _steps_from(content: bytes, position: int) -> bytes:
    """The whole lines of steps that follow one another from a position on."""
    if not content.startswith(_STEP, position):
        return b""
    end = _END_OF_STEPS.search(content, position)
    return content[position : end.end()] if end else b""


def _numbers(lines: bytes) -> "np.ndarray | None":
    """[n, 5] of the lines of steps, as Train has them but for `apart`; None of lines that have to be looked at."""
    import numpy as np

    text = np.frombuffer(lines, np.uint8)  # in which numpy counts several times as fast as Python
    ends = np.flatnonzero(text == ord("\n"))
    count = len(ends)
    if np.count_nonzero(text == ord("{")) != count or (text[ends - 1] != ord("}")).any():  # torn, or of something else
        return None
    found = _NUMBERS.findall(lines)
    if len(found) not in (4 * count, 5 * count):
        return None
    try:
        rows = np.fromiter(map(float, found), np.float64, len(found)).reshape(count, -1)
    except ValueError:
        return None
    return np.pad(rows, ((0, 0), (0, 5 - rows.shape[1])), constant_values=np.nan)


def _blocks(path: Path) -> Iterator[bytes]:
    """A file in parts of whole lines; nothing where there is none."""
    if path.exists():
        with open(path, "rb") as handle:
            while block := handle.read(_BLOCK):
                yield block + handle.readline()


def read(workdir: str | os.PathLike) -> Records:
    """The records of a run's metrics.jsonl, without torn or damaged lines; no records where there is none.

    Numbers that are not finite are floats again.
    """
    import numpy as np  # here: commands that read no run do without it

    rows, others, apart = array.array("d"), [], True
    for content in _blocks(Path(workdir) / METRICS):
        position = 0
        while position < len(content):
            lines = _steps_from(content, position)
            block = _numbers(lines) if lines else None
            if block is not None:
                first = np.zeros((len(block), 1))
                first[0], apart, position = apart, False, position + len(lines)
                rows.frombytes(np.hstack([block, first]).tobytes())
                continue
            end = content.find(b"\n", position) + 1 or len(content)
            record = _record(content[position:end])
            position = end
            if record is None:
                continue
            record = _restore(record, nothing=None if record["kind"] in ("run", "change") else math.nan)
            if record["kind"] == "train":
                numbers = (record.get(name) for name in Train._fields[1:-1])
                rows.extend((record["step"], *(math.nan if n is None else n for n in numbers), apart))
            else:
                others.append(record)
            apart = record["kind"] != "train"
    columns = np.frombuffer(rows, np.float64).reshape(-1, len(Train._fields)).T
    step, tokens, *numbers, apart = columns
    return Records(Train(step.astype(np.int64), np.nan_to_num(tokens).astype(np.int64), *numbers, apart > 0), others)


def last_steps(workdir: str | os.PathLike) -> dict[tuple[str, str], int]:
    """{(kind, name): the last step recorded} of a run; name is that of a held-out set, or ""."""
    train, others = read(workdir)
    found = {("train", ""): int(train.step.max())} if len(train.step) else {}
    for record in others:
        key = record["kind"], record.get("name", "")
        found[key] = max(record["step"], found.get(key, -1))
    return found


def rewind(path: Path, step: int) -> list[str]:
    """Cuts metrics.jsonl back to what was known after `step` updates (-1: empties it); returns what a reader must know.

    Read from its end, as far as what is cut. A kill leaves the old file or the new one.
    """
    if not path.exists():
        return []
    begin = _tail(path, step)
    with open(path, "rb") as handle:
        handle.seek(begin)
        tail = handle.read()
    *lines, end = tail.split(b"\n")
    records = [(line, _record(line)) for line in lines]
    torn = len(end)
    if not torn and records and records[-1][1] is None:  # zeros, or half a line, where a block was never written
        torn = len(records.pop()[0])
    broken = sum(record is None for _, record in records)
    problems = [f"{path.name}: dropped a torn last line of {torn} bytes"] if torn else []
    problems += [f"{path.name}: dropped {broken} damaged lines"] if broken else []
    # a change belongs to the restart that made it: restarted from the same step, it is recorded anew
    kept = b"".join(
        line + b"\n"
        for line, record in records
        if record and (record["step"] < step or (record["step"] == step and record["kind"] != "change"))
    )
    if tail.startswith(kept):
        if len(kept) < len(tail):
            os.truncate(path, begin + len(kept))
            files.sync(path)
    else:
        with files.replacing(path) as aside:
            shutil.copyfile(path, aside)
            os.truncate(aside, begin)
            with open(aside, "ab") as handle:
                handle.write(kept)
    if step > 0:
        missing = step - _count(path, b'{"kind": "train"')
        if missing > 0:
            problems.append(f"{path.name}: {missing} of the {step} steps before this start are not in it")
    return problems


def _tail(path: Path, step: int) -> int:
    """Where the part of a metrics.jsonl begins in which something may be of a step >= `step`: steps only grow."""
    position = path.stat().st_size
    with open(path, "rb") as handle:
        while position > 0 and step > 0:
            position = max(0, position - _BLOCK)
            handle.seek(position)
            if position:
                position += len(handle.readline())
            first = _record(handle.readline())
            if first is not None and first["step"] < step:
                break
    return position if step > 0 else 0


def _count(path: Path, start: bytes) -> int:
    """Lines of a file that begin so."""
    with open(path, "rb") as handle:
        return sum(line.startswith(start) for line in handle)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None of one that is damaged: a kill cuts a line short or leaves zeros."""
    try:
        record = json.loads(line)
        return {**record, "kind": str(record["kind"]), "step": int(record["step"])}
    except (ValueError, KeyError, TypeError):
        return None


def _number(value: Any) -> Any:
    """A Python number (or text, truth, None) from it or from a scalar array."""
    return value.item() if hasattr(value, "item") else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = _number(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _restore(value: Any, nothing: float | None) -> Any:
    """A value as it was recorded. nothing: what null stands for."""
    if isinstance(value, dict):
        return {key: _restore(item, nothing) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, nothing) for item in value]
    if value is None:
        return nothing
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _si(number: float, gap: str = "") -> str:
    """Three digits and a metric letter: 12.3k, 4.56M."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or letter == "P":
            break
        number /= 1000
    digits = 0 if letter == "" and number == int(number) else max(0, 2 - len(str(int(number))) + 1)
    return f"{number:.{digits}f}{gap}{letter}"


def clock_face(seconds: float) -> str:
    """1:02:03 or 2:03; ? where unknown."""
    if math.isnan(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
