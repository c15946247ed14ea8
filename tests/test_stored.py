"""Whatever a stored file says, a command that reads it answers in one line, at once, and touches nothing else.

Every case changes one leaf of one stored file of a run, a sweep, a corpus, a pack or an export: its type, its size, its
depth, its name, or the file itself into a link or a pipe; and runs a command that reads it, in this process.
"""

import collections
import contextlib
import copy
import io
import json
import os
import pathlib
import random
import shutil
import signal
import time
import warnings

import pytest
from etils import epath

from helpers import lm_runs, report_runs
from steppe.configs import base
from steppe.data import files, loader
from steppe.data import manifest as manifests
from steppe.data.prepare import prepare, recipe_of
from steppe.data.vocabulary import load_tokenizer
from steppe.lm.keep import checkpoint, mirror, record, seal
from steppe.lm.parts import anomaly, leg
from steppe.scripts import cli, process

SECONDS = 5  # of this process, in which a command must have answered
VALUES = [
    None, True, -1, 0, 1.5, 1e308, -1e308, 2**40, 2**63, 10**30, "", "x", "\x1b[2J", "a\nb", "nul\0", "é" * 3000, [],
    {}, [1], ["x"], [None], {"x": 1}, [[[]]], "../../../canary/file", "canary/file", "..", "/", "s3://nowhere/x",
    "file:///nowhere",
]  # fmt: skip
TEXTS = [b"", b"{", b"[]", b"\0\0\0", b"\xff\xfe", b"null", b"[" * 10**5, b'{"a":' * 10**5, b"{}\n" * 3]


def _measured(step):
    return {
        "step": step, "summary": {"lambda_max": 2.0, "trace": 5.0, "loss": 3.0}, "weights": "last", "tokens": 9,
        "settings": {"batches": 1}, "held_out": "val",
    }  # fmt: skip


def _retained():
    paths = [{"rate": 1e-3, "points": [{"step": 1, "gained": 0.1, "lost": 0.02}], "along": {"curvature": 1.0}}]
    return {
        "step": 4, "weights": "last", "loss": 3.0, "held_out": {"name": "val", "corpus": "f", "tokens": 9},
        "fine_tune": {"corpus": "g", "name": "v"}, "settings": {"noise": [0.1]}, "summary": {"noise_0.1": 0.3},
        "details": {"fine_tune": {"loss": 3.0, "paths": paths}},
    }  # fmt: skip


def _measure(run: pathlib.Path) -> None:
    """What is measured of a run, and more kinds of records."""
    (run / "curvature").mkdir()
    files.write_json(run / "curvature" / "4.json", _measured(4))
    files.write_json(run / "retention.json", _retained())
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as handle:
        for more in (
            {"kind": "anomaly", "step": 3, "what": "spike", "decision": "skip"},
            {"kind": "branch", "step": 0, "parent": "/elsewhere/t", "parent_run": "f"},
            {"kind": "average", "step": 1000, "name": "val", "weights": "ema", "loss": 2.8, "bits_per_byte": 4.0},
            {"kind": "curvature", "step": 4, "all": {"logit_norm": 1.0, "functional_norm": 0.5}},
            {"kind": "goodput", "step": 1000, "goodput": {"step": 3.0, "other": 1.0}},
        ):
            handle.write(json.dumps(more) + "\n")


def _open(argv: list[str]) -> int:
    """A corpus and a batch of it, as every command opens them."""
    corpus = loader.open_corpus(argv[0])
    loader.training_rows(corpus, 0, 0, 4)
    loader.held_out_rows(corpus, "val", 0, 4)
    return 0


def _continue(argv: list[str]) -> int:
    """What a run that goes on from a checkpoint, or branches off it, reads apart from its arrays."""
    place = checkpoint.find(argv[0], lambda line: None)
    with checkpoint.Checkpoints(str(place.parent), read_only=True, log=lambda line: None) as checkpoints:
        meta = record.meta_of(checkpoints.meta(int(place.name)), place)
    leg.leg_of(int(place.name), meta, base.get_config().to_dict(), branched=True)
    anomaly.Watch(base.get_config(), meta["watch"]).batch_index(4)
    return 0


OTHERS = {
    "corpus": _open,
    "vocabulary": lambda argv: 0 if load_tokenizer(argv[0]).encode("ab") else 1,
    "continue": _continue,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
    "vocab_size": 3, "hidden_act": "silu",
}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": BYTES,
    "post_processor": None, "decoder": BYTES,
    "added_tokens": [{"id": 2, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []},
}  # fmt: skip


class House:
    """A sweep of three runs, a corpus, a pack and a Hugging Face directory; next to them the canary.

    targets: {file: the commands that read it}. trained: with a run that was trained, and the commands that need one.
    """

    def __init__(self, place: pathlib.Path, trained: bool = False):
        self.place, self.canary, self.targets = place, place / "canary", {}
        (self.canary / "folder").mkdir(parents=True)
        for name in ("file", "folder/file", "x.array_record"):
            (self.canary / name).write_text("precious")
        sweep, self.out, pack, hub = (place / name for name in ("sweep", "out", "runs.jsonl", "hub"))
        runs = {"adamw": report_runs.plan("adamw"), "sam": report_runs.plan("sam", 0.1)}
        runs |= {"other": report_runs.plan("sam", 0.3)}
        losses = zip(runs, (3.0, 2.9, 2.95), strict=True)
        report_runs.write_sweep(sweep, {name: (runs[name][1], loss) for name, loss in losses})
        for run in (sweep / "runs").iterdir():
            _measure(run)
        a, b = (sweep / "runs" / name for name in ("adamw", "sam"))
        again = f"--out={place / 'again.jsonl'}"
        packed, pages = ["report", "pack", str(sweep), again], ["report", str(sweep), f"--out={self.out}"]
        self.answer(["report", "pack", str(sweep), f"--out={pack}"], must=0)
        self.answer(pages, must=0)
        text, _ = lm_runs.write_text(place)
        prepared = str(place / "corpus")
        prepare(recipe_of(lm_runs.config(text, "").data), prepared, log=lambda line: None)
        for path in pathlib.Path(prepared).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        hub.mkdir()
        files.write_json(hub / "config.json", LLAMA)
        files.write_json(hub / "tokenizer.json", TOKENIZER)
        files.write_json(hub / "tokenizer_config.json", {"bos_token": None, "eos_token": {"content": "</s>"}})
        self.answer(["vocabulary", str(hub)], must=0)
        self.answer(["corpus", prepared], must=0)
        many = [packed, ["watch", str(sweep), "--once"], ["report", "compare", str(a), str(b)]]
        self.targets |= {
            sweep / "sweep.json": [*many, pages],
            a / "config.json": [*many, ["config", "diff", str(a), "base"], pages],
            a / "metrics.jsonl": [*many, ["plot", str(a), str(b)], pages],
            a / "outcome.json": [*many, pages],
            a / "curvature" / "4.json": [packed, pages],
            a / "retention.json": [packed, pages],
            pack: [["report", "pack", str(pack), again], ["report", str(pack), f"--out={self.out}"]],
            self.out / "files.json": [pages],
            place / "corpus" / "manifest.json": [["corpus", prepared]],
            hub / "config.json": [["config", "from-hf", str(hub)]],
            hub / "tokenizer.json": [["vocabulary", str(hub)]],
            hub / "tokenizer_config.json": [["vocabulary", str(hub)]],
        }
        if trained:
            self._train(text)
        self.before = self.seen()

    def _train(self, text: str) -> None:
        run = self.place / "run"
        config = lm_runs.config(text, str(self.place / "cache"), train__duration="4 steps", average__weights=("ema",))
        assert lm_runs.run(config, run) == 0
        export, evaluate = ["export", f"--workdir={run}", "--out=NEW"], ["evaluate", f"--workdir={run}", "--batches=1"]
        corpus = pathlib.Path(json.loads((run / "corpus.json").read_text())["directory"])
        for path in corpus.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        steps = ["continue", str(run)]
        for name in ("config.json", "metrics.jsonl", "corpus.json", "run_id"):
            self.targets[run / name] = [export, evaluate]
        self.targets[corpus / manifests.NAME] = [export, evaluate]
        for name in (seal.NAME, "meta/metadata", "state/_METADATA"):
            self.targets[run / "checkpoints" / "4" / name] = [steps, export]
        self.targets[run / "checkpoints" / "4"] = [steps, export]
        self._publish(run)

    def _publish(self, run: pathlib.Path) -> None:
        """The run at an address, and what this machine knows of it."""
        bucket = self.place / "bucket" / "run"
        address = f"file://{bucket}"
        with mirror.kept(address, True, lambda line: None) as here:
            shutil.copytree(run, here, dirs_exist_ok=True)
        reading = [["watch", address, "--once"], ["plot", address], ["export", f"--workdir={address}", "--out=NEW"]]
        for line in (*reading, ["continue", str(run)]):
            self.answer(line, must=0)
        for name in ("config.json", "metrics.jsonl", "run_id", "corpus.json", f"checkpoints/4/{seal.NAME}"):
            self.targets[bucket / name] = reading
        for folder in (mirror._place(address), mirror._place(address, reading=True)):
            self.targets[folder.parent / mirror.KNOWN] = reading
            self.targets[folder / "checkpoints" / "4" / seal.NAME] = reading

    def seen(self) -> dict:
        """Every file of the canary, and every name next to it."""
        inside = {str(path): path.read_bytes() for path in self.canary.rglob("*") if path.is_file()}
        passing = {"again.jsonl", "new", "kept", *(path.name for path in self.targets if path.parent == self.place)}
        return inside | {path.name: b"" for path in self.place.iterdir() if path.name not in passing}

    def answer(self, line: list[str], must: int | None = None) -> tuple[int, str]:
        """(status, what was said) of a command line. Fails on an exception, and where it does not answer in time."""
        new = self.place / "new"
        shutil.rmtree(new, ignore_errors=True)
        line = [word.replace("NEW", str(new)) for word in line]
        out, begin = io.StringIO(), time.process_time()
        signal.signal(signal.SIGALRM, _too_late)
        signal.alarm(600)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if line[0] in OTHERS:
                    status = process.refusing(OTHERS[line[0]])(line[1:])
                else:
                    status = cli.main(line)
            except SystemExit as stop:
                status = stop.code
            finally:
                signal.alarm(0)
        if must is not None:  # the first time, which imports
            assert status == must, (line, out.getvalue())
        else:
            assert time.process_time() - begin < SECONDS + 15 * (line[0] in ("evaluate", "report")), line
        return status, out.getvalue()


def _too_late(*_) -> None:
    raise TimeoutError("no answer")


def _leaves(value, path=()):
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from _leaves(each, (*path, key))


def _changed(value, rng):
    """(a copy with one leaf changed, what was done)."""
    value = copy.deepcopy(value)
    places = list(_leaves(value))
    if not places:
        return rng.choice(VALUES), "the whole"
    *above, last = rng.choice(places)
    inside = value
    for key in above:
        inside = inside[key]
    kind = rng.random()
    if kind < 0.1:
        del inside[last]
        return value, f"{above}.{last} removed"
    if kind < 0.2 and isinstance(inside, dict):
        name = rng.choice(["../../canary/file", "/", "..", "", "a\0b", "x" * 300, "\x1b"])
        inside[name] = inside.pop(last)
        return value, f"{above}.{last} called {name[:20]!r}"
    new = rng.choice(VALUES)
    inside[last] = new
    return value, f"{above}.{last} = {str(new)[:20]!r}"


def _harm_step(path: pathlib.Path, rng: random.Random, canary: pathlib.Path) -> str:
    """Changes what is in a checkpoint's directory, or its name."""
    made = rng.choice(["link to all", "link to itself", "link", "linked whole", "name", "pipe", "device", "more"])
    inside = rng.choice([path, path / "state", path / "meta"])
    if made == "name":
        path.rename(path.with_name(rng.choice(["5", "04", "-4", "4.5", "9" * 30, "\u0664", "4 ", "x\x1b[2J"])))
    elif made == "linked whole":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(canary)
    elif made == "pipe":
        os.mkfifo(inside / "more")
    elif made == "more":
        (inside / "more\x1b[2J").write_text("x")
    elif made == "device":
        next(each for each in inside.iterdir() if each.is_file()).unlink()
        (inside / "more").symlink_to("/dev/zero")
    else:
        (inside / "more").symlink_to({"link to all": "/", "link to itself": ".", "link": canary / "file"}[made])
    return made


def _harm(path: pathlib.Path, rng: random.Random, canary: pathlib.Path) -> str:
    """Changes one thing of a stored file; says what."""
    if path.is_dir():
        return _harm_step(path, rng, canary)
    content, kind = path.read_bytes(), rng.random()
    if kind < 0.12:
        path.write_bytes(rng.choice(TEXTS))
        return "other bytes"
    if kind < 0.16:
        cut = content[: rng.randrange(len(content) + 1)]
        path.write_bytes(cut)
        return "cut"
    if kind < 0.24:
        path.unlink()
        things = ["pipe", "link", "folder", "device", "gone"]
        made = rng.choice([t for t in things if "bucket" not in path.parts or t in ("folder", "gone")])
        if made == "pipe":
            os.mkfifo(path)
        elif made == "folder":
            path.mkdir()
        elif made != "gone":
            path.symlink_to(canary / "file" if made == "link" else "/dev/zero")
        return made
    if path.name == "run_id":
        path.write_bytes(rng.choice([b"../..", b"\xff", b"", b"x" * 10**6]))
        return "other bytes"
    if path.name == seal.NAME:
        value, what = _changed(json.loads(content.partition(b"\n")[2]), rng)
        body = json.dumps(value).encode()
        path.write_bytes(seal._digest(body).encode() + b"\n" + body)
        return what
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        value, what = _changed(json.loads(lines[number]), rng)
        lines[number] = json.dumps(value).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
        return f"line {number}: {what}"
    value, what = _changed(json.loads(content), rng)
    if "checkpoints" in path.parts:  # whoever changes it can seal it anew
        path.write_text(json.dumps(value))
        step = next(each for each in path.parents if each.parent.name == "checkpoints")
        known = seal.read(epath.Path(step))
        seal.write(epath.Path(step), known["step"], known["run"], known["tree"])
        return f"{what}, sealed anew"
    if path.name == manifests.NAME and isinstance(value, dict) and rng.random() < 0.8:
        value["checksum"] = manifests.checksum(value)
    text = json.dumps(value)
    if kind > 0.95:  # a number that JSON has not, or a key twice
        text = text.replace(": 1", ": NaN", 1) if rng.random() < 0.5 else text.replace("{", '{"x": 1, "x": 2, ', 1)
    path.write_text(text)
    return what


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


def _kind(what: str) -> str:
    """A sort of change, for the table."""
    for word in (" removed", " called ", " = "):
        if word in what:
            return {" removed": "a leaf removed", " called ": "a leaf renamed", " = ": "a leaf changed"}[word]
    return what.split(":")[0] if what.startswith("the whole") else what


def _case(house: House, seed: int, table: collections.Counter) -> None:
    rng = random.Random(seed)
    path = rng.choice([each for each in house.targets if each.name != "files.json" or rng.random() < 0.2])
    lines = house.targets[path]
    drawn = [line for line in lines if line[0] == "report" and line[1] not in ("pack", "compare")]
    heavy = [*drawn, *(line for line in lines if line[0] in ("evaluate", "plot"))]
    light = [line for line in lines if line not in heavy]
    line = rng.choice(heavy if heavy and (not light or rng.random() < 0.1) else light)
    runs = house.place / "steppe" / "runs"
    if not path.exists():  # the address of another case has made what was read here superseded
        shutil.rmtree(runs / path.relative_to(runs).parts[0])
        house.answer(lines[-1], must=0)
    kept = house.place / "kept"
    step = next((each for each in path.parents if each.parent.name == "checkpoints"), path)
    shutil.copytree(step, kept) if step.is_dir() else shutil.copy2(step, kept)
    if path.is_file():  # a step that was read here shares its bytes with the run's own
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    try:
        what = _harm(path, rng, house.canary)
        name = f"case {seed}: {' '.join(line[:2])} after {path.name}: {what}"
        try:
            status, said = house.answer(line)
        except BaseException as error:
            error.add_note(name)
            raise
        assert status in (0, 1, 2), f"{name}: status {status}, {said}"
        assert "Traceback" not in said, f"{name}: {said}"
        assert status != 2 or len(said.strip().splitlines()[-1]) < 2000, f"{name}: {said}"
        assert house.seen() == house.before, f"{name}: touched the canary"
        told = "refused" if status == 2 else "left out" if "left out" in said else "as before"
        table["SEAL" if path.name == seal.NAME else path.name, _kind(what), told] += 1
    finally:
        for each in step.parent.iterdir() if step.parent.name == "checkpoints" else [step]:
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink(missing_ok=True)
        kept.rename(step)


@pytest.mark.parametrize("block", range(10))
def test_a_changed_leaf_is_refused_or_left_out_at_once_and_nothing_else_is_touched(house, block):
    for seed in range(12 * block, 12 * block + 12):
        _case(house, seed, collections.Counter())


@pytest.mark.exhaustive
def test_the_same_of_five_thousand(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "steppe"))
    house = House(tmp_path, trained=True)
    table, count = collections.Counter(), int(os.environ.get("STEPPE_CASES", "5000"))
    failures = []
    for seed in range(1000, 1000 + count):
        try:
            _case(house, seed, table)
        except BaseException as error:
            failures.append((*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"[:300]))
            table["", "", "FAILED"] += 1
            if isinstance(error, KeyboardInterrupt):
                break
    with capsys.disabled():
        for (name, kind, told), number in sorted(table.items()):
            print(f"{name:<22} {kind:<16} {told:<10} {number:>5}")
        for each in failures[:60]:
            print(*each, sep="\n    ")
    assert not failures
