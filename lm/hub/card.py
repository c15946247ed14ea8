"""The model card of an exported run: how to load the model, how it was trained, its numbers, its limits."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steppe.configs.base import is_foreign
from steppe.configs.keys import flatten
from steppe.data import files
from steppe.data.baselines import NAMES
from steppe.data.loader import beginning
from steppe.lm.hub import families
from steppe.lm.keep.saved import Unread
from steppe.lm.keep.weights import LAST, weights_of
from steppe.lm.track import lines as lines_of
from steppe.lm.track.lines import Records
from steppe.optim.methods import OPTIONS

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- steppe
- {method}
---

# {name}

A decoder-only language model of {parameters:,} parameters ({architecture}), pretrained by Steppe.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
text = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens={more})[0], skip_special_tokens=True))
```

It reads {length:,} tokens at a time, id {begin} before the first.

## Training

{training}

## Evaluation

{evaluation}

## Limits

It is a base model: it continues text, and has learnt neither to follow instructions nor to refuse. It may repeat errors
and offence of its training text. No property but those above was measured.
{seen}

## Licence

Steppe sets no licence for the model. Whoever publishes it names one that the training text permits.

## Configuration

```json
{config}
```
"""


def card(run: Unread) -> str:
    """The text of the card of a checkpoint of a run."""
    config, records = run.config, lines_of.read(run.directory)
    about = (records.of("run") or [{}])[-1]
    prompt = beginning(run.corpus) if config.sample.prompt is None else config.sample.prompt
    tokens = _tokens(run, records)
    return CARD.format(
        method=config.optim.method,
        name=Path(run.directory).resolve().name,
        parameters=sum(math.prod(shape) for shape in run.shapes.values()),
        architecture=families.of_config(config).architecture,
        prompt=json.dumps(prompt)[1:-1],
        more=max(1, min(50, config.data.sequence_length - len(run.corpus.tokenizer.encode(prompt)) - 1)),
        length=config.data.sequence_length,
        begin=run.corpus.tokenizer.begin_id,
        training=_table(("", ""), _training(run, about, tokens).items()),
        evaluation=_evaluation(run, records, about),
        seen=_seen(run, about, tokens),
        config=json.dumps(files.plain(config.to_dict()), indent=1),
    )


def _tokens(run: Unread, records: Records) -> int:
    """The tokens that the loss had counted at this checkpoint; 0 if unknown."""
    at = records.train.step.searchsorted(run.step)
    return int(records.train.tokens[at]) if at < len(records.train.step) else 0


def _training(run: Unread, about: dict[str, Any], tokens: int) -> dict[str, str]:
    config = run.config
    flat = flatten(config.to_dict())
    own = [key for key in config.optim if key in OPTIONS or is_foreign(f"optim.{key}", flat)]
    options = {key: config.optim[key] for key in own if config.optim[key] is not None}
    padded = config.data.packing == "bestfit" and config.train.counted == "positions"
    flops = run.step * about.get("flops_per_step", 0.0)
    averaged = run.weights != LAST or run.weights != next(iter(weights_of(config)))
    return {
        "text": config.data.task or f"the corpus {config.data.directory}",
        "tokens": f"{tokens:,}" + ", padding included" * padded,
        "steps": f"{run.step:,} of {config.train.batch_size:,} sequences",
        "method": ", ".join([f"`{config.optim.method}`", *(f"`{key}` {value}" for key, value in options.items())]),
        "base": f"`{config.optim.base}`, peak learning rate {config.optim.peak_learning_rate:g}",
        "weights": f"{run.weights}: averaged, not those of the last step" if averaged else "those of the last step",
        "compute": f"{flops:.3g} FLOPs" if flops else "not recorded",
        "seed": str(config.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()),
    }


def _evaluation(run: Unread, records: Records, about: dict[str, Any]) -> str:
    """The table of held-out losses of these weights at this step, with the baselines of each set."""
    judged, known = run.weights == next(iter(weights_of(run.config))), about.get("baselines_bits_per_byte", {})
    rows = []
    for record in records.of("evaluate" if judged else "average"):
        if record["step"] == run.step and (judged or record["weights"] == run.weights):
            loss, bits, of = f"{record['loss']:.4f} nats a token", "", known.get(record["name"], {})
            if "bits_per_byte" in record:
                bits = f"{record['bits_per_byte']:.4f} bits a byte"
                bits += "".join(f", {name} {of[key]:.3f}" for key, name in NAMES.items() if key in of)
            rows.append((f"held-out {record['name']}", loss, bits, f"{record.get('tokens', 0):,} tokens"))
    for record in records.of("choices"):
        if record["step"] == run.step and judged:
            rows.append((f"choices {record['name']}", f"accuracy {record['accuracy']:.4f}", "", ""))
    return _table(("set", "loss", "", "of"), rows) if rows else "This checkpoint was not evaluated."


def _seen(run: Unread, about: dict[str, Any], tokens: int) -> str:
    """A sentence on how little or much it has read."""
    count = about.get("parameters", {}).get("non_embedding", 0)
    if not (count and tokens):
        return ""
    return f"It has read {tokens / count:.1f} tokens per non-embedding parameter, where 20 are common."


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *escaped))
