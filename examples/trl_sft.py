# SPDX-License-Identifier: Apache-2.0
"""Fine-tune with trl's SFTTrainer: optimizer state in 8 bits, sharded over the ranks.

    pip install '.[trl]'
    torchrun --nproc-per-node 2 examples/trl_sft.py
    torchrun --nproc-per-node 2 examples/trl_sft.py --stock  # trl as it is: DDP and torch's AdamW

Both print the same loss, up to the third digit. The state of stock takes 8 bytes per parameter on each rank, not 1.
"""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from shardadam.integrations.transformers import ShardedTrainerMixin


class ShardedSFTTrainer(ShardedTrainerMixin, SFTTrainer):
    """trl's trainer, with a sharded optimizer."""


def main(optim: str, stock: bool) -> SFTTrainer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *map(str, range(31))])}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
    texts = [{"prompt": f"{i % 31}", "completion": "".join(f" {(i + j) % 31}" for j in range(1, 9))} for i in range(96)]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, eos_token_id=0))
    arguments = SFTConfig(
        optim=optim,  # "adamw_8bit": int8 moments
        max_steps=20,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    kind = SFTTrainer if stock else ShardedSFTTrainer
    trainer = kind(model, arguments, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    nbytes = sum(value.nbytes for value in states) if stock else trainer.optimizer.memory().state
    per_parameter = nbytes / model.num_parameters()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}, state {per_parameter:.2f} bytes a parameter")
    return trainer


if __name__ == "__main__":
    is_stock = "--stock" in sys.argv
    main("adamw_torch" if is_stock else "adamw_8bit", is_stock)
