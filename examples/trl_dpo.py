# SPDX-License-Identifier: Apache-2.0
"""Align with trl's DPOTrainer: optimizer state in 8 bits, sharded over the ranks. The reference model has no state.

    pip install '.[trl]'
    torchrun --nproc-per-node 2 examples/trl_dpo.py
    torchrun --nproc-per-node 2 examples/trl_dpo.py --stock  # trl as it is: DDP and torch's AdamW

Both print the same margin between the rewards of the chosen and of the rejected texts, up to the second digit.
"""

import copy
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from shardadam.integrations.transformers import ShardedTrainerMixin


class ShardedDPOTrainer(ShardedTrainerMixin, DPOTrainer):
    """trl's trainer, with a sharded optimizer."""


def main(optim: str, stock: bool) -> DPOTrainer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *map(str, range(31))])}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")

    def counted(start: int, by: int) -> str:
        return "".join(f" {(start + j * by) % 31}" for j in range(1, 5))

    pairs = [{"prompt": f"{i % 31}", "chosen": counted(i, 1), "rejected": counted(i, -1)} for i in range(96)]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, eos_token_id=0))
    arguments = DPOConfig(
        optim=optim,  # "adamw_8bit": int8 moments
        max_steps=20,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    kind, reference = DPOTrainer if stock else ShardedDPOTrainer, copy.deepcopy(model)
    trainer = kind(model, reference, arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"loss {logs[0]['loss']:.4f} to {logs[-1]['loss']:.4f}, margin {logs[-1]['rewards/margins']:.3f}")
    return trainer


if __name__ == "__main__":
    is_stock = "--stock" in sys.argv
    main("adamw_torch" if is_stock else "adamw_8bit", is_stock)
