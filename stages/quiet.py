"""What must be settled before any heavy library is imported, and how a command ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from drawplate.core.errors import told

INTERRUPTED = 130
"""The exit code of a command that was asked to stop, as shells give it for SIGINT."""


def quiet_environment() -> None:
    """No tool phones home or draws bars; set before any of them is imported."""
    for name, value in {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)


def keep_kernels(most: int) -> None:
    """Keeps kernels for the last `most` shapes of products in memory, in place of 1024.

    Each takes up to a megabyte. Fewer than one step needs again cost time, more are of no use where
    shapes are ever new. Has no effect once the process has multiplied.
    """
    for layer in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the latter is ideep's
        os.environ.setdefault(layer, str(most))


def keep_memory() -> None:
    """What tensors leave is kept for those to come, up to a gigabyte.

    glibc gives it back to the system after nearly every large tensor, and fetching it again, page
    by page, is a twelfth of a step of the default run's training. Tensors beyond 32 MiB, where its
    own threshold ends too, still come from the system one by one. Other allocators are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 1 << 30)


def interruptible() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, also where a background shell ignored SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def begin() -> None:
    """What a stage's process is, before anything loads: quiet, and one that keeps its memory.

    There is one way to interrupt it, and it does not outlive who started it.

    Raises:
        KeyboardInterrupt: the `dvc` that started this process is gone.
    """
    quiet_environment()
    keep_memory()
    interruptible()
    _end_with_parent()


def _end_with_parent() -> None:
    """A stage whose `dvc` is gone, or a process whose torchrun is, must not go on writing.

    Where `dvc` was gone before this was asked for, somebody else is our parent by now. `dvc` shares
    our process group, whoever adopts what it left behind does not.
    """
    spawned = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (spawned or "DVC_STAGE" in os.environ):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if not spawned and os.getpgid(os.getppid()) != os.getpgrp():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def guarded(entry: Callable[[], Any]) -> int:
    """Runs a command: errors a user can act on are one line, and the exit code says their kind.

    2 user error, 3 damaged artifact, 4 a resource ran out, 5 training diverged, 130 interrupted.
    """
    try:
        entry()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        print(f"drawplate: {error.format_message()}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort):
        print(
            "drawplate: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        print(f"drawplate: {known}", file=sys.stderr)
        return known.code
    return 0
