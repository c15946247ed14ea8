"""A run's record without the run: a process that is killed and started again, and the content of its meters then."""

import collections
import json
import struct
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.modules.setdefault("torch", None)  # tensorboardX imports it, in seconds, where it is installed

from steppe.configs import base
from steppe.lm.track.lines import METRICS, restored
from steppe.lm.track.tracker import Tracker

STEPS, EVALUATE, SAVE = 400, 7, 25  # how many, and how often


def config():
    """What a run of both meters has."""
    made = base.get_config()
    made.log.update(wandb="offline", tensorboard=True, every=10**6)
    return made


def saved(workdir: Path) -> dict:
    """The newest checkpoint: its step, and how often the run was rolled back."""
    path = workdir / "saved.json"
    return json.loads(path.read_text()) if path.exists() else {"step": 0, "rollbacks": 0}


def track(workdir: Path) -> Tracker:
    """A start of the run."""
    start = saved(workdir)["step"]
    return Tracker(workdir, config(), total_steps=STEPS, tokens_per_step=100, start_step=start, stream=sys.stdout)


def train(workdir: Path, until: int = STEPS, pause: float = 0.0, roll_back: tuple[int, ...] = ()) -> None:
    """Goes on from the newest checkpoint. roll_back: steps at which the run goes back to it, once each.

    What a step records depends on how often the run was rolled back before, as its data then do.
    """
    tracker, state = track(workdir), saved(workdir)
    step = state["step"]
    tracker.run(step, {"steps": STEPS})
    done = [at for at in roll_back if at <= step]
    while step < until:
        step += 1
        tracker.step(step, {"loss": 3.0 / step + state["rollbacks"], "gradient_norm": 1.0})
        time.sleep(pause)
        if step in roll_back and step not in done:
            done.append(step)
            state = {**saved(workdir), "rollbacks": state["rollbacks"] + 1}
            tracker.roll_back(state["step"])
            step = state["step"]
            tracker.event("rollback", step + 1, {"to": step, "because": {}, "windows": []})
            continue
        if step % EVALUATE == 0:
            tracker.evaluation(step, "books", {"loss": 4.0 / step + state["rollbacks"]})
        if step % SAVE == 0:
            tracker.sync()
            aside = workdir / "saved.tmp"
            aside.write_text(json.dumps({**state, "step": step}))
            aside.replace(workdir / "saved.json")
    tracker.close("stopped")


def recorded(workdir: Path) -> tuple[dict, dict]:
    """What metrics.jsonl says: {step: loss} of steps and of evaluations."""
    found = {"train": {}, "evaluate": {}}
    for line in (workdir / METRICS).read_text().splitlines():
        record = restored(json.loads(line))
        if record["kind"] in found:
            assert record["step"] not in found[record["kind"]], "metrics.jsonl has a step twice"
            found[record["kind"]][record["step"]] = record["loss"]
    return found["train"], found["evaluate"]


def wandb_rows(workdir: Path) -> dict[str, dict[int, list]]:
    """{name: {step: values}} of the .wandb files, read as wandb writes them: blocks of LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted(workdir.glob("wandb/offline*/*.wandb")):
        for content in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                for name in ("train/loss", "held_out/books/loss"):
                    if name in row:
                        found.setdefault(name, collections.defaultdict(list))[row["step"]].append(row[name])
    return found


def _log_records(content: bytes):
    position, whole = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        if size == kind == 0:
            return
        part = content[position + 7 : position + 7 + size]
        position += 7 + size
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def events(path: Path):
    """The events of a TensorBoard file: records of eight bytes of length, a checksum, the event, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, position = path.read_bytes(), 0
    while position < len(content):
        (size,) = struct.unpack_from("<Q", content, position)
        yield Event.FromString(content[position + 12 : position + 12 + size])
        position += 16 + size


def tensorboard_rows(workdir: Path, read=events) -> dict[str, dict[int, list]]:
    """{tag: {step: values}} of the event files."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        for event in read(path):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, collections.defaultdict(list))[event.step].append(value.simple_value)
    return found


def differences(workdir: Path) -> list[str]:
    """Where the meters are not what metrics.jsonl says; none where they are."""
    found = []
    for meter, rows in (("wandb", wandb_rows(workdir)), ("tensorboard", tensorboard_rows(workdir))):
        for name, wanted in zip(("train/loss", "held_out/books/loss"), recorded(workdir), strict=True):
            have = rows.get(name, {})
            if list(have) != list(wanted):
                odd = sorted(set(have) ^ set(wanted))
                found.append(f"{meter} {name}: {len(have)} steps of {len(wanted)}, differing in {odd[:5]}")
            for step in have.keys() & wanted.keys():
                if len(have[step]) != 1 or abs(have[step][0] - wanted[step]) > 1e-6 * abs(wanted[step]):
                    found.append(f"{meter} {name}: step {step} is {have[step]}, not {wanted[step]}")
    return found


if __name__ == "__main__":
    train(Path(sys.argv[1]), pause=float(sys.argv[2]), roll_back=tuple(map(int, sys.argv[3:])))
