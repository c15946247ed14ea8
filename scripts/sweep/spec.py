"""Which runs a sweep has: turns blocks of plain Python data, or flags, into overrides of config keys; names runs.

A spec file defines get_spec(), which returns a block, a list of blocks, or {"blocks": [...], "halving": {...}}. The
runs of a block are all combinations of

    "set":  {key: value}                      the same in every run
    "grid": {key: [value, ...], ...}          every combination
    "zip":  {key: [value, ...], ...}          values in step: lists of one length
    "list": [{key: value, ...}, ...]          these overrides

then changed and filtered, in this order, by

    "where":   [{"if": {key: value or [value, ...]}, "set": {key: value}}, ...]   overrides of the runs that match
    "only":    {key: value or [value, ...]}                                       leaves out runs that do not match
    "exclude": [{key: value or [value, ...]}, ...]                                leaves out runs that match one

Keys are those of configs/base.py; values are as in a config. None is a key's default; a tuple is one value.
"""

import hashlib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

from steppe.configs.keys import named
from steppe.configs.only import split, text_of
from steppe.configs.read import UsageError, call
from steppe.data import stored

_Rule = TypedDict("_Rule", {"if": dict[str, Any], "set": dict[str, Any]})
_Block = TypedDict(  # noqa: UP013  a class would take `set` and `list` for its own
    "_Block",
    {"set": dict[str, Any], "grid": dict[str, Any], "zip": dict[str, Any], "list": list[dict[str, Any]],
     "where": list[_Rule], "only": dict[str, Any], "exclude": list[dict[str, Any]] | dict[str, Any]},
    total=False,
)  # fmt: skip
PACKAGE = "steppe.configs.sweeps"
_SAFE = re.compile(r"[^A-Za-z0-9._+=,%-]")
_LONGEST = 150  # characters of a run's name


def load(text: str) -> tuple[list[dict], dict]:
    """(blocks, settings of successive halving or {}) of a named sweep, a dotted module or a file, each optionally with
    :ARGUMENT. Raises UsageError."""
    found = call("--sweep", text, "get_spec", PACKAGE)
    halving = {}
    if isinstance(found, Mapping) and "blocks" in found:
        if unknown := [key for key in found if key not in ("blocks", "halving")]:
            raise UsageError(f"--sweep = {text}: {unknown[0]}: must be blocks or halving")
        found, halving = found["blocks"], found.get("halving", {})
    blocks = [found] if isinstance(found, Mapping) else found
    if not isinstance(blocks, Sequence) or not blocks or not all(isinstance(block, Mapping) for block in blocks):
        raise UsageError(f"--sweep = {text}: get_spec must return a block or a list of blocks; see configs/sweeps")
    return [dict(block) for block in blocks], halving


def from_flags(grids: Sequence[str], zips: Sequence[str]) -> dict:
    """The block of --grid KEY=VALUE,VALUE and --zip KEY=VALUE,VALUE flags. Raises UsageError."""

    def read(flag: str, texts: Sequence[str]) -> dict[str, list[str]]:
        found = {}
        for text in texts:
            key, equals, values = text.partition("=")
            if not (equals and key and values):
                raise UsageError(f"{flag} {text}: must be KEY=VALUE,VALUE,..., such as optim.rho=0.01,0.03")
            if key in found:
                raise UsageError(f"{flag} {key}: must be given once, with all its values")
            found[key.removeprefix("config.")] = split(values)
        return found

    return {"grid": read("--grid", grids), "zip": read("--zip", zips)}


def expand(blocks: Sequence[Mapping]) -> list[dict[str, str]]:
    """{key: text as on the command line} of every run of the blocks, in order, without duplicates.

    Raises UsageError, or stored.Wrong for a block of another shape.
    """
    found = [run for number, block in enumerate(blocks, 1) for run in _expand_block(block, number)]
    found = [_own(run, blocks) for run in found]
    return list({tuple(sorted(run.items())): run for run in reversed(found)}.values())[::-1]


def _own(run: dict[str, str], blocks: Sequence[Mapping]) -> dict[str, str]:
    """Resets varied options that the run's method does not have, so that adamw in a grid over rho is one run."""
    ranged = {
        key.removeprefix("config.") for block in blocks for part in ("grid", "zip") for key in block.get(part) or ()
    }
    options = {name: run.get(f"optim.{name}") for name in named("optim.methods:OPTIONS") if f"optim.{name}" in ranged}
    foreign = named("optim.methods:foreign")(run.get("optim.method", ""), options)
    return run | {f"optim.{name}": "None" for name in foreign}


def _expand_block(block: Mapping, number: int) -> list[dict[str, str]]:
    def refused(what: str) -> UsageError:
        return UsageError(f"block {number} of the sweep: {what}")

    def text(key: str, value: Any) -> str:
        try:
            return text_of(value)
        except UsageError as error:
            raise refused(f"{key} = {error}") from None

    def texts(values: Mapping) -> dict[str, str]:
        for key, value in values.items():
            if isinstance(value, list):
                raise refused(f"{key} = {value!r}: must be one value here; several go into grid")
        return {key.removeprefix("config."): text(key, value) for key, value in values.items()}

    def several(part: str) -> dict[str, Sequence]:
        lists = {key: _listed(values) for key, values in (block.get(part) or {}).items()}
        for key, values in lists.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise refused(f"{key} = {values!r}: must be a list of values")
        return lists

    def matches(run: Mapping[str, str], rule: Mapping) -> bool:
        if unknown := [key for key in rule if key not in keys]:
            raise refused(f"{unknown[0]}: must be a key that this block sets, to choose runs by it")
        accepted = {key: each if isinstance(each, list) else [each] for key, each in rule.items()}
        return all(run.get(key) in [text(key, value) for value in each] for key, each in accepted.items())

    if unknown := [part for part in block if part not in _Block.__annotations__]:
        raise refused(f"{unknown[0]}: must be one of {', '.join(_Block.__annotations__)}")
    stored.typed(block, _Block, f"block {number} of the sweep")
    axes = [[texts(block.get("set", {}))]]
    axes += [[{key: text(key, value)} for value in values] for key, values in several("grid").items()]
    if columns := several("zip"):
        if len(set(map(len, columns.values()))) > 1:
            shown = ", ".join(f"{key} has {len(values)}" for key, values in columns.items())
            raise refused(f"zip: must be lists of one length, and {shown}")
        axes.append([texts(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)])
    if block.get("list"):
        axes.append(list(map(texts, block["list"])))
    keys = [key for axis in axes for key in dict.fromkeys(key for entry in axis for key in entry)]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise refused(f"{twice[0]}: must be in one of set, grid, zip and list")
    runs = [dict(itertools.chain(*map(dict.items, entries))) for entries in itertools.product(*axes)]
    for rule in block.get("where", ()):
        changed = texts(rule["set"])
        runs = [run | changed if matches(run, rule["if"]) else run for run in runs]
        keys += changed
    runs = [run for run in runs if matches(run, block.get("only") or {})]
    excluded = block.get("exclude", ())
    for rule in [excluded] if isinstance(excluded, Mapping) else excluded:
        runs = [run for run in runs if not matches(run, rule)]
    return runs


def _listed(values: Any) -> Any:
    return values.tolist() if type(values).__module__ == "numpy" and getattr(values, "ndim", 0) == 1 else values


def name_run(config: Mapping[str, Any], varying: Sequence[str], taken: Collection[str]) -> str:
    """A name for a run, safe as a file name and not yet taken: size=0.1m,method=sam,rho=0.03,seed=0.

    config: flat, every key. varying: the keys that distinguish it, seed last; keys that are None are left out.
    """
    ends = [key.rsplit(".", 1)[-1] for key in config]
    parts = []
    for key in sorted(varying, key=lambda key: key == "seed"):
        short = key.rsplit(".", 1)[-1]
        if config[key] is not None and config[key] != "":
            value = _SAFE.sub("", text_of(config[key]).replace("/", "_").replace(",", "+"))
            parts.append(f"{short if ends.count(short) == 1 else key}={value}")
    name = ",".join(parts) or "run"
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]},{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return next(n for n in itertools.chain([name], (f"{name}~{k}" for k in itertools.count(2))) if n not in taken)
