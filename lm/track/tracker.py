"""Records and displays a run: progress on the terminal, metrics.jsonl, and its followers (wandb, TensorBoard).

Lines of metrics.jsonl are JSON objects with a `kind` (see lines.KINDS) and a `step`, the number of updates made. NaN is
null; infinities are "inf" and "-inf". Values that a method does not compute are absent.
"""

import collections
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from steppe.lm.track.goodput import Goodput, described, earlier
from steppe.lm.track.lines import EVALUATED, METRICS, evaluated, number, plain, read, restored, rewind
from steppe.lm.track.sinks import Sinks
from steppe.lm.track.waiting import EVERY, clock_face, heard, say, soon

NOISE = 100  # steps over which the gradient noise scale is averaged


class Tracker:
    """Records one run in `workdir`, continuing after `start_step` updates.

    tokens_per_step: predicted tokens of an average step on all devices. tokens_seen: before this start. owed: the
    records of the evaluation at start_step, if it was to follow its checkpoint; `owes`: whether some lack.
    flops_per_step, peak_flops: of all devices, a step and a second, 0 if unknown. wandb_id: from a checkpoint; "" to
    use the workdir's or a new one. goodput: the run's time so far, without earlier starts. primary: False, on all
    processes but the first, makes every method do nothing. clock: monotonic seconds. stream: for progress, live on a
    terminal.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: ConfigDict,
        *,
        total_steps: int,
        tokens_per_step: float,
        tokens_seen: int | None = None,
        start_step: int = 0,
        owed: int = 0,
        flops_per_step: float = 0.0,
        peak_flops: float = 0.0,
        wandb_id: str = "",
        primary: bool = True,
        goodput: Goodput | None = None,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self.wandb_id, self.goodput = wandb_id, goodput or Goodput(clock)
        self._primary, self.owes = primary, False
        if not primary:
            return
        self._workdir, self._config = Path(workdir), config
        self._total, self._tokens_per_step = total_steps, tokens_per_step
        self._seen = round(start_step * tokens_per_step) if tokens_seen is None else tokens_seen
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._clock, self._stream = clock, stream or sys.stdout
        self._begin = clock()
        self._first: tuple[float, int] | None = None  # (time, step) of this start's first step, for the ETA
        self._marks = collections.deque(maxlen=32)  # (time, step, tokens) since the last pause, for the rates
        self._rate = self._pace = 0.0  # steps per second, tokens per second
        self._squares = collections.deque(maxlen=NOISE)  # (|G|^2, noise) of the last steps with microbatches
        self._held_out: tuple[str, float] | None = None  # the first held-out set and its latest loss
        self._more: dict[str, int] = {}  # batches of the last evaluation alone
        self._paces: dict[str, float] = {}  # seconds of a batch of an evaluation, 0 if unknown
        self._bar = None

        self._workdir.mkdir(parents=True, exist_ok=True)
        self.goodput.add(earlier(read(self._workdir), start_step))
        path = self._workdir / METRICS
        self.owes = owed > 0 and evaluated(path, start_step) < owed
        problems = rewind(path, start_step or -1, ("change", *EVALUATED * self.owes))
        self._open()
        if self._stream.isatty():
            self._start_bar(start_step)
        for problem in problems:
            self.note(problem)
        self._sinks = Sinks(self._workdir, config, wandb_id=wandb_id, note=self.note)
        self.wandb_id = self._sinks.wandb_id

    def run(self, step: int, facts: dict[str, Any]) -> None:
        """Records the run's facts (parameters, tokens, FLOPs, versions, baselines ...), once per start."""
        if self._primary:
            self._write("run", step, {**facts, "goodput": self.goodput.seconds()})
            self._sinks.facts(plain(facts))

    def step(self, step: int, metrics: dict[str, Any], tokens: int | None = None) -> None:
        """Records the metrics of step `step`; values are numbers or scalar arrays.

        tokens: counted by the loss so far; None if every step has the same number.
        """
        if not self._primary:
            return
        now = self._clock()
        self._first = self._first or (now, step)
        self._seen = round(step * self._tokens_per_step) if tokens is None else tokens
        self._marks.append((now, step, self._seen))
        then, before, seen = self._marks[0]
        if now > then:
            self._rate, self._pace = (step - before) / (now - then), (self._seen - seen) / (now - then)
        sound = not metrics.get("nonfinite")
        pace = {"tokens": self._seen, "seconds": now - self._begin, "tokens_per_second": self._pace}
        if self._peak_flops:
            pace["mfu"] = self._rate * self._flops_per_step / self._peak_flops
        # NaN in a sound step means that the method does not compute the value
        numbers = {name: number(value) for name, value in metrics.items()}
        known = {name: n for name, n in numbers.items() if not (sound and isinstance(n, float) and math.isnan(n))}
        if "microbatch_norm" in known and sound:
            # here, because it needs jax, which some commands that import this module do without
            from steppe.optim.curvature.noise import from_norms

            norms = known["gradient_norm"], known["microbatch_norm"]
            self._squares.append(from_norms(*norms, self._config.train.microbatches))
        self._write("train", step, {**pace, **known})
        line = self._line(now, step, metrics)
        if self._bar is not None:
            self._live(line, step)
        elif step % self._config.log.every == 0 or step == self._total:
            self.note(f"step {step}/{self._total}  {line}")

    def evaluation(
        self, step: int, name: str, metrics: dict[str, Any], weights: str = "", kind: str = "evaluate"
    ) -> None:
        """Records an evaluation of the parameters after `step` updates on the held-out set, or the "choices", `name`.

        weights: their name, if not those that the run is judged by.
        """
        if not self._primary:
            return
        kind = "average" if weights else kind
        if kind == "evaluate" and (self._held_out is None or self._held_out[0] == name):
            self._held_out = name, number(metrics["loss"])
        self.measurement(kind, step, {"name": name, **({"weights": weights} if weights else {}), **metrics})
        where = f"{'choices' if kind == 'choices' else 'held-out'} {name}" + f"/{weights}" * bool(weights)
        shown = "  ".join(f"{key} {_short(number(value))}" for key, value in metrics.items())
        self.note(f"step {step}  {where}  {shown}")

    def event(self, kind: str, step: int, facts: dict[str, Any]) -> None:
        """Records a rare event: `anomaly`, `rollback`, `change`."""
        if self._primary:
            self._write(kind, step, facts)

    def measurement(self, kind: str, step: int, facts: dict[str, Any]) -> None:
        """Records a measurement between steps, whose time does not count in the rate of steps."""
        if self._primary:
            self._pause(step)
            self._write(kind, step, facts)

    def expect(self, more: dict[str, int]) -> None:
        """The last evaluation has more batches than the others, by name of `over`: the time left counts them."""
        self._more = more

    def over(self, name: str, batches: Iterable, total: int) -> Iterator:
        """Yields the batches of an evaluation; where that is long, says how far it is and how long it will take."""
        if not self._primary:
            yield from batches
            return
        doing = f"evaluating  {name}, {total:,} batches"
        soon(doing, self._stream)
        began, said, done = self._clock(), self._clock(), 0
        try:
            for index, batch in enumerate(batches):
                now = self._clock()
                if index == 1:
                    began, done = now, 1  # the first may have to be compiled
                elif index and now - said > EVERY:
                    said, left = now, (now - began) / (index - 1) * (total - index)
                    self._live(f"{doing}  {index / total:.0%}  left {clock_face(left)}")
                yield batch
        finally:
            heard()
        known = total > 1 or name in self._paces
        self._paces[name] = (self._clock() - began) / (total - done) if known else 0.0

    def spent(self, step: int) -> None:
        """Records and prints the wall-clock time of all starts of the run by kind, at the end of this start."""
        if not self._primary:
            return
        seconds = self.goodput.seconds()
        flops = step * self._flops_per_step
        mfu = flops / self._peak_flops / seconds["step"] if self._peak_flops and seconds["step"] else 0.0
        self._write("goodput", step, {"goodput": seconds, **({"mfu": mfu} if mfu else {})})
        self.note(f"goodput     {described(seconds, mfu)}")

    def sync(self) -> None:
        """Returns once the record is on disk, which must happen before a later checkpoint."""
        if self._primary:
            os.fsync(self._file.fileno())

    def roll_back(self, step: int, tokens: int | None = None) -> None:
        """Removes records after `step` updates; the run continues from there, after `tokens` tokens."""
        if self._primary:
            self._seen = round(step * self._tokens_per_step) if tokens is None else tokens
            self._file.close()
            rewind(self._workdir / METRICS, step)
            self._open()
            self._sinks.again()
            self.wandb_id = self._sinks.wandb_id
            self._first = None
            self._pause(step)

    def note(self, text: str) -> None:
        """Prints one line, which is not recorded."""
        if self._primary:
            say(text, self._bar, self._stream)

    def close(self, status: str) -> None:
        """Ends the record; prints `status` (finished, stopped, failed ...) and sends it to wandb; idempotent."""
        if not self._primary or self._file.closed:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        try:
            self._file.close()
        except OSError as error:  # a full disk: the last line was not written, and its writer got the error
            status = f"{status} ({error})"
        self._sinks.close(status.startswith(("finished", "stopped")))
        self.note(status)

    def _line(self, now: float, step: int, metrics: dict[str, Any]) -> str:
        parts = [f"tokens {_si(self._seen)}"]
        if "loss" in metrics:
            parts.append(f"loss {number(metrics['loss']):.4f}")
        if self._held_out is not None:
            parts.append(f"held-out {self._held_out[1]:.4f}")
        if len(self._squares) == NOISE:
            square, noise = map(sum, zip(*self._squares, strict=True))
            if square > 0:  # otherwise noise hides it
                parts.append(f"noise scale {_si(max(noise / square * self._tokens_per_step, 0.0))} tokens")
        if self._rate:
            parts.append(f"{_si(self._pace)} tokens/s")
            flops = self._rate * self._flops_per_step
            if flops and self._peak_flops:
                parts.append(f"MFU {flops / self._peak_flops:.1%}")
            elif flops:
                parts.append(f"{_si(flops, ' ')}FLOP/s")
        begun, first = self._first or (now, step)
        if step > first:
            last = sum(batches * self._paces.get(name, 0.0) for name, batches in self._more.items())
            parts.append(f"ETA {clock_face((self._total - step) * (now - begun) / (step - first) + last)}")
        return "  ".join(parts)

    def _live(self, text: str, step: int | None = None) -> None:
        """Shows where the run is: on the bar, whose count is `step` if given, or as a line."""
        if self._bar is None:
            self.note(text)
        else:
            self._bar.update(self._bar.task_ids[0], completed=step, line=text)

    def _pause(self, step: int) -> None:
        """Excludes time between steps from the rate; the ETA includes it."""
        self._marks.clear()
        self._marks.append((self._clock(), step, self._seen))

    def _open(self) -> None:
        self._file = open(self._workdir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open during the run
        self._inode = os.fstat(self._file.fileno()).st_ino

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        path = self._workdir / METRICS
        if not path.exists() or path.stat().st_ino != self._inode:  # lines would go to an unlinked file
            raise OSError(errno.ENOENT, "was removed or replaced during the run", str(path))
        record = {"kind": kind, "step": step, **plain(values)}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._sinks.record(restored(record))

    def _start_bar(self, start_step: int) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        self._bar = progress.Progress(
            # on a narrow terminal the text wraps, while bar and count keep their width
            progress.BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=False)),
            console=Console(file=self._stream),
            get_time=self._clock,
            redirect_stdout=sys.stdout.isatty(),  # other output appears above the live line
            redirect_stderr=False,
        )
        self._bar.add_task("", total=self._total, completed=start_step, line="compiling")
        self._bar.start()


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _si(number: float, gap: str = "") -> str:
    """A number with three digits and an SI prefix: 12.3k, 4.56M."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or letter == "P":
            break
        number /= 1000
    digits = 0 if letter == "" and number == int(number) else max(0, 2 - len(str(int(number))) + 1)
    return f"{number:.{digits}f}{gap}{letter}"
