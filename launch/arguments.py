# SPDX-License-Identifier: Apache-2.0
"""The command line of pretrain.py: its options, checks on them, and the ranks as torchrun numbers them.

Checks only values that are equal on all ranks, before the process group is built and data is read.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from shardadam import DiskOffload, HostOffload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """Ranks as torchrun numbers them. A process started without torchrun is rank 0 of 1, without a process group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool

    @staticmethod
    def from_environment() -> Ranks:
        rank, world_size, local_rank, local_world_size = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        return Ranks(rank, world_size, local_rank, local_world_size, launched="RANK" in os.environ)


class Parser(argparse.ArgumentParser):
    """Prints errors and help once a machine, on local rank 0."""

    def __init__(self, ranks: Ranks, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.ranks = ranks

    def print_help(self, file: Any = None) -> None:
        if self.ranks.local_rank == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        if self.ranks.local_rank == 0:
            print(f"{self.prog}: error: {message} (--help lists the options)", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # torchrun kills all ranks when the first one exits: let local rank 0 print
        sys.exit(2)

    def failure(self, message: str) -> NoReturn:
        """Exits after a later error. Other ranks print too, later, in case local rank 0 hangs."""
        if self.ranks.local_rank != 0:
            time.sleep(5)  # local rank 0 prints first; torchrun then kills this rank
        print(f"{self.prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 or more")
    return value


def real(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"found {text}, expected a finite number, 0 or more")
    return value


def make_parser(ranks: Ranks) -> Parser:
    parser = Parser(ranks, "Pretrains a small transformer on bytes, with a sharded or an ordinary AdamW.")
    add = parser.add_argument_group("training").add_argument
    add("--optimizer", choices=("sharded", "adamw"), default="sharded", help="adamw: DDP and torch.optim.AdamW")
    add("--steps", type=positive, default=800, help="optimizer steps")
    add("--batch", type=positive, default=8, help="windows a step, over all ranks")
    add("--micro-batch", type=positive, default=None, metavar="M", help="most windows in a rank's backward; None: all")
    add("--lr", type=real, default=1e-3, help="peak learning rate")
    add("--warmup", type=not_negative, default=None, help="steps of linear warm-up; None: a tenth of all, at most 100")
    add("--weight-decay", type=real, default=0.1, help="for matrices; vectors do not decay")
    add("--clip", type=real, default=1.0, help="largest global gradient norm; 0: do not clip")
    add("--gradient-sync", choices=("backward", "step"), default="backward", help="when --optimizer sharded reduces")
    add_overlap(add)
    add("--check-every", type=not_negative, default=0, metavar="K", help="steps between replica checks; 0: never")
    add("--seed", type=not_negative, default=0, help="for the model, the order of the data and the generated text")

    add = parser.add_argument_group("model").add_argument
    add("--layers", type=positive, default=4, help="transformer blocks")
    add("--width", type=positive, default=192, help="size of the residual stream")
    add("--heads", type=positive, default=3, help="attention heads; --width must be a multiple of twice as many")
    add("--context", type=positive, default=128, help="bytes in a window")
    add_formats(add)
    add_machine(parser)

    add = parser.add_argument_group("data and output").add_argument
    add("--data", nargs="+", default=[], metavar="PATH", help="text files or directories; none: Python's own sources")
    add("--validation-windows", type=positive, default=256, help="number of windows for the validation loss")
    add("--validate-every", type=not_negative, default=0, help="steps between validations; 0: only at the end")
    add("--sample-bytes", type=not_negative, default=300, help="bytes of text to generate at the end")
    add("--prompt", default=None, help="beginning of that text; None: 'def ', or that of a file with --data")
    add("--log-every", type=positive, default=10, help="steps between metrics")
    add("--log-dir", default=None, help="directory for TensorBoard metrics; None: none")
    logs = "with the metrics, norms of gradients, update ratios and memory by parameter; default: with --log-dir"
    add("--log-parameters", action=argparse.BooleanOptionalAction, default=None, help=logs)
    add("--json", default=None, metavar="PATH", help="file for the final numbers")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--save-dir", default=None, metavar="DIR", help="directory for checkpoints; all machines must share it")
    add("--save-every", type=not_negative, default=0, metavar="N", help="steps between saves, and at the end; 0: none")
    add("--keep", type=positive, default=2, metavar="K", help="number of checkpoints to keep")
    add("--save-async", action="store_true", help="write checkpoints in the background")
    add("--resume", action="store_true", help="resume from the newest checkpoint, on any number of ranks")
    add("--stop-after", type=not_negative, default=0, metavar="N", help="save and stop after so many steps; 0: all")
    add("--save-on-sigterm", action="store_true", help="on SIGTERM (preemption), finish the step, save and stop")
    return parser


def add_overlap(add: Callable[..., Any]) -> None:
    add(
        "--overlap-gather",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="gather sharded parameters under the next forward; None: on GPUs",
    )


def add_formats(add: Callable[..., Any]) -> None:
    add("--moments", choices=("fp32", "bf16", "int8"), default="fp32", help="format of sharded moments")
    choices = ("auto", "split", "fp32", "none")  # torchrun would take --master for its own --master-addr
    add("--master-weights", dest="master", choices=choices, default="auto", help="format of bf16 masters")
    add("--gradients", choices=("auto", "fp32", "bf16"), default="auto", help="format of sharded gradients")
    add("--update", choices=("step", "backward"), default="step", help="backward: while it runs; needs --clip 0")
    add("--ema-decay", type=real, default=None, metavar="D", help="average the weights, such as 0.999; None: do not")
    add("--offload", choices=("host", "disk"), default=None, help="where state is between steps; None: with parameters")
    add("--offload-dir", default=None, metavar="DIR", help="directory on a local disk for --offload disk")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="dtype of the parameters")


def add_machine(parser: Parser) -> Callable[..., Any]:
    """Adds the options of the machine; returns a function that adds more of them."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where every rank has a GPU")
    add("--threads", type=positive, default=1, help="CPU threads a rank")
    add("--timeout", type=positive, default=600, metavar="S", help="seconds a rank waits for another")
    return add


def parse_arguments(ranks: Ranks) -> tuple[argparse.Namespace, Parser, torch.device]:
    """Returns the options, the parser (for later errors) and the device; exits on options that cannot work."""
    parser = make_parser(ranks)
    args = parser.parse_args()
    if args.log_parameters is None:
        args.log_parameters = args.log_dir is not None
    if args.warmup is None:
        args.warmup = min(100, args.steps // 10)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of --steps {args.steps} to the schedule; lower it")
    if args.width % (2 * args.heads):
        parser.error(
            f"--width {args.width} and --heads {args.heads} give heads of {args.width / args.heads:g}, and rotary "
            f"positions need an even whole number; choose a multiple of {2 * args.heads} for --width"
        )
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its directory does not exist; create it, or choose another")
    check_sharded_options(args, parser)
    check_checkpoint_options(args, parser)
    if args.check_every and args.optimizer != "sharded":
        parser.error(
            f"--check-every {args.check_every} with --optimizer {args.optimizer}: only --optimizer sharded can check "
            "that ranks agree; use it, or omit --check-every"
        )
    if args.prompt is None:
        args.prompt = "" if args.data else "def "
    device = choose_device(args.device, ranks, parser)
    check_offload_device(args, device, parser)
    return args, parser, device


def check_sharded_options(args: argparse.Namespace, parser: Parser) -> None:
    """Exits on options that ShardedAdamW would refuse, or that torch's AdamW does not have."""
    defaults = {
        "moments": "fp32",
        "master": "auto",
        "gradients": "auto",
        "update": "step",
        "ema_decay": None,
        "offload": None,
    }
    used = [
        f"--{name.replace('_', '-')} {getattr(args, name)}"
        for name, value in defaults.items()
        if getattr(args, name) != value
    ]
    if used and args.optimizer == "adamw":
        parser.error(
            f"{' '.join(used)} with --optimizer adamw: torch's AdamW has no such choice; use --optimizer sharded, or "
            "omit them"
        )
    if args.ema_decay is not None and not args.ema_decay < 1:
        parser.error(f"--ema-decay {args.ema_decay:g}: expected at least 0 and less than 1, such as 0.999")
    if args.update == "backward" and args.clip:
        parser.error(
            f"--update backward with --clip {args.clip:g}: the norm is known only after backward; give --clip 0, or "
            "--update step"
        )
    if args.offload == "disk" and args.offload_dir is None:
        parser.error("--offload disk without --offload-dir: give a directory on a local disk with --offload-dir DIR")
    if args.offload_dir is not None and not Path(args.offload_dir).is_dir():
        parser.error(f"--offload-dir {args.offload_dir}: found no directory, expected one; create it on every machine")
    if args.update == "backward" and args.gradient_sync != "backward":
        parser.error(
            f"--update backward with --gradient-sync {args.gradient_sync}: gradients must be reduced in backward; give "
            "--gradient-sync backward, or --update step"
        )


def offload_of(args: argparse.Namespace) -> HostOffload | DiskOffload | None:
    if args.offload is None:
        return None
    return DiskOffload(args.offload_dir) if args.offload == "disk" else HostOffload()


def check_offload_device(args: argparse.Namespace, device: torch.device, parser: Parser) -> None:
    if args.offload == "host" and device.type == "cpu":
        parser.error("--offload host on the CPU: the state is in memory of the host already; omit it, or give disk")


def check_checkpoint_options(args: argparse.Namespace, parser: Parser) -> None:
    used = [
        option
        for option, value in (
            (f"--save-every {args.save_every}", args.save_every),
            (f"--stop-after {args.stop_after}", args.stop_after),
            ("--resume", args.resume),
            ("--save-on-sigterm", args.save_on_sigterm),
        )
        if value
    ]
    if used and args.optimizer != "sharded":
        parser.error(
            f"{used[0]} with --optimizer {args.optimizer}: only --optimizer sharded saves and resumes; use it, or "
            f"omit {' and '.join(option.split()[0] for option in used)}"
        )
    if used and not args.save_dir:
        parser.error(f"{used[0]} without --save-dir: give the directory of the checkpoints with --save-dir DIR")
    if args.save_dir and not used:
        parser.error(f"--save-dir {args.save_dir} alone saves nothing; add --save-every N, or omit it")
    if args.save_dir and Path(args.save_dir).exists() and not Path(args.save_dir).is_dir():
        parser.error(f"--save-dir {args.save_dir}: found a file, expected a directory; choose another")


def choose_device(wanted: str, ranks: Ranks, parser: Parser) -> torch.device:
    """This rank's device. All ranks of a machine decide alike: each uses a GPU of its own, or none uses one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus < ranks.local_world_size:
        parser.error(
            f"--device cuda: {ranks.local_world_size} ranks on this machine and {gpus} GPUs; start at most one rank "
            "a GPU (--nproc-per-node), or choose --device cpu"
        )
    if wanted == "cpu" or gpus < ranks.local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank)
