# SPDX-License-Identifier: Apache-2.0
"""Runs scripts on ranks as torchrun does, in processes that have imported torch already.

torchrun itself takes seconds to import, and so does each rank that it starts. The tests of ``launch/`` start it.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.ranks import processes


def run_script(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    ranks: int = 2,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    output: Path,
    deadline_s: float = 100.0,
    skips_exit: bool = False,
) -> str:
    """Run ``script`` as ``__main__`` on so many ranks; return what they print, to stdout and stderr.

    Args:
        directory: the working directory; None for this process's.
        output: a file for what they print.
        skips_exit: for scripts that train with torch alone: end each process where its script ends, without
            ``destroy_process_group`` and exit handlers, in which torch's DDP sometimes hangs or aborts.

    Raises:
        AssertionError: a rank failed, or did not end in time.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s))
    shared = {
        **(environment or {}),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 must not open the port: this process has
    }
    output.write_bytes(b"")
    started: list[Any] = []
    try:
        for rank in range(ranks):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            where = str(directory or Path.cwd())
            arguments_of_run = (str(script), list(arguments), where, own, str(output), skips_exit)
            started.append(processes.Process(target=_run, args=arguments_of_run))
            started[-1].start()
        end = time.monotonic() + deadline_s
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    printed = output.read_text()
    assert codes == [0] * ranks, f"exit codes {codes}; None: not within {deadline_s:.0f} s\n{printed}"
    return printed


def _run(
    script: str, arguments: list[str], directory: str, environment: dict[str, str], output: str, skips_exit: bool
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):  # one write a line, or lines of two ranks mix
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    warnings.resetwarnings()
    warnings.simplefilter("default", DeprecationWarning)
    if skips_exit:
        distributed: Any = torch.distributed
        distributed.destroy_process_group = lambda *_: None
    try:
        runpy.run_path(script, run_name="__main__")
        if skips_exit:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
