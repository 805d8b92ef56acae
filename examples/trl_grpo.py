# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning with trl's GRPOTrainer: optimizer state in 8 bits, sharded over the ranks.

    pip install '.[trl]'
    torchrun --nproc-per-node 2 examples/trl_grpo.py
    torchrun --nproc-per-node 2 examples/trl_grpo.py --stock  # trl as it is: DDP and torch's AdamW

Both print the same rewards. The reward is the share of even tokens among the generated ones, and rises.
"""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from shardadam.integrations.transformers import ShardedTrainerMixin


class ShardedGRPOTrainer(ShardedTrainerMixin, GRPOTrainer):
    """trl's trainer, with a sharded optimizer."""


def share_of_even(completion_ids: list[list[int]], **others: object) -> list[float]:
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]


def main(optim: str, stock: bool) -> GRPOTrainer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *map(str, range(31))])}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
    prompts = Dataset.from_list([{"prompt": f"{i % 31}"} for i in range(96)])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, eos_token_id=0))
    arguments = GRPOConfig(
        optim=optim,  # "adamw_8bit": int8 moments
        max_steps=20,
        learning_rate=2e-3,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    kind = GRPOTrainer if stock else ShardedGRPOTrainer
    trainer = kind(model, share_of_even, arguments, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if trainer.is_world_process_zero():
        print(f"reward {rewards[0]:.3f} to {rewards[-1]:.3f}")
    return trainer


if __name__ == "__main__":
    is_stock = "--stock" in sys.argv
    main("adamw_torch" if is_stock else "adamw_8bit", is_stock)
