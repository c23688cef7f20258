"""Seconds and memory of TRL's PPO updates, as one JSON line. Runs in TRL's environment: trl 1.12.0, the last release that had PPO.

`python tests/benchmarks/trl_ppo.py --trl FOLDER …`, where FOLDER is `pip install --no-deps -t FOLDER trl==1.12.0`. For
`equal_kl.py` it optimises a reward model that has learned something, and keeps the policy.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

from work import arguments, prompts_of


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trl", required=True, help="folder that holds trl 1.12.0")
    parser.add_argument("--lora-rank", type=int, default=0, help="ignored: TRL trains the policy and the value model in full")
    parser.add_argument("--reward", help="folder of the reward model, from which the value model starts; default: a random head")
    parser.add_argument("--kl-coefficient", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--missing-eos-penalty", type=float)
    parser.add_argument("--save", help="folder for the policy")
    a = parser.parse_args()
    sys.path.insert(0, a.trl)
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, a.precision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|endoftext|>"  # TRL masks what equals the pad token
    prompts = Dataset.from_dict({"input_ids": prompts_of(a.prompts, tokenizer, a.prompt_tokens)})

    def scorer() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(a.reward or a.model, num_labels=1, dtype=dtype)

    policy = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
    reward, value = scorer(), scorer()
    for model in (policy, reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=a.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            total_episodes=a.batch * a.updates,
            num_ppo_epochs=a.epochs,
            response_length=a.new_tokens,
            stop_token="eos",
            temperature=a.temperature,
            learning_rate=a.learning_rate,
            kl_coef=a.kl_coefficient,
            missing_eos_penalty=a.missing_eos_penalty,
            local_rollout_forward_batch_size=a.batch,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=reward,
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(a.batch)),
        )
        trainer.add_callback(Clock())
        times.append(time.perf_counter())
        trainer.train()
        if a.save:
            trainer.save_model(a.save)
            tokenizer.save_pretrained(a.save)
    seconds = [after - before for before, after in itertools.pairwise(times)]
    counted = seconds[1:] or seconds
    print(
        json.dumps(
            {
                "seconds": [round(s, 2) for s in counted],
                "samples_per_second": round(a.batch / statistics.median(counted), 3),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
