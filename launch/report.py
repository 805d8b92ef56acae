# SPDX-License-Identifier: Apache-2.0
"""What rank 0 shows: a progress bar (plain lines where there is no terminal), TensorBoard metrics, the closing table.

Takes numbers and prints them; computes and communicates nothing. Every other rank uses `Silence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Silence:
    """The reporter of the ranks that report nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def step_done(self, step: int) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float], state_bytes: int) -> None:
        pass

    def validation(self, step: int, loss: float) -> None:
        pass

    def summary(self, rows: Mapping[str, str], sample: bytes) -> None:
        pass


class Report(Silence):
    """Rank 0's reporter of a run of `steps` steps; metrics go to TensorBoard files too if `log_dir` names a place."""

    def __init__(self, steps: int, log_dir: str | None) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 100  # the width of no terminal is 80, and of a log it does not matter
        self.steps = steps
        self.tenths = -1  # of the run, as far as lines have told
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=steps, status="")
        self.writer = summary_writer(log_dir) if log_dir else None

    def __enter__(self) -> Report:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def step_done(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float], state_bytes: int) -> None:
        """The newest numbers, under TensorBoard's names; `loss` and `tokens_per_s` also go to the progress bar.

        Without a terminal the first of them in every tenth of the run leave a line instead.
        """
        status = (
            f"loss {values['loss']:.3f}  {values['tokens_per_s']:,.0f} tokens/s  "
            f"optimizer {megabytes(state_bytes)} a rank"
        )
        self.progress.update(self.task, status=status)
        if self.progress.disable and step * 10 // self.steps > self.tenths:
            self.tenths = step * 10 // self.steps
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {status}", flush=True)
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # a rank that is killed flushes nothing

    def validation(self, step: int, loss: float) -> None:
        self.say(f"step {step}: validation loss {loss:.4f} nats a byte")
        if self.writer is not None:
            self.writer.add_scalar("validation_loss", loss, step)

    def summary(self, rows: Mapping[str, str], sample: bytes) -> None:
        """The generated text, with what is not printable replaced, and a table of two columns."""
        if sample:
            self.console.rule("generated text", align="left")
            printable = sample.decode("utf-8", errors="replace")
            self.say("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in printable))
        self.console.rule(align="left")
        table = Table(show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)


def summary_writer(log_dir: str) -> Any:
    """A TensorBoard writer; imported here because importing it takes a second that only `--log-dir` should cost."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir)


def megabytes(count: int) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:,.2f} MB"
