"""Writes an untrained Llama of about 4 million parameters (4 layers of width 256, 4096 tokens), the small model of the comparisons.

python -m tests.benchmarks.tiny_model --pairs pairs.jsonl FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from components.rlhf.models import save_model
from components.rlhf.scratch_model import new_model, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help='JSON lines {"prompt", "chosen", "rejected"}, for the tokenizer')
    parser.add_argument("folder", type=Path)
    a = parser.parse_args()
    rows = [json.loads(line) for line in a.pairs.read_text(encoding="utf-8").splitlines()]
    texts = [m["content"] for row in rows for side in ("prompt", "chosen", "rejected") for m in row[side]]
    tokenizer = train_tokenizer(texts, 4096, 512)
    model = new_model(tokenizer, layers=4, hidden=256, heads=4, context_tokens=512, seed=0)
    save_model(model, tokenizer, a.folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {a.folder}")


if __name__ == "__main__":
    main()
