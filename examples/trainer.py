# SPDX-License-Identifier: Apache-2.0
"""Train with transformers: use ``ShardedTrainer`` in place of ``Trainer``; nothing else changes.

    pip install '.[transformers]'
    torchrun --nproc-per-node 2 examples/trainer.py out
    torchrun --nproc-per-node 2 examples/trainer.py out --stock

Prints the losses that the Trainer logs. All ranks write the checkpoint in the output directory. With --stock,
transformers' own ``Trainer`` trains under DDP and prints the same.
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from shardadam.integrations.transformers import ShardedTrainer


def main(directory: str, stock: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    tokens = [(torch.arange(16) + i) % 64 for i in range(64)]
    arguments = TrainingArguments(
        directory,
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_steps=20,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = (Trainer if stock else ShardedTrainer)(
        model, arguments, train_dataset=[{"input_ids": t, "labels": t} for t in tokens]
    )
    result = trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"losses {losses}  steps {result.global_step}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out", "--stock" in sys.argv)
