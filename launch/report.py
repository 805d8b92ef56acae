# SPDX-License-Identifier: Apache-2.0
"""Output of rank 0: a progress bar (plain lines without a terminal), TensorBoard metrics and the final table.

Prints numbers that it is given; must not compute or communicate. All other ranks use `Silence`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Silence:
    """The reporter of all ranks but rank 0: prints nothing."""

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

    def validation(self, step: int, loss: float, *, unit: str = "nats a byte") -> None:
        pass

    def rows(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        pass

    def summary(self, rows: Mapping[str, str], sample: bytes) -> None:
        pass


class Report(Silence):
    """Rank 0's reporter of a run of `steps` steps; writes TensorBoard files to `log_dir`, unless None."""

    def __init__(self, steps: int, log_dir: str | None) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 100  # without a terminal, rich assumes 80
        self.steps = steps
        self.tenths = -1  # of the run, in the last printed line
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

    def rows(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table."""
        table = Table()
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def step_done(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float], state_bytes: int) -> None:
        """Writes the newest numbers, by their TensorBoard names; shows `loss` and `tokens_per_s` in the progress bar.

        Without a terminal, prints a line for the first numbers in each tenth of the run.
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
            self.writer.flush()  # a killed rank would lose the rest

    def validation(self, step: int, loss: float, *, unit: str = "nats a byte") -> None:
        self.say(f"step {step}: validation loss {loss:.4f} {unit}")
        if self.writer is not None:
            self.writer.add_scalar("validation_loss", loss, step)

    def summary(self, rows: Mapping[str, str], sample: bytes) -> None:
        """Prints the generated text, without unprintable characters, and a table of two columns."""
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
    """A TensorBoard writer. Imports here, as the import takes a second."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir)


def megabytes(count: int) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:,.2f} MB"
