"""A training run from a config: data, step, evaluate, log, checkpoint, stop. Reads top to bottom."""

import importlib.metadata
import signal
import threading
import time
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data import baselines, cache, loader
from lm import checkpoint, generate, plot, workdir
from lm.assembly import Parts, assemble
from lm.budget import describe
from lm.evaluate import evaluate, make_evaluation_step
from lm.mesh import batch_sharding, local_rows, place_batch
from lm.state import create
from lm.step import make_step
from lm.tracking import Tracker
from optim.schedules import duration_steps

FINISHED, NONFINITE, STOPPED = 0, 3, 75  # exit statuses; 75 is EX_TEMPFAIL: run the same command again to continue


def run(config: ConfigDict, directory: str) -> int:
    """Runs or continues the run of `directory` to its end; returns the exit status.

    Raises lm.check.ConfigError or data.errors.DataError, before anything is compiled, for what cannot run.
    """
    primary = jax.process_index() == 0
    log = (lambda text: print(text, flush=True)) if primary else (lambda text: None)

    # ---------------------------------------------------------------------------------------------------- the corpus
    corpus = loader.open_corpus(
        cache.ensure(config.data, log), config.data.vocabulary, config.data.sequence_length, config.data.packing
    )
    vocabulary = corpus.tokenizer.vocab_size

    # ----------------------------------------------------------------------------------------------------- the parts
    counts = baselines.token_counts(corpus, vocabulary)
    padded = -(-vocabulary // config.model.vocabulary_multiple) * config.model.vocabulary_multiple
    frequency = np.pad(counts, (0, padded - vocabulary)) / counts.sum()
    parts = assemble(config, vocabulary, corpus.epoch_tokens, jnp.asarray(frequency, jnp.float32))
    workdir.claim(directory, config, primary)
    budget, total = parts.budget, parts.budget.steps
    log(describe(budget, config.optim.method))
    for name, epochs in corpus.epochs(budget.tokens).items():
        log(f"corpus      {name}: {epochs:.2f} epochs")
    sizes = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    readout = f"logits of {parts.options.chunk} positions at a time" + (", derivative kept" * parts.options.keep)
    log(f"devices     {len(parts.mesh.devices.flat)} {jax.devices()[0].device_kind}: {sizes}")
    log(f"kernels     attention {parts.shape.kernel}, readout {readout}, remat {parts.shape.remat}")

    with ExitStack() as stack:
        # ------------------------------------------------------------------------------------- state, new or restored
        manager = checkpoint.open_checkpoints(directory, config.checkpoint.keep)
        stack.callback(manager.close)
        if manager.latest_step() is None:
            state, meta = create(parts.mesh, parts.initialise), {}
        else:
            state, meta = checkpoint.restore(manager, parts.abstract)
            log(f"continuing  after step {int(state.step)} of {total}")
        done = int(state.step)
        tracker = Tracker(
            directory, config, total_steps=total, tokens_per_step=budget.tokens_per_step, start_step=done,
            flops_per_step=budget.flops, wandb_id=meta["wandb_id"] if meta else "", primary=primary,
        )  # fmt: skip
        ended = "failed"
        stack.callback(lambda: tracker.close(ended))
        meta = {
            "config": config.to_dict(),
            "wandb_id": tracker.wandb_id,
            "versions": versions(),
            "corpus": corpus.fingerprint,
        }
        references = {name: baselines.baselines(corpus, name, counts) for name in corpus.held_out} if primary else {}
        tracker.run(done, run_record(config, parts, references))

        # --------------------------------------------------------------------------------------------- compiled steps
        began = time.monotonic()
        step = make_step(parts.objective, parts.rule, parts.base, parts.learning_rate, parts.rho)
        batch_size = config.train.batch_size
        shapes = abstract_batch(parts, corpus, batch_size)
        step = jax.jit(step, donate_argnums=0).lower(parts.abstract, shapes).compile()
        evaluation_step = jax.jit(make_evaluation_step(parts.objective, parts.shape, parts.options))
        log(f"compiled    in {time.monotonic() - began:.1f} s")

        def held_out(batches: int) -> None:
            sequences = config.evaluate.batch_size or batch_size
            for name in corpus.held_out:
                found = evaluate(evaluation_step, state.params, corpus, name, parts.mesh, sequences, batches)
                tracker.evaluation(done, name, found)

        def settle() -> bool:
            """Records the metrics of the step before, which the device has finished by now; True if they are sound."""
            if not pending:
                return True
            number, metrics, waited = pending.pop()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            tracker.step(number, {**metrics, "data_wait": waited})
            if not metrics["nonfinite"]:
                skipped.clear()
                return True
            skipped.append(number)
            tracker.note(
                f"step {number}: loss or gradient not finite (loss {metrics['loss']}, gradient norm "
                f"{metrics['gradient_norm']}, perturbed loss {metrics['perturbed_loss']}, epsilon norm "
                f"{metrics['epsilon_norm']}); the step changed nothing"
            )
            return config.train.on_nonfinite == "skip" and len(skipped) < config.train.max_skips

        # ---------------------------------------------------------------------------------------------------- the loop
        def every(duration: str) -> int:
            return max(1, duration_steps(duration, tokens_per_step=budget.tokens_per_step, total_steps=total))

        evaluate_every, checkpoint_every = every(config.evaluate.every), every(config.checkpoint.every)
        rows = local_rows(parts.mesh, batch_size)
        pending, skipped = [], []
        stopping = stack.enter_context(StopSignals())

        def read(index: int) -> dict:
            batch = loader.training_rows(corpus, config.seed, index, batch_size, rows)
            batch.pop("bytes")
            return place_batch(parts.mesh, batch_size, rows, batch)

        if done == 0:
            held_out(config.evaluate.batches)
        batches = loader.prefetch(read, done, total, config.data.prefetch, config.data.workers)
        with batches:
            for index, batch in batches:
                state, metrics = step(state, batch)
                sound = settle()
                pending.append((index + 1, metrics, batches.last_wait))
                done = index + 1
                stop = stopping.requested(done)
                if done % evaluate_every == 0 or done % checkpoint_every == 0 or done == total or stop:
                    sound = settle() and sound
                if not sound:
                    ended = f"stopped: non-finite at step {skipped[-1]}; the last checkpoint is sound"
                    return NONFINITE
                if done % evaluate_every == 0 or done == total:
                    held_out(0 if done == total else config.evaluate.batches)
                if done % checkpoint_every == 0 or done == total or stop:
                    checkpoint.save(manager, done, state, meta)
                    tracker.checkpoint(done)
                if stop and done < total:
                    ended = f"stopped after step {done}; run the same command again to continue"
                    return STOPPED

        # -------------------------------------------------------------------------------------------- what it learned
        if config.sample.tokens:
            next_token = jax.jit(
                generate.make_next_token(parts.objective, parts.shape, vocabulary, config.model.logit_soft_cap)
            )
            text = generate.generate(
                next_token, state.params, corpus.tokenizer, config.sample.prompt, config.sample.tokens,
                config.sample.temperature, config.data.sequence_length, config.seed,
            )  # fmt: skip
            tracker.note(f"\nsample\n------\n{text}\n------")
        manager.wait_until_finished()
        if primary:
            tracker.note(f"loss curve  {plot.loss_curve(directory)}")
        ended = "finished"
    return FINISHED


def run_record(config: ConfigDict, parts: Parts, references: dict[str, dict]) -> dict:
    """What metrics.jsonl says of the run as a whole; baselines in nats per token, as the losses are."""
    budget = parts.budget
    shown = {}
    for name, found in references.items():
        for kind in ("unigram", "gzip"):
            label = {"unigram": "unigram", "gzip": "gzip -9"}[kind] + (f" {name}" if len(references) > 1 else "")
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
        "baselines_bits_per_byte": {
            name: {k: found[k] for k in ("unigram", "gzip")} for name, found in references.items()
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in ("steppe", "jax", "jaxlib", "flax", "optax")}


def abstract_batch(parts: Parts, corpus: loader.Corpus, batch_size: int) -> dict:
    """A training batch as ShapeDtypeStructs on the mesh."""
    example = loader.training_rows(corpus, 0, 0, batch_size, [0])
    example.pop("bytes")
    place = batch_sharding(parts.mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=place)
        for name, array in example.items()
    }


class StopSignals:
    """Catches SIGTERM and SIGINT while a run is on: the first asks it to stop after its step, the second ends it."""

    def __init__(self):
        self._asked = False
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process gives the same answer."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._asked))))
