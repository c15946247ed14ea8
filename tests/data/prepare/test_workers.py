"""Several processes on one preparation: none outlives an interrupt or the death of another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steppe.data.readers.built_in import embedded_documents

ROOT = Path(__file__).parents[3]


def children(process):
    """Ids of the worker processes of `process`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == process and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize(
    ("fault", "message"),
    [("interrupt", "interrupted; finished shards are kept"), ("kill", "was killed (out of memory?)")],
)
def test_an_interrupt_or_a_killed_worker_ends_everything_with_one_line(tmp_path, fault, message):
    texts = [text.decode() for _, text in embedded_documents()[:300]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts * 4))
    arguments = [f"--config.data.task=jsonl:{tmp_path}/a.jsonl", f"--out={tmp_path}/out", "--shards=4", "--workers=2"]
    command = [sys.executable, "-P", "-m", "steppe.scripts.prepare_data", "--config=base", *arguments]
    # a shell that starts something in the background has it ignore interrupts
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeding)
    deadline = time.monotonic() + 60
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert len(workers) == 2
    time.sleep(1)  # somewhere in their imports or first documents
    os.kill(
        process.pid if fault == "interrupt" else workers[0], signal.SIGINT if fault == "interrupt" else signal.SIGKILL
    )
    began = time.monotonic()
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2, complaint
    assert message in complaint
    assert complaint.count("\n") == 1, complaint
    assert time.monotonic() - began < 15
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list(tmp_path.rglob("*.tmp"))
