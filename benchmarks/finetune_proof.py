# SPDX-License-Identifier: Apache-2.0
"""Does a format of the optimizer harm a fine-tune? Runs launch/finetune.py for every format and seed, and draws the
losses of all in one picture.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/finetune_proof.py [--seeds 0 1 2]
        [--epochs 3] [--per-class 250] [--to runs/finetune] [--picture PATH.png]

The numbers of each run are kept in `--to`. Runs that are there already, with the same options, are not repeated, so
an interrupted series continues, and with all runs there `python benchmarks/finetune_proof.py` draws them again. The
last lines are a table in Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
from arguments import Ranks

ROOT = Path(__file__).resolve().parent.parent
SMOOTHED = 15  # steps in a point of a training curve


@dataclass(frozen=True)
class Format:
    """One curve: what finetune.py is asked for."""

    title: str
    options: tuple[str, ...]
    color: str

    @property
    def name(self) -> str:
        return "-".join(option.removeprefix("--") for option in self.options)


FORMATS = (
    Format("fp32 moments", ("--moments", "fp32"), "#000000"),
    Format("bf16 parameters, split masters, fp32 moments", ("--dtype", "bf16", "--master-weights", "split"), "#0072b2"),
    Format("int8 moments", ("--moments", "int8"), "#d55e00"),
    Format(
        "bf16 parameters, no master, int8 moments",
        ("--dtype", "bf16", "--master-weights", "none", "--moments", "int8"),
        "#009e73",
    ),
    Format("LoRA, fp32 moments", ("--tune", "lora"), "#cc79a7"),
)
TWIN = Format("DDP and torch.optim.AdamW", ("--optimizer", "adamw"), "#e69f00")


@dataclass(frozen=True)
class Run:
    """One seed of a format."""

    format: Format
    seed: int
    common: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        return [*self.format.options, "--seed", str(self.seed), *self.common]

    def path(self, directory: Path) -> Path:
        return directory / f"{self.format.name}-seed{self.seed}.json"

    def kept(self, directory: Path) -> dict[str, Any] | None:
        """Its numbers, or None if it has not run. Raises ValueError if it has run with other options."""
        path = self.path(directory)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if found["options"] != self.options:
            raise ValueError(
                f"{path}: made with {' '.join(found['options'])}, expected {' '.join(self.options)}; give the same "
                "options as before, or another --to"
            )
        return found["results"]

    def make(self, directory: Path, ranks: Ranks) -> None:
        """Trains on all ranks, and keeps the numbers. Collective."""
        import docstrings
        from finetune import finetune
        from finetune_arguments import parse_arguments

        sys.argv = ["finetune.py", *self.options]
        args, _, device = parse_arguments(ranks)
        if ranks.rank == 0:
            print(f"{self.format.title}, seed {self.seed}", flush=True)
        task = docstrings.load(args.data, classes=args.classes, per_class=args.per_class)
        results, model = finetune(args, task, ranks, device)
        if ranks.rank == 0:
            part = self.path(directory).with_suffix(".part")
            part.write_text(json.dumps({"options": self.options, "results": results}) + "\n")
            part.replace(self.path(directory))
        del model
        gc.collect()


Results = dict[Format, list[dict[str, Any]]]  # of each seed


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean over `SMOOTHED` steps around each one, of fewer at both ends."""
    half = SMOOTHED // 2
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def band(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """The mean, the least and the greatest over seeds, at each point."""
    points = list(zip(*curves, strict=True))
    return [statistics.fmean(one) for one in points], [min(one) for one in points], [max(one) for one in points]


def final_losses(found: list[dict[str, Any]]) -> str:
    """The mean over seeds, and their sample standard deviation."""
    losses = [one["validation_loss"] for one in found]
    deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{deviation}"


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(15.6, 7), dpi=120)
    losses = {
        form: [[loss for _, loss in one["validation_losses"]] for one in found] for form, found in results.items()
    }
    compared = losses[FORMATS[0]]
    validated = [step for step, _ in results[FORMATS[0]][0]["validation_losses"]]

    # Curves that coincide stay visible: each is thinner than the one under it.
    widths = {form: 7 - 1.1 * index for index, form in enumerate(results)}

    def draw_band(panel: Any, form: Format, steps: Sequence[int], curves: list[list[float]], **style: Any) -> None:
        mean, low, high = band(curves)
        style = {"linewidth": widths[form], **style}
        panel.plot(steps, mean, color=form.color, solid_capstyle="butt", **style)
        panel.fill_between(steps, low, high, color=form.color, alpha=0.12, linewidth=0)

    for form, found in results.items():
        curves = [smoothed(one["training_losses"]) for one in found]
        every_seed = len(found) == len(compared)  # the mean of fewer seeds is no mean to compare
        seeds = f"{len(found)} seeds" if every_seed else f"seed {found[0]['seed']}, on the right only"
        label = f"{form.title} ({seeds}): {final_losses(found)}, {found[0]['state_bytes'] / 1e6:.1f} MB of state a rank"
        if every_seed:
            draw_band(panels[0], form, range(1, len(curves[0]) + 1), curves)
            draw_band(panels[1], form, validated, losses[form], label=label)
        if form.options[0] != "--tune":
            pairs = zip(losses[form], compared, strict=False)
            differences = [[a - b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
            more = {} if every_seed else {"label": label, "linestyle": "--"}
            draw_band(panels[2], form, validated, differences, linewidth=2, **more)
    panels[0].set_title(f"training loss, mean of {SMOOTHED} steps", loc="left")
    panels[1].set_title("validation loss", loc="left")
    panels[2].set_title(
        f"validation loss less that of {FORMATS[0].title}\nwith the same seed (without LoRA)", loc="left"
    )
    for panel in panels:
        panel.set_xlabel("step")
        panel.set_ylabel("cross entropy, nats a text")
        panel.grid(color="#e0e0e0")
    figure.suptitle("all-MiniLM-L6-v2 on docstrings, 2 ranks: means over seeds; bands from the least to the greatest")
    figure.legend(
        loc="lower center",
        frameon=False,
        fontsize=11,
        title="validation loss at the end, ± standard deviation over seeds; optimizer state",
    )
    figure.tight_layout(rect=(0, 0.035 * (len(results) + 1.5), 1, 1))
    figure.savefig(path)
    plt.close(figure)


def table(results: Results) -> list[str]:
    """In Markdown: validation loss by seed, mean and deviation, less that of the first format, accuracy, and state."""
    any_format = next(iter(results.values()))
    seeds = " | ".join(f"seed {one['seed']}" for one in any_format)
    lines = [
        f"| validation loss | {seeds} | mean ± deviation | less {FORMATS[0].title} | accuracy, % | state a rank | "
        "optimizer, median ms |",
        "|---" * (6 + len(any_format)) + "|",
    ]
    for form, found in results.items():
        cells = [f"{one['validation_loss']:.4f}" for one in found]
        cells += [""] * (len(any_format) - len(cells))
        accuracies = ", ".join(f"{100 * one['accuracy']:.1f}" for one in found)
        times = ", ".join(f"{1e3 * one['optimizer_s']:.0f}" for one in found)
        state = f"{found[0]['state_bytes'] / 1e6:.2f} MB"
        pairs = zip(found, any_format, strict=False)
        differences = ", ".join(f"{one['validation_loss'] - other['validation_loss']:+.4f}" for one, other in pairs)
        cells += [final_losses(found), differences, accuracies, state, times]
        lines.append(f"| {form.title} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts")
    parser.add_argument("--per-class", type=int, default=250, help="most texts of a module")
    parser.add_argument("--validate-every", type=int, default=51, help="steps between validations")
    parser.add_argument("--twin", type=int, default=3, help="number of seeds to train with DDP and torch's AdamW, too")
    parser.add_argument("--to", type=Path, default=ROOT / "runs" / "finetune", help="directory of the runs' numbers")
    parser.add_argument("--picture", type=Path, default=None, help="None: finetune-curves.png in --to")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    common = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("epochs", "per_class", "validate_every")]
    runs = [Run(form, seed, (*common, "--no-probe")) for seed in args.seeds for form in FORMATS]
    runs += [Run(TWIN, seed, (*common, "--no-probe")) for seed in args.seeds[: args.twin]]
    ranks = Ranks.from_environment()
    missing = [run for run in runs if run.kept(args.to) is None]
    if missing and not ranks.launched:
        parser.error(
            f"{len(missing)} of {len(runs)} runs are not in {args.to}; start them with torchrun, as --help says"
        )
    if missing:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        for run in missing:
            run.make(args.to, ranks)
        dist.destroy_process_group()
    if ranks.rank == 0:
        results = {form: [run.kept(args.to) for run in runs if run.format == form] for form in (*FORMATS, TWIN)}
        results = {form: found for form, found in results.items() if found}
        draw(results, args.picture or args.to / "finetune-curves.png")
        print("\n".join(table(results)))


if __name__ == "__main__":
    main()
