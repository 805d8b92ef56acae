# SPDX-License-Identifier: Apache-2.0
"""The command line of finetune.py: its options, and checks on them that need neither data nor model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import memory_check
from arguments import (
    Parser,
    Ranks,
    add_formats,
    add_machine,
    add_overlap,
    check_offload_device,
    check_sharded_options,
    choose_device,
    not_negative,
    positive,
    real,
)

LEARNING_RATES = {"full": 4e-4, "lora": 2e-3}


def memory_size(text: str) -> int:
    try:
        return memory_check.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 or more, below 1")
    return value


def make_parser(ranks: Ranks) -> Parser:
    parser = Parser(ranks, "Fine-tunes a pretrained encoder to classify texts, with a sharded or an ordinary AdamW.")
    add = parser.add_argument_group("training").add_argument
    add("--tune", choices=("full", "lora"), default="full", help="lora: train only LoRA adapters and the head")
    add("--optimizer", choices=("sharded", "adamw"), default="sharded", help="adamw: DDP and torch.optim.AdamW")
    add("--epochs", type=positive, default=3, help="passes over the training texts")
    add("--batch", type=positive, default=16, help="texts a step, over all ranks and micro-batches")
    add("--accumulate", type=positive, default=1, help="backward passes a step, each over a smaller micro-batch")
    add("--lr", type=real, default=None, help="peak learning rate; None: 4e-4, and 2e-3 with --tune lora")
    add("--warmup", type=not_negative, default=None, help="steps of linear warm-up; None: a tenth of all steps")
    add("--weight-decay", type=real, default=0.01, help="for matrices; vectors do not decay")
    add("--clip", type=real, default=1.0, help="largest global gradient norm; 0: do not clip")
    add("--gradient-sync", choices=("backward", "step"), default="backward", help="when --optimizer sharded reduces")
    add_overlap(add)
    add("--seed", type=not_negative, default=0, help="for the head, the adapters, the order of the data and dropout")

    add = parser.add_argument_group("model").add_argument
    add("--model", default=None, metavar="NAME_OR_PATH", help="an encoder; None: all-MiniLM-L6-v2, from its package")
    add("--max-length", type=positive, default=64, help="tokens of each text to use")
    add("--dropout", type=share, default=0.1, help="before the head")
    add("--lora-rank", type=positive, default=8, help="rank of the adapters")
    add_formats(add)
    add = add_machine(parser)
    add(
        "--memory-limit",
        type=memory_size,
        default=None,
        metavar="SIZE",
        help="for parameters, gradients, optimizer and activations of a rank, such as 2GB; None: what is free on the "
        "GPU or host, whatever the limit of a container",
    )
    add(
        "--fit",
        action="store_true",
        help="train with the cheapest settings that fit: prints what it tries, such as narrower formats or --update "
        "backward --clip 0, what each needs, and which it takes",
    )

    add = parser.add_argument_group("data and output").add_argument
    add("--data", default=None, metavar="FILE.jsonl", help='lines of {"text", "label"}; None: Python\'s docstrings')
    add("--classes", type=positive, default=20, help="number of modules to learn, without --data")
    add("--per-class", type=positive, default=250, help="most texts of a module, without --data")
    add("--probe", action=argparse.BooleanOptionalAction, default=True, help="train the baseline: a linear probe")
    add("--validate-every", type=not_negative, default=0, help="steps between validations; 0: only at the end")
    add("--log-every", type=positive, default=10, help="steps between metrics")
    add("--log-dir", default=None, help="directory for TensorBoard metrics; None: none")
    add("--save-dir", default=None, metavar="DIR", help="directory for the tuned model or adapters; None: none")
    add("--json", default=None, metavar="PATH", help="file for the final numbers and the losses")
    return parser


def parse_arguments(ranks: Ranks) -> tuple[argparse.Namespace, Parser, torch.device]:
    """Returns the options, the parser (for later errors) and the device; exits on options that cannot work."""
    parser = make_parser(ranks)
    args = parser.parse_args()
    if args.lr is None:
        args.lr = LEARNING_RATES[args.tune]
    if args.batch % (ranks.world_size * args.accumulate):
        parser.error(
            f"--batch {args.batch} cannot be divided over {ranks.world_size} ranks and --accumulate {args.accumulate}; "
            f"choose a multiple of {ranks.world_size * args.accumulate}"
        )
    check_sharded_options(args, parser)
    if args.fit and args.optimizer == "adamw":
        parser.error("--fit with --optimizer adamw: torch's AdamW has no settings to choose from; omit one of them")
    if args.update == "backward" and args.accumulate > 1:
        parser.error(
            f"--update backward with --accumulate {args.accumulate}: every backward would have to keep its gradients "
            "for the last one; give --accumulate 1, or --update step"
        )
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its directory does not exist; create it, or choose another")
    device = choose_device(args.device, ranks, parser)
    check_offload_device(args, device, parser)
    return args, parser, device
