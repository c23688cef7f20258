"""Rankings per second and memory of TRL's RewardTrainer (1.16) on the C(K,2) pairs of the same rankings; in its environment.

With `--test` it learns from the pairs that `preferences.py` does; `--save` keeps the model for it to measure.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from itertools import combinations

from work import divided_pairs, rankings_of, reward_arguments


def main() -> None:
    parser = reward_arguments(__doc__)
    parser.add_argument("--test", type=int, default=0, help="held-out pairs, which are left out here")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--save", help="folder for the trained model")
    a = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(a.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.model, padding_side="right")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    if a.test:
        rankings = divided_pairs(a.pairs, tokenizer, a.max_tokens, a.test, a.rankings)[0]
    else:
        rankings = rankings_of(a.pairs, a.k, a.rankings, tokenizer, a.max_tokens)
    rows = [
        {"prompt": prompt, **{side: [{"role": "assistant", "content": text}] for side, text in zip(("chosen", "rejected"), pair)}}  # noqa: B905
        for prompt, completions in rankings
        for pair in combinations(completions, 2)
    ]
    adapter = None
    if a.lora_rank:
        adapter = LoraConfig(
            r=a.lora_rank, lora_alpha=2 * a.lora_rank, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]
        )
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=a.learning_rate,
            max_length=a.max_tokens,
            bf16=a.precision == "bfloat16",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = RewardTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        if a.save:
            trainer.save_model(a.save)
            tokenizer.save_pretrained(a.save)
    print(
        json.dumps(
            {
                "rankings": len(rankings),
                "pairs": len(trainer.train_dataset),
                "rankings_per_second": round(len(rankings) / seconds, 3),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
