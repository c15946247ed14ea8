"""Prepares a corpus: first a plan, then shards in parallel, then the manifest.

An interrupted `prepare` resumes when it is called again. data/cache.py calls it for runs without a prepared directory.
"""

import contextlib
import glob
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import xxhash

from steppe.configs import packages
from steppe.data import files, readers, sources, stored
from steppe.data import manifest as manifests
from steppe.data.errors import BadRecords, CorpusMismatch, DataError, Refusal, StorageError, from_json, refused, to_json
from steppe.data.manifest import Manifest
from steppe.data.packing import PACKINGS, token_dtype
from steppe.data.prepare import shards
from steppe.data.prepare import workers as workers_of
from steppe.data.prepare.shards import LOCK, Job, Recipe
from steppe.data.readers import plain
from steppe.data.vocabulary import load_tokenizer, read_model

PLAN = "preparation.json"  # the plan of an unfinished preparation
SAMPLES = "samples"  # key of an identity: hashes of file contents, by source
BAD = "refused.json"  # the error of one of several processes, for the others
POLL = 1.0  # seconds between checks for shards that other processes finished
REFUSED = 3  # exit status of `python -m steppe.data.prepare` after an error, whose JSON is the last line of stderr


def recipe_of(data_config: Mapping, **overrides) -> Recipe:
    """Makes the recipe from config.data and checks it. Raises DataError."""
    values = {field: data_config[field] for field in Recipe._fields} | overrides
    recipe = Recipe(**{**values, "held_out": tuple(values["held_out"])})
    for key, good, accepted in (
        ("sequence_length", recipe.sequence_length > 0, "an integer > 0"),
        ("packing", recipe.packing in PACKINGS, " or ".join(PACKINGS)),
        ("shards", 0 < recipe.shards < 100_000, "an integer from 1 to 99999"),
        ("held_out_fraction", 0 <= recipe.held_out_fraction < 1, "a fraction from 0 to below 1"),
        ("bad_records", 0 <= recipe.bad_records <= 1, "a fraction from 0 to 1"),
        ("text_field", bool(recipe.text_field), "the name of a field"),
    ):
        if not good:
            raise refused(f"data.{key}", getattr(recipe, key), accepted)
    sources_of(recipe)
    return recipe


def sources_of(recipe: Recipe) -> dict[str, tuple[sources.Source, ...]]:
    """{part: its sources}. Held-out sets come first, so that training can exclude documents equal to theirs."""
    train = sources.parse(recipe.task) if recipe.task or not recipe.held_out else ()
    return {"held_out": sources.held_out_sources(recipe.task, recipe.held_out), "train": train}


def identity(recipe: Recipe) -> dict:
    """The identity of a preparation: recipe, vocabulary, state of the sources, and format."""
    listed, known = sources_of(recipe), recipe._asdict()
    of_files = {f"{s.kind}:{s.where}": s for part in listed.values() for s in part if s.kind in sources.FILES}
    samples = {name: digest for name, source in of_files.items() if (digest := plain.sample(source))}
    if not recipe.seqio_module:  # a newer key: without it, identities of old corpora stay the same
        del known["seqio_module"]
    return {
        **known,
        "vocabulary": load_tokenizer(recipe.vocabulary).fingerprint,
        "held_out": list(recipe.held_out),
        "sources": {
            f"{source.kind}:{source.where}": readers.READERS[source.kind].fingerprint(source, recipe.reading)
            for source in (*listed["train"], *listed["held_out"])
        },
        "format": manifests.FORMAT,
        **({SAMPLES: samples} if samples else {}),
    }


def without_samples(identity: Mapping) -> dict:
    """An identity in the form of older versions, which did not hash file contents."""
    return {key: value for key, value in identity.items() if key != SAMPLES}


def prepare(
    recipe: Recipe,
    out: str,
    workers: int = 1,
    log: Callable[[str], None] = print,
    report: Callable[[dict], None] = lambda state: None,
    *,
    wait: bool = False,
    together: bool = False,
) -> Manifest:
    """Prepares `recipe` in directory `out` and returns the manifest. Resumes an interrupted preparation.

    workers: processes that write shards; the result does not depend on their number. report: called about twice a
    second with the counts {shards, of, documents, tokens, bytes}. wait: waits for another process that prepares `out`,
    instead of an error. together: works with other processes, on this or other hosts that share `out`. Each writes
    different shards, and the manifest is the same as that of a single process.
    Never changes a finished directory: verifies it for the same recipe, raises CorpusMismatch for another. Also raises
    DataError for bad input and StorageError if a file cannot be written.
    """
    expected = identity(recipe)
    if os.path.exists(os.path.join(out, manifests.NAME)):
        return _already(out, expected, log)
    if os.path.isdir(out) and _foreign(out):
        raise DataError(f"--out={out}: exists and is not a preparation; choose an empty or new directory")
    tokenizer = load_tokenizer(recipe.vocabulary)
    for source in {(s.kind, s.where, s.split): s for part in sources_of(recipe).values() for s in part}.values():
        readers.READERS[source.kind].check(source, recipe.reading, log)
    if os.path.lexists(out) and not os.path.isdir(out):
        raise DataError(f"--out={out}: exists and is not a directory; choose an empty or new one")
    created = not os.path.exists(out)
    try:
        os.makedirs(out, exist_ok=True)
        work = lambda: _run(recipe, out, tokenizer, expected, workers, log, report, together)  # noqa: E731
        if together:
            return _with_others(out, expected, log, work)
        with files.lock(os.path.join(out, LOCK), wait=wait):
            return _alone(out, expected, log, created, work)
    except files.Held:
        raise DataError(
            f"--out={out}: another process is preparing it; wait for it, or join it with --together"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        remedy = "finished shards remain; run again"
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror or error}; {remedy}") from error


def _alone(out: str, expected: dict, log, created: bool, work: Callable[[], Manifest]) -> Manifest:
    if os.path.exists(os.path.join(out, manifests.NAME)):
        return _already(out, expected, log)
    try:
        _start(out, expected, log)
        manifest = work()
    except KeyboardInterrupt:
        _remove_leftovers(out)
        raise
    except (DataError, OSError) as error:
        _remove_leftovers(out)
        # Bad input leaves no files; an interrupted valid preparation keeps its finished shards.
        if isinstance(error, BadRecords) or not _any_shard(out):
            _clear(out, created)
        raise
    _tidy(out, manifest)
    return manifest


def _with_others(out: str, expected: dict, log, work: Callable[[], Manifest]) -> Manifest:
    """Workers share the lock. A process that gets it exclusively, as first or last, may clean up."""
    lock, bad, done = (os.path.join(out, name) for name in (LOCK, BAD, manifests.NAME))
    try:
        while True:
            with contextlib.suppress(files.Held), files.lock(lock):
                if not os.path.exists(done):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(bad)
                    _start(out, expected, log)
            with files.lock(lock, wait=True, shared=True):
                if os.path.exists(done):
                    return _already(out, expected, log)
                if not os.path.exists(os.path.join(out, PLAN)):
                    continue  # others gave up and cleared it in the meantime
                _refuse_what_others_refused(out)
                _compare(f"{out} holds an unfinished part of", manifests.read_json(os.path.join(out, PLAN)), expected)
                try:
                    return work()
                except BadRecords as error:
                    files.write_json(bad, to_json(error))
                    raise
    finally:
        with contextlib.suppress(files.Held), files.lock(lock):
            if os.path.exists(done):
                _tidy(out, manifests.read(out))
            elif os.path.exists(bad) or not _any_shard(out):
                _clear(out, created=False, spared=(LOCK,))  # others may wait for the lock


def _refuse_what_others_refused(out: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        raise from_json(stored.read(os.path.join(out, BAD), Refusal))


def same(out: str, manifest: Manifest, expected: dict) -> None:
    """Raises CorpusMismatch if a finished directory has another identity than `expected`."""
    _compare(f"{out} is finished and holds", manifest["identity"], expected)


def _already(out: str, expected: dict, log: Callable[[str], None]) -> Manifest:
    manifest = manifests.read(out)
    same(out, manifest, expected)
    manifests.verify(out, manifest, "full")
    log(f"{out} is already prepared and intact")
    return manifest


def _compare(prefix: str, have: dict, expected: dict) -> None:
    # bad_records does not change the written rows. Keys that a plan lacks are newer than it and were not used.
    if SAMPLES not in have:  # prepared by a version that did not hash file contents
        expected = without_samples(expected)
    for key in sorted(expected.keys() | have.keys()):
        if (have.get(key) or "") != (expected.get(key) or "") and key not in ("bad_records", "checksum"):
            change = f"{key} is {have.get(key)!r} there, {expected.get(key)!r} now"
            raise CorpusMismatch(f"{prefix} another preparation: {change}; choose another directory")


def _foreign(out: str) -> bool:
    """Whether a directory has files but is not a preparation."""
    names = [name for name in os.listdir(out) if name != LOCK and not name.endswith(files.ASIDE)]
    return bool(names) and not {PLAN, manifests.NAME} & {*names}


def _start(out: str, expected: dict, log: Callable[[str], None]) -> None:
    plan = os.path.join(out, PLAN)
    if os.path.exists(plan):
        _compare(f"{out} holds an unfinished part of", manifests.read_json(plan), expected)
        log(f"continuing the preparation in {out}")
    else:
        manifests.write_json(plan, expected)
    _remove_leftovers(out)


def _remove_leftovers(out: str) -> None:
    for name in _made(out):
        if name.endswith(files.ASIDE):
            os.unlink(os.path.join(out, name))


def _made(out: str) -> list[str]:
    """The names of all files in a directory that a preparation makes. Other files belong to the user."""
    return [
        name
        for folder, _, inside in os.walk(out)
        for name in (os.path.relpath(os.path.join(folder, each), out) for each in inside)
        if _MADE.fullmatch(name)
    ]


_MADE = re.compile(
    rf"({'|'.join(map(re.escape, (PLAN, BAD, LOCK, manifests.NAME, manifests.NAME + LOCK, manifests.VOCABULARY)))}"
    rf"|(train|held_out)/[^/]+/\d{{5}}-of-\d{{5}}\.array_record(\.json|\.digests|{re.escape(LOCK)})?)"
    rf"(\.[^/]+{re.escape(files.ASIDE)})?"
)


def _any_shard(out: str) -> bool:
    return bool(glob.glob(os.path.join(glob.escape(out), "*", "*", "*.array_record.json")))


def _clear(out: str, created: bool, spared: Sequence[str] = ()) -> None:
    for name in sorted(set(_made(out)) - {*spared}, key=lambda name: name == PLAN):  # the plan last: it marks `out`
        os.unlink(os.path.join(out, name))
    for folder, _, _ in os.walk(out, topdown=False):
        if folder != out or created:
            with contextlib.suppress(OSError):  # it has files of the user
                os.rmdir(folder)


def _run(recipe: Recipe, out: str, tokenizer, expected: dict, workers: int, log, report, together: bool) -> Manifest:
    began = time.time()
    dtype = token_dtype(tokenizer.vocab_size)
    parts = {}
    for part, listed in sources_of(recipe).items():
        count = recipe.shards if part == "train" else 1
        jobs = [Job(part, source, shard, count) for source in listed for shard in range(count)]
        done = _run_jobs(recipe, out, jobs, dtype, workers, report, together)
        parts[part] = [_component(recipe, part, source, done[source.name], log) for source in listed]
        _refuse_bad(recipe, part, parts)
    manifest = {
        "format": manifests.FORMAT,
        "code_version": packages.Requirement(packages.OWN, "", "").version or "unknown",
        "python": sys.version.split()[0],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": recipe.task,
        "sequence_length": recipe.sequence_length,
        "packing": recipe.packing,
        "dtype": dtype,
        "vocabulary": {
            "spec": recipe.vocabulary,
            "fingerprint": tokenizer.fingerprint,
            "size": tokenizer.vocab_size,
            "file": None,
        },
        **parts,
        "identity": expected,
    }
    manifest["fingerprint"] = _fingerprint(manifest)
    with files.lock(os.path.join(out, manifests.NAME + LOCK), wait=True):
        if not os.path.exists(os.path.join(out, manifests.NAME)):
            manifest["vocabulary"]["file"] = _copy_vocabulary(recipe.vocabulary, out)
            manifests.write_json(os.path.join(out, manifests.NAME), manifest)
    log(f"prepared {out} in {time.time() - began:.1f} s")
    return manifests.read(out)


def _component(recipe: Recipe, part: str, source: sources.Source, entries: list[dict], log) -> dict:
    faults = sum((Counter(entry["faults"]) for entry in entries), Counter())
    totals = {key: sum(entry[key] for entry in entries) for key in COUNTS}
    places = {fault: place for entry in entries[::-1] for fault, place in entry["places"].items()}
    listed = shards.listed(faults, places)
    used = totals["tokens"] / max(1, totals["rows"] * recipe.sequence_length)
    log(
        f"{part} {source.name}: {totals['documents']:,} documents, {totals['bytes']:,} bytes, "
        f"{totals['tokens']:,} tokens in {totals['rows']:,} rows ({used:.1%} used); bad records: {listed}; "
        f"excluded as held-out text: {totals['overlap']:,}"
    )
    if not totals["documents"]:
        name = f"{source.name} ({source.address}@{source.split})"
        raise BadRecords(f"{part} set {name} has no documents{_hint(recipe, source)}")
    return {
        **source._asdict(),
        **totals,
        "faults": dict(sorted(faults.items())),
        "places": places,
        "documents_hash": xxhash.xxh3_128_hexdigest("".join(entry["documents_hash"] for entry in entries).encode()),
        "shards": [{key: entry[key] for key in ("file", "size", "hash", "content", "rows")} for entry in entries],
    }


def _refuse_bad(recipe: Recipe, part: str, parts: dict[str, list[dict]]) -> None:
    """Raises BadRecords if a source has too many. Counts a held-out split together with its training source."""

    def name_of(entry: dict) -> str:
        return f"{entry['kind']}:{entry['where']}"

    training = {name_of(source._asdict()) for source in sources_of(recipe)["train"]}
    for where in {name_of(entry) for entry in parts[part]}:
        if part == "held_out" and where in training:
            continue
        entries = [entry for listed in parts.values() for entry in listed if name_of(entry) == where]
        faults = sum((Counter(entry["faults"]) for entry in entries), Counter())
        records = sum(entry["records"] for entry in entries)
        if faults.total() > recipe.bad_records * records:
            places = {fault: where for entry in entries for fault, where in entry["places"].items()}
            raise BadRecords(
                f"config.data.bad_records = {recipe.bad_records:g}: {faults.total():,} of {records:,} records of "
                f"{where} are bad ({faults.total() / records:.2%}: {shards.listed(faults, places)}); {shards.REMEDY}"
            )


COUNTS = ("records", "documents", "tokens", "bytes", "rows", "overlap")


def _hint(recipe: Recipe, source: sources.Source) -> str:
    """A remedy for a set without documents, as the end of an error line."""
    if source.kind in sources.PREPARED or source.split == "all":
        return ""
    every = readers.READERS[source.kind].records(source._replace(split="all"), recipe.reading)
    if len(list(itertools.islice(every, 2))) < 2:
        remedy = "one document cannot be split: name another source in config.data.held_out, such as val=text:OTHER@all"
        return f"; {remedy}, and add @all to this one"
    if source.split == "train":
        return "; lower config.data.held_out_fraction"
    return "; raise config.data.held_out_fraction or name sets in config.data.held_out, such as val=lines:val.txt@all"


def _fingerprint(manifest: dict) -> str:
    known = {key: manifest[key] for key in ("format", "sequence_length", "packing", "dtype")}
    known["vocabulary"] = manifest["vocabulary"]["fingerprint"]
    for part in ("train", "held_out"):
        known[part] = [[c["name"], c["weight"], *(shard["content"] for shard in c["shards"])] for c in manifest[part]]
    return manifests.checksum(known)


def _copy_vocabulary(spec: str, out: str) -> manifests.File | None:
    if spec == "bytes":
        return None
    path = os.path.join(out, manifests.VOCABULARY)
    model = read_model(spec)
    files.write(path, model)
    return {"file": manifests.VOCABULARY, "size": len(model), "hash": files.content_hash(path)}


def _tidy(out: str, manifest: Manifest) -> None:
    """Deletes temporary files of a finished preparation and makes the others read-only. The caller holds the lock."""
    keep = {entry["file"] for entry in manifests.shards(manifest)} | {manifests.NAME, manifests.VOCABULARY}
    for name in _made(out):
        path = os.path.join(out, name)
        if name in keep:
            os.chmod(path, 0o444)
        else:
            os.unlink(path)


def _run_jobs(
    recipe: Recipe, out: str, jobs: list[Job], dtype: str, workers: int, report, together: bool
) -> dict[str, list[dict]]:
    # with others, compare sizes only: hashes would make every host read the whole corpus
    known = shards.written if together else shards.finished
    entries = {job: known(out, job) for job in jobs}
    counts = [0, 0, 0]

    def tell(totals: Sequence[int]) -> None:
        done = sum(entry is not None for entry in entries.values())
        report({"shards": done, "of": len(jobs), **dict(zip(("documents", "tokens", "bytes"), totals, strict=True))})

    while waiting := [job for job in jobs if entries[job] is None]:
        free = [job for job in waiting if not files.is_held(os.path.join(out, job.file) + LOCK)]
        before = tuple(counts)

        def tell_more(more: Sequence[int], before=before) -> None:
            counts[:] = [a + b for a, b in zip(before, more, strict=True)]
            tell(counts)

        run = workers_of.run if min(workers, len(free)) > 1 else workers_of.run_here
        for job, entry in run(out, recipe, free, dtype, workers, tell_more):
            entries[job] = entry
            _refuse_what_others_refused(out)
        if not free:
            tell(counts)
            time.sleep(POLL)
            _refuse_what_others_refused(out)
        entries.update({job: shards.written(out, job) for job in waiting if entries[job] is None})
    tell(counts)
    listed: dict[str, list[dict]] = {}
    for job, entry in entries.items():
        assert entry is not None
        listed.setdefault(job.source.name, []).append(entry)
    return listed
