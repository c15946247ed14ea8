"""A training run from a config: data, step, evaluate, log, checkpoint, stop. Reads top to bottom."""

import importlib.metadata
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from steppe.configs.keys import ConfigError
from steppe.data import baselines, cache, loader
from steppe.data.errors import DataError
from steppe.lm import plot
from steppe.lm.keep import checkpoint, workdir
from steppe.lm.measure.in_training import make_measurement, twice_differentiable
from steppe.lm.model.mesh import batch_sharding, local_rows, place_batch
from steppe.lm.run import anomaly, generate
from steppe.lm.run.assembly import Parts, assemble
from steppe.lm.run.budget import describe
from steppe.lm.run.evaluate import evaluate, make_evaluation_step
from steppe.lm.run.signals import StopSignals
from steppe.lm.run.state import State, create, create_from
from steppe.lm.run.step import make_step
from steppe.lm.run.tracking import Tracker
from steppe.optim.schedules import duration_steps

BASELINES = {"unigram": "unigram", "gzip": "gzip -9"}
# Exit statuses. 74 is EX_IOERR, 75 EX_TEMPFAIL: run the same command again to continue.
FINISHED, ANOMALY, STORAGE, STOPPED = 0, 3, 74, 75


def run(config: ConfigDict, directory: str, allow_change: Collection[str] = (), until: int | None = None) -> int:
    """Runs or continues the run of `directory` to its end; returns the exit status.

    allow_change: config keys (or "corpus") that may differ from what the run had so far. until: stops after this step,
    as if asked to; schedules stay those of the whole run. Raises, before anything is compiled, ConfigError, DataError,
    WorkdirError or Unusable for what cannot run, each one line; and OSError when the workdir or the checkpoints cannot
    be written any more.
    """
    primary = jax.process_index() == 0
    log = (lambda text: print(text, flush=True)) if primary else (lambda text: None)

    # ----------------------------------------------------------------------------------------- the corpus, the parts
    corpus, parts, counts = open_parts(config, log)
    budget, total = parts.budget, parts.budget.steps
    # before the workdir is taken, in case one of them cannot be used
    place, given = checkpoint.place(checkpoint_directory(config, directory)), None
    if config.init_from and workdir.is_new(directory):
        given = checkpoint.load_params(config.init_from, parts.abstract.params, log)

    with ExitStack() as stack:
        run_id = stack.enter_context(workdir.claim(directory, config, primary, allow_change))
        report_parts(config, parts, corpus, log)
        stopping = stack.enter_context(StopSignals())

        # ------------------------------------------------------------------------------------- state, new or restored
        def steps(duration: str) -> int:
            return duration_steps(duration, tokens_per_step=budget.tokens_per_step, total_steps=total)

        evaluate_every, checkpoint_every = max(1, steps(config.evaluate.every)), max(1, steps(config.checkpoint.every))
        checkpoints = checkpoint.Checkpoints(
            place, config.checkpoint.keep, steps(config.checkpoint.keep_every),
            checkpoint_every, run_id, log=log,
        )  # fmt: skip
        stack.callback(checkpoints.close)

        def fresh() -> State:
            if not config.init_from:
                return create(parts.mesh, parts.initialise)
            params = checkpoint.load_params(config.init_from, parts.abstract.params, log) if given is None else given
            return create_from(parts.abstract, parts.optimizer, params)

        def load(before: int | None = None) -> tuple[State, dict]:
            """The state and meta of the newest sound checkpoint (before a step), or of the beginning."""
            newest = checkpoints.newest(before)
            return (fresh(), {}) if newest is None else checkpoints.restore(newest, parts.abstract)

        state, meta = load()
        given = None
        done = int(state.step)
        now = {"config": config.to_dict(), "versions": versions(), "corpus": corpus.fingerprint}
        changed = changes(meta, now, allow_change) if meta else {}
        if done:
            log(f"continuing  after step {done} of {total}")
        if until is not None and until <= done < total:
            log(f"stopped     after step {done} already, and it was to be {until}")
            return STOPPED
        watch = anomaly.Watch(config, meta["watch"] if meta else None)
        tracker = Tracker(
            directory, config, total_steps=total, tokens_per_step=budget.tokens_per_step, start_step=done,
            flops_per_step=budget.flops, wandb_id=meta["wandb_id"] if meta else "", primary=primary,
        )  # fmt: skip
        ended = "failed"
        stack.callback(lambda: tracker.close(ended))
        references = {name: baselines.baselines(corpus, name, counts) for name in corpus.held_out} if primary else {}
        tracker.run(done, run_record(config, parts, references))
        for key, (before, after) in changed.items():
            tracker.note(f"changed     {key}: {before!r} until step {done}, {after!r} from here on")
            tracker.event("change", done, {"key": key, "before": before, "after": after})

        # --------------------------------------------------------------------------------------------- compiled steps
        began = time.monotonic()
        step = compile_step(parts, abstract_batch(parts, corpus, config.train.batch_size))
        evaluation_step = jax.jit(make_evaluation_step(parts.objective, parts.shape, parts.options))
        if config.curvature.every:
            bend = make_measurement(twice_differentiable(parts), config.curvature.groups, config.train.microbatches)
            batch = abstract_batch(parts, corpus, config.train.batch_size)
            bend = bend.lower(parts.abstract.params, batch).compile()
        log(f"compiled    in {time.monotonic() - began:.1f} s")

        # ------------------------------------------------------------------------------ what the loop does beside steps
        def held_out(batches: int) -> bool:
            """Evaluates at theta, every set or none: False if a signal to stop came first."""
            found, sequences = {}, config.evaluate.batch_size or config.train.batch_size
            for name in corpus.held_out:
                found[name] = evaluate(
                    evaluation_step, state.params, corpus, name, parts.mesh, sequences, batches, stopping.asked
                )
                if found[name] is None:
                    return False
            for name, values in found.items():
                tracker.evaluation(done, name, values)
            latest.update(found)
            return True

        def measure() -> None:
            """Records how the loss bends at theta on one held-out batch, the same all through the run."""
            jax.block_until_ready(state)  # steps still under way are not the measurement's
            since = time.monotonic()
            batch = place_batch(parts.mesh, config.train.batch_size, rows, held_out_batch)
            found = jax.tree.map(float, jax.device_get(bend(state.params, batch)))
            measured.append(time.monotonic() - since)
            tracker.measurement("curvature", done, {**found, "seconds": measured[-1]})

        def settle() -> dict | None:
            """Records the metrics of the step before, which the device has finished by now; what must end this attempt.

            That is what Watch.judge says, with the step, of a bad step that is not simply skipped.
            """
            if not pending:
                return None
            number, metrics, waited = pending.pop()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            tracker.step(number, {**metrics, "data_wait": waited})
            found = watch.judge(number, metrics)
            if found is None:
                return None
            tracker.note(anomaly.describe(number, found))
            if primary:
                index = watch.batch_index(number - 1)
                batch = loader.training_rows(corpus, config.seed, index, config.train.batch_size)
                found["batch"] = anomaly.save_batch(directory, number, batch)
            tracker.event("anomaly", number, found)
            return None if found["decision"] == "skip" else {"step": number, **found}

        def save(owes: bool) -> None:
            """Begins a checkpoint; one that cannot fit is left out where the run goes on, an error where it ends."""
            tracker.sync()
            problem = checkpoints.room(state)
            if problem:
                tracker.note(f"NO CHECKPOINT AT STEP {done}: {checkpoints.directory} has no room for it ({problem})")
                if stop or done == total:
                    raise checkpoint.StorageError(f"{checkpoints.directory}: {problem}; make room, then run again")
                return
            described = {**now, "wandb_id": tracker.wandb_id, "watch": watch.memory(), "owes_evaluation": owes}
            stall = checkpoints.save(done, state, described)
            tracker.checkpoint(done, {"stall": stall})
            timer.restart()

        # ---------------------------------------------------------------------------------------------------- the loop
        timer = checkpoint.Timer(config.checkpoint.minutes, config.log.every)
        read = batch_reader(config, corpus, parts, watch.batch_index)
        pending, bad, latest, measured, began = [], None, {}, [], time.monotonic()
        if config.curvature.every:
            rows, first = local_rows(parts.mesh, config.train.batch_size), next(iter(corpus.held_out))
            held_out_batch = loader.held_out_rows(corpus, first, 0, config.train.batch_size, rows)
            held_out_batch.pop("bytes")

        if (done == 0 or meta["owes_evaluation"]) and not held_out(0 if done == total else config.evaluate.batches):
            ended = f"stopped after step {done}; run the same command again to continue"
            return STOPPED
        while done < total:  # once, and once more after every rollback
            with loader.prefetch(read, done, total, config.data.prefetch, config.data.workers) as batches:
                for index, batch in batches:
                    state, metrics = step(state, batch, watch.limit(index + 1))
                    bad = settle()
                    pending.append((index + 1, metrics, batches.last_wait))
                    done = index + 1
                    stop, owes = stopping.requested() or done == until, False
                    evaluating = done % evaluate_every == 0 or done == total
                    saving = done % checkpoint_every == 0 or done == total or stop or timer.due(done)
                    measuring = config.curvature.every and done % config.curvature.every == 0
                    if evaluating or saving or measuring:
                        bad = bad or settle()
                    if bad:
                        break
                    if measuring:
                        measure()
                    if evaluating and not held_out(0 if done == total else config.evaluate.batches):
                        stop = owes = True
                    if saving or stop:
                        save(owes)
                    if stop and (done < total or owes):
                        checkpoints.wait()
                        ended = f"stopped after step {done}; run the same command again to continue"
                        return STOPPED
            if bad:
                # ------------------------------------------------------- stop, or go back and leave out the data since
                pending.clear()
                if bad["decision"] == "rollback":
                    state = None
                    # to a multiple of the period, so that saves for other reasons change nothing of what the run does
                    state, meta = load((bad["step"] - 1) // checkpoint_every * checkpoint_every + 1)
                    done = int(state.step)
                    again = anomaly.Watch(config, meta["watch"] if meta else None)
                    again.windows = watch.windows
                if bad["decision"] == "stop" or not again.roll_back(done, bad["step"]):
                    ended = (
                        f"stopped: {bad['what']} at step {bad['step']}; what is on disk is sound. "
                        f"--replay_step={bad['step']} looks into it, "
                        f"--allow_change=train.on_{bad['what']} may set another policy"
                    )
                    return ANOMALY
                watch, why, bad = again, bad, None
                read = batch_reader(config, corpus, parts, watch.batch_index)
                checkpoints.forget(done)
                tracker.roll_back(done)
                tracker.event("rollback", done + 1, {"to": done, "because": why, "windows": watch.windows})
                tracker.note(f"rolled back to step {done}; {watch.windows[-1][1]} batches are left out")

        # -------------------------------------------------------------------------------------------- what it learned
        checkpoints.wait()
        if measured:
            share = sum(measured) / (time.monotonic() - began)
            tracker.note(f"curvature   {len(measured)} times, {sum(measured):.1f} s, {share:.1%} of this start's time")
        for name, values in latest.items():
            beside = (
                ", ".join(f"{kind} {references[name][key]:.3f}" for key, kind in BASELINES.items()) if primary else ""
            )
            tracker.note(f"result      {name}: {values['bits_per_byte']:.3f} bits per byte ({beside})")
        if config.sample.tokens:
            vocabulary, cap = corpus.tokenizer.vocab_size, config.model.logit_soft_cap
            next_token = jax.jit(generate.make_next_token(parts.objective, parts.shape, vocabulary, cap))
            text = generate.generate(
                next_token, state.params, corpus.tokenizer, config.sample.prompt, config.sample.tokens,
                config.sample.temperature, config.data.sequence_length, config.seed,
            )  # fmt: skip
            tracker.note(f"\nsample\n------\n{text}\n------")
        if primary:
            tracker.note(f"loss curve  {plot.loss_curve(directory)}")
        ended = "finished"
    return FINISHED


def open_parts(config: ConfigDict, log: Callable[[str], None]) -> tuple[loader.Corpus, Parts, np.ndarray]:
    """(corpus, the parts of the run, how often each token occurs in the training text [V])."""
    corpus = loader.open_corpus(
        cache.ensure(config.data, log),
        config.data.vocabulary,
        config.data.sequence_length,
        config.data.packing,
        config.data.verify,
    )
    same = int(xxhash.xxh32_hexdigest(corpus.fingerprint.encode()), 16)
    if len({int(other) for other in np.ravel(multihost_utils.process_allgather(np.uint32(same)))}) > 1:
        raise DataError(
            f"config.data.task = {config.data.task!r}: the processes hold different text (here {corpus.fingerprint}); "
            "prepare it once and give all of them that config.data.directory"
        )
    vocabulary = corpus.tokenizer.vocab_size
    counts = baselines.token_counts(corpus, vocabulary)
    padded = -(-vocabulary // config.model.vocabulary_multiple) * config.model.vocabulary_multiple
    frequency = np.pad(counts, (0, padded - vocabulary)) / counts.sum()
    return corpus, assemble(config, vocabulary, corpus.epoch_tokens, jnp.asarray(frequency, jnp.float32)), counts


def report_parts(config: ConfigDict, parts: Parts, corpus: loader.Corpus, log: Callable[[str], None]) -> None:
    """Says what will run, on what."""
    log(describe(parts.budget, config.optim.method))
    for name, epochs in corpus.epochs(parts.budget.tokens).items():
        log(f"corpus      {name}: {epochs:.2f} epochs")
    sizes = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    readout = f"logits of {parts.options.chunk} positions at a time" + (", derivative kept" * parts.options.keep)
    log(f"devices     {len(parts.mesh.devices.flat)} {jax.devices()[0].device_kind}: {sizes}")
    log(f"kernels     attention {parts.shape.kernel}, readout {readout}, remat {parts.shape.remat}")


def checkpoint_directory(config: ConfigDict, directory: str) -> str:
    """Where the checkpoints of a run lie."""
    return config.checkpoint.directory or str(Path(directory) / "checkpoints")


def batch_reader(config: ConfigDict, corpus: loader.Corpus, parts: Parts, batch_index: Callable) -> Callable:
    """read(step) -> the batch of the step after `step` updates, on the mesh."""
    batch_size = config.train.batch_size
    rows = local_rows(parts.mesh, batch_size)

    def read(step: int) -> dict:
        batch = loader.training_rows(corpus, config.seed, batch_index(step), batch_size, rows)
        batch.pop("bytes")
        return place_batch(parts.mesh, batch_size, rows, batch)

    return read


def compile_step(parts: Parts, batch: dict) -> Callable:
    """The compiled step(state, batch, limit), which takes the state's memory."""
    compiled, scalars = lower_step(parts, batch).compile(), _scalars(parts)
    return lambda state, batch, limit: compiled(state, batch, limit, scalars)


def lower_step(parts: Parts, batch: dict) -> jax.stages.Lowered:
    """The program of step(state, batch, limit, scalars): one for all runs that differ in Parts.scalars alone."""

    def step(state, batch, limit, scalars):
        return make_step(parts.objective, parts.optimizer_at(**scalars))(state, batch, limit)

    limit = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(parts.abstract, batch, limit, _scalars(parts))


def _scalars(parts: Parts) -> dict:
    return {name: np.float32(value) for name, value in parts.scalars.items()}


def changes(meta: dict, now: dict, allowed: Collection[str]) -> dict[str, list]:
    """{what: [before, now]}: config keys, versions and the corpus, where a restart differs from its checkpoint.

    ConfigError if the corpus differs and "corpus" is not allowed: the run would go on with other text.
    """
    if meta["corpus"] != now["corpus"] and "corpus" not in allowed:
        raise ConfigError(
            "data.task", now["config"]["data"]["task"],
            f"the corpus the run began with (fingerprint {meta['corpus']}, this one is {now['corpus']}), or "
            "--allow_change=corpus",
        )  # fmt: skip
    found = workdir.changes(meta["config"], now["config"])
    pairs = {
        "corpus": [meta["corpus"], now["corpus"]],
        **{f"version of {name}": [meta["versions"].get(name), new] for name, new in now["versions"].items()},
    }
    return {**found, **{key: pair for key, pair in pairs.items() if pair[0] != pair[1]}}


def run_record(config: ConfigDict, parts: Parts, references: dict[str, dict]) -> dict:
    """What metrics.jsonl says of the run as a whole; baselines in nats per token, as the losses are."""
    budget = parts.budget
    shown = {}
    for name, found in references.items():
        for kind, label in BASELINES.items():
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
        "mesh": dict(parts.mesh.shape),
        "baselines": shown,
        "baselines_bits_per_byte": {name: {k: found[k] for k in BASELINES} for name, found in references.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on; `code` is a hash of the sources of data, lm and optim."""
    root, digest = Path(__file__).parents[2], xxhash.xxh3_64()
    for path in sorted(path for room in ("data", "lm", "optim") for path in (root / room).rglob("*.py")):
        digest.update(path.read_bytes())
    packages = ("steppe", "jax", "jaxlib", "flax", "optax")
    return {**{name: importlib.metadata.version(name) for name in packages}, "code": digest.hexdigest()}


def abstract_batch(parts: Parts, corpus: loader.Corpus, batch_size: int) -> dict:
    """A training batch as ShapeDtypeStructs on the mesh."""
    example = loader.training_rows(corpus, 0, 0, batch_size, [0])
    example.pop("bytes")
    place = batch_sharding(parts.mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=place)
        for name, array in example.items()
    }
