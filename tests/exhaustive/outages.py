"""Runs at an address whose store fails in every way at hand: each ends as if it had not, and loses nothing."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from exhaustive import chaos, disturbances, paced
from exhaustive.disturbances import FINISHED, REFUSED, STOPPED, STORAGE, Bench, records, sealed, seen, small_bench
from helpers import object_store

STEPS, EVERY = 54, 4
CONFIG = {
    "optim__method": "adamw",
    "optim__rho": None,
    "model__layers": 1,
    "train__duration": f"{STEPS} steps",
    "evaluate__every": f"{STEPS} steps",
    "checkpoint__every": f"{EVERY} steps",
    "checkpoint__keep": 3,
    "sample__tokens": 0,
}


def wait_until(run: "Started", true: Callable[[], bool]) -> bool:
    """Waits until something is true; False if the run ended before. The server is a thread of this process."""
    return disturbances.wait_until(run, true, seconds=1200, pause=0.03)


# such small programs take longer to compile than to run
COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"}


class Machine:
    """A process that makes run after run, until one of them is killed: a new one takes its place."""

    def __init__(self):
        self._process: multiprocessing.Process | None = None

    def start(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> "Started":
        """Starts a run; the one before must have ended."""
        if self._process is None or not self._process.is_alive():
            self._orders, theirs = _FORKS.Pipe()
            self._process = _FORKS.Process(target=paced.work, args=(theirs,), daemon=True)
            self._process.start()
        self._orders.send((list(words), dict(environment), str(log)))
        return Started(self._process, self._orders)

    def end(self) -> None:
        """Kills what runs there."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


class Started:
    """A run on a machine, as subprocess has processes."""

    def __init__(self, process: multiprocessing.Process, answers: multiprocessing.connection.Connection):
        self._process, self._answers = process, answers
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None and self._answers.poll():
            with contextlib.suppress(EOFError):
                self._status = self._answers.recv()
        return self._process.exitcode if self._status is None else self._status

    def wait(self, timeout: float = 1200) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"still runs after {timeout} s")
            time.sleep(0.05)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def terminate(self) -> None:
        os.kill(self._process.pid, signal.SIGTERM)


_FORKS = multiprocessing.get_context("forkserver")
_MACHINES = (Machine(), Machine())


class Scene(NamedTuple):
    """One disturbed run: where it is, its server's port, and the proxies of its two machines."""

    made: Bench
    name: str
    port: int
    proxies: tuple[object_store.Proxy, object_store.Proxy]
    chance: random.Random

    @property
    def address(self) -> str:
        return f"s3://bucket/runs/{self.name}"

    @property
    def proxy(self) -> object_store.Proxy:
        """That of the first machine."""
        return self.proxies[0]

    def cache(self, machine: int) -> Path:
        return self.made.folder / f"{self.name}-machine{machine}"

    def place(self, machine: int = 0) -> Path:
        """The local directory of a machine's run; the cache itself until there is one."""
        found = [p for p in self.cache(machine).glob(f"runs/*/{self.name}") if not p.parent.name.endswith("-read")]
        return found[0] if found else self.cache(machine)

    def log(self, machine: int = 0) -> str:
        path = self.cache(machine) / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, machine: int = 0) -> Started:
        """Starts, or continues, the run on a machine."""
        cache = self.cache(machine)
        cache.mkdir(exist_ok=True)
        environment = {
            **object_store.ENVIRONMENT,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxies[machine].port}",
            "STEPPE_CACHE": str(cache),
        }
        more = (f"--config.data.cache={self.made.folder}/cache", f"--workdir={self.address}")
        return _MACHINES[machine].start([*self.made.command[4:], *more], environment, cache / "log")


class Outcome(NamedTuple):
    """What became of a run. newest, resumed: the newest step sealed anywhere and the step gone on from, at every start
    after the first. said: lines that spoke of an outage."""

    statuses: list[int]
    newest: list[int]
    resumed: list[int]
    said: int


def disturb(runs: int, minutes: float, seed: int, only: str = "") -> list[str]:
    """Takes the scenarios whose name contains `only` in turn, prints what became of each; what is wrong."""
    began, failures, rows = time.monotonic(), [], collections.defaultdict(list)
    with small_bench(**CONFIG) as made, object_store.server() as port, contextlib.ExitStack() as stack:
        # the process that is copied imports jax, which then reads its environment
        tests = str(Path(__file__).parents[1])
        stack.enter_context(mock.patch.dict(os.environ, {**made.environment, **COMPILED, "PYTHONPATH": tests}))
        _FORKS.set_forkserver_preload(["exhaustive.paced"])
        proxies = tuple(stack.enter_context(object_store.Proxy(port)) for _ in range(2))
        whole = _undisturbed(made, port, proxies)
        chosen = [item for item in SCENARIOS.items() if only in item[0]]
        for number in range(runs):
            if time.monotonic() - began > minutes * 60:
                failures.append(f"{runs - number} runs were not made: the time was up")
                break
            name, scenario = chosen[number % len(chosen)]
            scene = Scene(made, f"run{number}", port, proxies, random.Random(1000 * seed + number))
            outcome, problem = Outcome([], [], [], 0), ""
            try:
                outcome = scenario(scene)
                problem = _lost(outcome) or _difference(scene, whole)
            except Exception as error:
                for machine in _MACHINES:
                    machine.end()
                problem = f"{type(error).__name__}: {error}; {scene.log()[-1500:]}"
            for proxy in proxies:
                proxy.turn("open")
            rows[name].append((outcome, problem))
            print(f"{number + 1:3} {name:<46} {outcome} {problem or 'equal'}", flush=True)
            failures += [f"run {number} ({name}): {problem}"] if problem else []
            for machine in range(3):
                shutil.rmtree(scene.cache(machine), ignore_errors=True)
        for machine in _MACHINES:
            machine.end()
        print(f"\n{table(rows)}\n\n{runs} runs in {(time.monotonic() - began) / 60:.0f} minutes")
    return failures


def table(rows: dict) -> str:
    """The table in Markdown."""
    lines = ["| outage | runs | statuses | newest sealed → gone on from | steps lost | lines said | bitwise equal |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, entries in rows.items():
        statuses = collections.Counter(status for outcome, _ in entries for status in outcome.statuses)
        shown = ", ".join(f"{status} × {count}" for status, count in sorted(statuses.items()))
        pairs = [pair for outcome, _ in entries for pair in zip(outcome.newest, outcome.resumed, strict=True)]
        steps = ", ".join(f"{newest} → {resumed}" for newest, resumed in pairs) or "-"
        lost = sum(max(0, newest - resumed) for newest, resumed in pairs)
        said = "/".join(str(outcome.said) for outcome, _ in entries)
        equal = sum(not problem for _, problem in entries)
        lines.append(f"| {name} | {len(entries)} | {shown} | {steps} | {lost} | {said} | {equal} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- comparison
def _undisturbed(made: Bench, port: int, proxies: tuple) -> Path:
    scene = Scene(made, "whole", port, proxies, random.Random(0))
    status = scene.start().wait()
    if status != FINISHED:
        raise RuntimeError(f"the undisturbed run ended with {status}: {scene.log()[-3000:]}")
    return scene.place()


def _lost(outcome: Outcome) -> str:
    return "" if outcome.newest == outcome.resumed else f"went on from {outcome.resumed}, sealed was {outcome.newest}"


def _difference(scene: Scene, whole: Path) -> str:
    """The first difference of what the address holds in the end, read by a machine that never saw the run."""
    from steppe.lm.keep import mirror

    environment = {**object_store.environment(scene.port), "STEPPE_CACHE": str(scene.cache(2))}
    with mock.patch.dict(os.environ, environment):
        place = Path(mirror.here(scene.address, checkpoints=True))
    with mock.patch.object(chaos, "STEPS", STEPS):
        problem = chaos.difference(whole, place)
    if sealed(place) != sealed(whole):
        problem = problem or f"checkpoints {sealed(place)}, not {sealed(whole)}"
    return problem


# ----------------------------------------------------------------------------------------------------------- scenarios
def _until(scene: Scene, run: Started, step: int, machine: int = 0) -> None:
    if not wait_until(run, lambda: seen(scene.place(machine), "train", step)()):
        raise RuntimeError(f"never came to step {step}")


def _said(scene: Scene, machine: int = 0) -> int:
    """The lines that spoke of an outage, each of which must tell its meaning."""
    lines = [line for line in scene.log(machine).splitlines() if "NOT COPIED" in line or "stopped:" in line]
    told = re.compile(
        r"anything newer than (step \d+|no checkpoint) is only in /|no answer for \d+ s; the stored files are"
    )
    dumb = [line for line in lines if not told.search(line)]
    if dumb or "Traceback" in scene.log(machine):
        raise RuntimeError(f"not said as it must be: {dumb or scene.log(machine)[-3000:]}")
    return len(lines)


def _resume(scene: Scene, statuses: list, machine: int = 0, newest: int | None = None) -> Outcome:
    """Continues to the end, and says from where."""
    held = sealed(scene.place(machine)) if newest is None else [newest]
    for _ in range(3):  # on a busy machine the server may not answer in time, which refuses a start
        statuses.append(scene.start(machine).wait())
        if statuses[-1] == FINISHED or "no answer for" not in scene.log(machine).splitlines()[-1]:
            break
    if statuses[-1] != FINISHED:
        raise RuntimeError(f"ended with {statuses}")
    starts = [record["step"] for record in records(scene.place(machine)) if record["kind"] == "run"]
    return Outcome(statuses, [max(held, default=0)], [starts[-1]], _said(scene, machine))


def outage(mode: str, then: str) -> Callable[[Scene], Outcome]:
    """A store that fails in one way from some step on; `then`: it mends, the run is killed, told to stop, or ends."""

    def scenario(scene: Scene) -> Outcome:
        run, proxy = scene.start(), scene.proxy
        _until(scene, run, scene.chance.randint(6, 11))
        proxy.length = scene.chance.randint(1, 3000)
        proxy.turn(mode)
        if mode != "slow":
            if not wait_until(run, lambda: "NOT COPIED" in scene.log()):
                raise RuntimeError("the outage was not said")
            if then != "ends":
                first = len(sealed(scene.place())) and sealed(scene.place())[-1]
                wait_until(run, lambda: sealed(scene.place())[-1:] > [first])  # something the address lacks
        time.sleep(scene.chance.random() * 0.5)
        if then == "ends":
            status = run.wait()
            if status != (FINISHED if mode == "slow" else STORAGE):
                raise RuntimeError(f"ended with {status}")
        elif then == "killed":
            run.kill()
            status = run.wait()
        elif then == "stopped":
            run.terminate()
            status = run.wait()
            if status not in ((STOPPED,) if mode == "slow" else (STORAGE,)):
                raise RuntimeError(f"ended with {status}")
        said = _said(scene)
        most = {"mends": 1, "killed": 1, "stopped": 2, "ends": 2}[then]  # the last where it ends with what is missing
        if mode != "slow" and not 1 <= said <= most:
            raise RuntimeError(f"said {said} times")
        proxy.turn("open")
        if mode == "skewed" and then != "mends":
            _skew(scene)
        if then == "mends":
            status = run.wait()
            again = "COPIED      again" in scene.log()
            if status != FINISHED or (mode != "slow" and not again) or _said(scene) != said:
                raise RuntimeError(f"ended with {status}, said {_said(scene)} times")
            return Outcome([status], [], [], said)
        return _resume(scene, [status])

    return scenario


def _skew(scene: Scene) -> None:
    """The machine's clock was wrong: its files are from another day."""
    for path in scene.place().rglob("*"):
        if path.is_file():
            hours = scene.chance.choice((-72, -1, 1, 72))
            os.utime(path, (time.time() + 3600 * hours,) * 2)


def bucket_gone(then: str) -> Callable[[Scene], Outcome]:
    """The bucket and all that is in it goes, and is made again while the run goes on, once it is killed, or ended."""

    def scenario(scene: Scene) -> Outcome:
        run = scene.start()
        _until(scene, run, scene.chance.randint(9, 16))
        object_store.remove_bucket()
        statuses = []
        try:
            if not wait_until(run, lambda: "NOT COPIED" in scene.log()):
                raise RuntimeError("the outage was not said")
            time.sleep(scene.chance.random())
            if then == "killed":
                run.kill()
            if then != "mends":
                statuses.append(run.wait())
        finally:
            object_store.make_bucket(scene.port)
        if then != "mends":
            return _resume(scene, statuses)
        status = run.wait()
        if status != FINISHED or _said(scene) != 1:
            raise RuntimeError(f"ended with {status}, said {_said(scene)} times")
        return Outcome([status], [], [], 1)

    return scenario


def killed_at_a_seal(forwards: bool, machine: int) -> Callable[[Scene], Outcome]:
    """SIGKILL while a seal is on its way, which arrives or does not; gone on from by this machine or by another."""

    def scenario(scene: Scene) -> Outcome:
        run, proxy = scene.start(), scene.proxy
        _until(scene, run, scene.chance.randint(6, 24))
        proxy.forwards = forwards
        proxy.held.clear()
        proxy.turn("hold seals")
        if not proxy.held.wait(30):
            raise RuntimeError("no seal was sent")
        time.sleep(scene.chance.random() * 0.3)
        run.kill()
        status = run.wait()
        proxy.turn("open")
        if not machine:
            return _resume(scene, [status])
        newest = max(_at_address(scene), default=0)
        return _resume(scene, [status], machine, newest)._replace(said=0)

    return scenario


def _at_address(scene: Scene) -> list[int]:
    from steppe.lm.keep.store import Store

    with mock.patch.dict(os.environ, object_store.environment(scene.port)):
        names = Store(scene.address, scene.place()).names()
    return [int(name.split("/")[1]) for name in names if name.endswith("/SEAL")]


def two_writers(cut_off: bool) -> Callable[[Scene], Outcome]:
    """Another machine takes the run over. cut_off: while the first cannot reach the address and goes on by itself; then
    nothing of either is touched."""

    def scenario(scene: Scene) -> Outcome:
        run = scene.start()
        _until(scene, run, scene.chance.randint(9, 16))
        if cut_off:
            scene.proxy.turn("paused")
            first = sealed(scene.place())[-1]
            wait_until(run, lambda: sealed(scene.place())[-1] > first + EVERY)
        other = scene.start(1)
        _until(scene, other, max(_at_address(scene), default=0) + 2, 1)
        if cut_off:
            scene.proxy.turn("open")
        status = run.wait()
        if status != REFUSED or "was taken over by process" not in scene.log():
            raise RuntimeError(f"the first ended with {status}")
        statuses = [status, other.wait()]
        if statuses[1] != FINISHED:
            raise RuntimeError(f"the second ended with {statuses[1]}: {scene.log(1)[-1500:]}")
        before, held = _contents(scene.place()), sealed(scene.place())
        again = scene.start()
        statuses.append(again.wait())
        refused = "nothing was changed" in scene.log()
        if cut_off and (statuses[-1] != REFUSED or not refused or _contents(scene.place()) != before):
            raise RuntimeError(f"the first, started again, ended with {statuses[-1]}")
        if not cut_off and statuses[-1] not in (FINISHED, REFUSED):
            raise RuntimeError(f"the first, started again, ended with {statuses[-1]}")
        if refused and not set(held) <= set(sealed(scene.place())):
            raise RuntimeError("what the first had sealed is gone")
        _said(scene)
        return Outcome(statuses, [], [], scene.log().count("was taken over by process"))

    return scenario


def _contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


WAYS = {"paused": "paused", "refused": "refused", "cut": "cut in the middle of an object", "full": "full",
        "skewed": "clock skew", "slow": "slow"}  # fmt: skip
SCENARIOS = {
    **{f"{name}, mends": outage(mode, "mends") for mode, name in WAYS.items()},
    **{f"{name}, run killed": outage(mode, "killed") for mode, name in WAYS.items()},
    **{f"{name}, run stopped": outage(mode, "stopped") for mode, name in WAYS.items()},
    **{f"{name}, run ends": outage(mode, "ends") for mode, name in WAYS.items()},
    **{f"bucket gone, {then}": bucket_gone(then) for then in ("mends", "killed", "ends")},
    "killed while sending a seal, which is lost": killed_at_a_seal(False, 0),
    "killed while sending a seal, which arrives": killed_at_a_seal(True, 0),
    "killed while sending a seal, another goes on": killed_at_a_seal(True, 1),
    "two writers": two_writers(False),
    "two writers, the first cut off": two_writers(True),
}
