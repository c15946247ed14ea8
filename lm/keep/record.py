"""A run's facts: its versions, its numbers, the code of optimizers from users' files, and what has changed since its
checkpoint. Reading the recorded code never runs it."""

import importlib.metadata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Required, TypedDict

import numpy as np
import xxhash
from ml_collections import ConfigDict

from steppe.configs import base
from steppe.configs.keys import ConfigError
from steppe.data import baselines, files, stored
from steppe.data.baselines import NAMES
from steppe.data.errors import DataError
from steppe.data.loader import Corpus
from steppe.lm.keep import workdir
from steppe.lm.keep.exits import Unusable, WorkdirError
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.leg import Leg
from steppe.lm.parts.memo import once
from steppe.optim.references import Source, sources


class Watched(TypedDict, total=False):
    """The dict of anomaly.Watch.memory()."""

    losses: list[tuple[stored.Count, float]]
    skipped: stored.Count
    windows: Required[list[tuple[stored.Count, stored.Count]]]


class Meta(TypedDict, total=False):
    """A checkpoint's metadata. Later versions added the keys that are not required."""

    config: Required[dict[str, Any]]
    versions: Required[dict[str, str]]
    corpus: Required[str]
    code: dict[str, str]
    wandb_id: Required[str]
    watch: Required[Watched]
    owes_evaluation: Required[bool]
    leg: Leg
    tokens: stored.Count
    tokens_per_step: stored.Amount
    flops_per_step: tuple[stored.Amount, stored.Amount]
    next: dict[Literal["learning_rate", "rho"], float]


def meta_of(found: Any, place: object) -> Meta:
    """A checkpoint's meta after checking its types and its config. Raises Unusable."""
    try:
        stored.typed(found, Meta, f"{place}: meta")
        base.completed(found["config"])
    except (DataError, ConfigError) as error:
        raise Unusable(f"{place}: {error}" if isinstance(error, ConfigError) else str(error)) from None
    return found


def versions() -> dict[str, str]:
    """Versions that a result depends on; `code` is a hash of the sources of data, lm and optim."""
    root, digest = Path(__file__).parents[2], xxhash.xxh3_64()
    for path in sorted(path for room in ("data", "lm", "optim") for path in (root / room).rglob("*.py")):
        digest.update(path.read_bytes())
    packages = ("steppe", "jax", "jaxlib", "flax", "optax")
    return {**{name: importlib.metadata.version(name) for name in packages}, "code": digest.hexdigest()}


def facts(config: ConfigDict, corpus: Corpus) -> dict[str, Any]:
    """The facts that every checkpoint of this start stores."""
    code = {source.reference: source.digest for source in _sources(config)}
    return {"config": config.to_dict(), "versions": versions(), "corpus": corpus.fingerprint, "code": code}


def changes(meta: Mapping, now: Mapping, allowed: Collection[str]) -> dict[str, list]:
    """{what: [before, now]} of config keys, versions, corpus and code that differ from the checkpoint's.

    meta: of the checkpoint, {} if there is none. now: this start's facts. Raises ConfigError if the corpus or the code
    of an optimizer from a user's file differs and `allowed` has no "corpus" or "code".
    """
    if not meta:
        return {}
    if meta["corpus"] != now["corpus"] and "corpus" not in allowed:
        raise ConfigError(
            "data.task",
            now["config"]["data"]["task"],
            f"the corpus the run began with (its fingerprint is {meta['corpus']}, this one's is {now['corpus']}), or "
            "--allow_change=corpus",
        )
    known = meta.get("code", {})
    for reference, digest in now["code"].items():
        if known.get(reference, digest) != digest and "code" not in allowed:
            part = "method" if now["config"]["optim"]["method"] == reference else "base"
            accepted = (
                f"the code the run began with (its sha256 is {known[reference]}, this one's is {digest}), stored in "
                f"the workdir's {workdir.CODE}, or --allow_change=code"
            )
            raise ConfigError(f"optim.{part}", reference, accepted)
    found = workdir.changes(meta["config"], now["config"])
    pairs = {
        "corpus": [meta["corpus"], now["corpus"]],
        "code": [known, now["code"]],
        **{f"version of {name}": [meta["versions"].get(name), new] for name, new in now["versions"].items()},
    }
    return {**found, **{key: pair for key, pair in pairs.items() if pair[0] != pair[1]}}


def references(corpus: Corpus, counts: np.ndarray, primary: bool) -> dict[str, dict]:
    """{held-out set: its baselines}, on the process that records them. counts: of each token in the training text."""
    names = corpus.held_out if primary else ()
    return once(
        "references",
        (corpus.fingerprint, primary),
        lambda: {name: baselines.baselines(corpus, name, counts) for name in names},
    )


def of_run(config: ConfigDict, parts: Parts, references: dict[str, dict]) -> dict:
    """The `run` record of metrics.jsonl; baselines in nats per token, like the losses."""
    budget = parts.budget
    shown = {}
    for name, found in references.items():
        for kind, label in NAMES.items():
            label += f" {name}" if len(references) > 1 else ""
            shown[label] = found[kind] * found["nats_per_bit_per_byte"]
    return {
        "title": f"{config.optim.method}, {budget.parameters.non_embedding:,} non-embedding parameters, "
        f"{budget.tokens:,} tokens",
        "parameters": budget.parameters._asdict(),
        "steps": budget.steps,
        "tokens": budget.tokens,
        "flops_per_step": budget.flops,
        "adamw_flops_per_step": budget.adamw_flops,
        "tokens_per_step": budget.tokens_per_step,
        "positions": budget.positions,
        "positions_per_step": budget.positions_per_step,
        "flops": budget.total_flops,
        "adamw_flops": budget.total_adamw_flops,
        "mesh": dict(parts.mesh.shape),
        "baselines": shown,
        "baselines_bits_per_byte": {name: {k: found[k] for k in NAMES} for name, found in references.items()},
        "versions": versions(),
    }


# ----------------------------------------------------------------------------------------------- code from users' files
class Code(TypedDict):
    """One recorded file: its reference in the config, sha256 and text."""

    reference: str
    sha256: str
    text: str


def _sources(config: ConfigDict) -> list[Source]:
    return list(sources({"method": config.optim.method, "base": config.optim.base}).values())


def keep_code(directory: str, config: ConfigDict) -> None:
    """Records the texts of a config's optimizers from users' files in its workdir."""
    found = [Code(reference=s.reference, sha256=s.digest, text=s.text) for s in _sources(config)]
    if found:
        files.write_json(Path(directory) / workdir.CODE, found)


def same_code(directory: str, config: ConfigDict) -> None:
    """Runs a config's optimizers from users' files. Raises WorkdirError if a file differs from the recorded one."""
    path = Path(directory) / workdir.CODE
    try:
        kept = {each["reference"]: each["sha256"] for each in stored.read(path, list[Code])} if path.exists() else {}
    except DataError as error:
        raise WorkdirError(str(error)) from None
    for source in _sources(config):
        if kept.get(source.reference) != source.digest:
            raise WorkdirError(
                f"{directory}: {source.reference} must be the file that the run was trained with, of sha256 "
                f"{kept.get(source.reference)}, but has {source.digest}; {path} holds its text"
            )
