"""How a run ends: its exit statuses, the errors that refuse it in one line, and its final status."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steppe.configs.keys import ConfigError
from steppe.data.errors import DataError

if TYPE_CHECKING:
    from steppe.lm.track.lines import Records

# STORAGE is EX_IOERR. STOPPED is EX_TEMPFAIL: run the same command again to resume.
FINISHED, REFUSED, ANOMALY, STORAGE, STOPPED = 0, 2, 3, 74, 75
IN_USE = "is in use by"  # in the error line if another process is using the workdir
STATUSES = ("finished", "diverged", "failed", "pruned", "unfinished")
RISEN = 1.05  # a loss above its lowest times this has risen


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; the message is one line."""


class Unusable(ValueError):
    """A checkpoint that must not or cannot be restored here; the message is one line."""


REFUSALS = (ConfigError, DataError, WorkdirError, Unusable)  # bad input; each message is one line


def goes_on(code: int, said: str) -> bool:
    """Whether a run should be started again after an attempt with this exit status and last line."""
    return code in (STOPPED, STORAGE) or code < 0 or (code == REFUSED and IN_USE in said)


def after(code: int, said: str, recorded: tuple[str, str] | None) -> tuple[str, str]:
    """(status, why) of a run that ended for good with this exit status and last line. recorded: `status`, if known."""
    known, why = recorded or ("", "")
    if code == FINISHED and known in ("finished", "diverged"):
        return known, why
    if code == ANOMALY:
        return "diverged", why if known == "diverged" else said
    return "failed", said or f"exit status {code}"


def status(
    records: "Records",
    evaluations: Sequence[dict[str, Any]],
    steps: int,
    unigram: float,
    ended: tuple[str, str] = ("", ""),
) -> tuple[str, str]:
    """(status, why) from a run's record. evaluations: on its first held-out set. unigram: a unigram model's loss there,
    nats a token, infinite if unknown. ended: (status, why) if known otherwise."""
    (named, why), last = ended, last_of(evaluations, steps)
    if not named:
        stops = [record for record in records.of("anomaly") if record.get("decision") == "stop"]
        reached = max([*records.train.step[-1:].tolist(), *(record["step"] for record in records.others)], default=-1)
        if last:
            named = "finished"
        elif stops and stops[-1]["step"] >= reached:
            named, why = "diverged", f"{stops[-1]['what']} at step {stops[-1]['step']}"
        else:
            named, why = "unfinished", f"after step {reached}" if reached >= 0 else "not begun"
    return _judged(evaluations, last, unigram, why) if named == "finished" else (named, why)


def _judged(evaluations: Sequence[dict[str, Any]], last: dict[str, Any], unigram: float, why: str) -> tuple[str, str]:
    """(status, why) of a completed run, from its held-out losses."""
    if not last:
        return "failed", "its metrics.jsonl has no evaluation after the last step"
    loss = float(last["loss"])
    if not math.isfinite(loss):
        return "diverged", f"held-out loss {loss}"
    if loss <= unigram:
        return "finished", why
    said = f"held-out loss {loss:.4f} above the unigram model's {unigram:.4f}"
    lowest = min(float(record["loss"]) for record in evaluations)
    return ("diverged", f"{said}, and it was {lowest:.4f}") if loss > RISEN * lowest else ("finished", said)


def last_of(evaluations: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The evaluation after the last step; {} if there is none."""
    return evaluations[-1] if evaluations and steps and evaluations[-1]["step"] == steps else {}
