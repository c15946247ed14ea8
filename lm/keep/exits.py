"""How a run ends: its exit statuses, the errors that refuse one in a single line, and what it is called afterwards."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steppe.configs.keys import ConfigError
from steppe.data.errors import DataError

if TYPE_CHECKING:
    from steppe.lm.track.lines import Records

# STORAGE is EX_IOERR; STOPPED is EX_TEMPFAIL: run the same command again to continue.
FINISHED, REFUSED, ANOMALY, STORAGE, STOPPED = 0, 2, 3, 74, 75
IN_USE = "is in use by"  # in the line of a run that is refused while another process has its workdir
STATUSES = ("finished", "diverged", "failed", "pruned", "unfinished")
RISEN = 1.05  # a loss this many times its lowest has risen


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; one line."""


class Unusable(ValueError):
    """A checkpoint that may not, or cannot, be restored here; one line."""


REFUSALS = (ConfigError, DataError, WorkdirError, Unusable)  # bad input, each message one line that names it


def goes_on(code: int, said: str) -> bool:
    """Whether an attempt at a run with this exit status and last line is to be followed by another."""
    return code in (STOPPED, STORAGE) or code < 0 or (code == REFUSED and IN_USE in said)


def after(code: int, said: str, recorded: tuple[str, str] | None) -> tuple[str, str]:
    """(status, why) of a run that ended for good with this exit status and last line. recorded: `status` of its record,
    None where that cannot be read."""
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
    """(status, why) by what a run has recorded. evaluations: on its first held-out set. unigram: what a unigram model
    has there, nats a token, infinite where unknown. ended: what is known of it otherwise."""
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
    """(status, why) of a run that went to its end, by its held-out losses."""
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
    """The evaluation after the last step; empty if there is none."""
    return evaluations[-1] if evaluations and steps and evaluations[-1]["step"] == steps else {}
