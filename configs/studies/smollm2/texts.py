"""The held-out texts of the study: a model's own, sampled from it, and English that it has to learn.

    python configs/studies/smollm2/texts.py HF_DIR TEXT

TEXT has the files of configs/studies/english/text.py. TEXT/own.jsonl gets 32 documents of 255 tokens, drawn from the
model at temperature 1 from all of the vocabulary, after the token that begins a document. The model's own mean loss on
them estimates its entropy. Another model's loss less that estimates KL(the model ‖ the other): what it has forgotten.
TEXT/short.jsonl gets the first 200 characters of each document of TEXT/held_out.jsonl.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

DOCUMENTS, TOKENS, AT_ONCE, CHARACTERS = 32, 255, 16, 200


def main(directory: Path, text: Path) -> int:
    """Writes both files, and says how many documents are drawn."""
    documents = map(json.loads, (text / "held_out.jsonl").read_text(encoding="utf-8").splitlines())
    write(text / "short.jsonl", [document["text"][:CHARACTERS] for document in documents])
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so that another machine draws the same
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    drawn = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=model.config.eos_token_id)
    texts: list[str] = []
    while len(texts) < DOCUMENTS:
        begun = torch.full((AT_ONCE, 1), model.config.bos_token_id)
        ids = model.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=TOKENS, **drawn)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        print(f"{len(texts)} of {DOCUMENTS} documents", flush=True)
    write(text / "own.jsonl", texts)
    return 0


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
