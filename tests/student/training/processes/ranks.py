"""Ranks of a distributed run as forks of a process that has imported everything and computed nothing.

A start takes milliseconds, where each process of torchrun imports for ten seconds. torchrun itself is run by
tests/losses/test_position_weighting.py and tests/teacher/test_resume.py.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from typing import Any

import pytest
import torch

multiprocessing.set_forkserver_preload(["runs"])


def on_processes(count: int, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Calls a function of a module as each rank of `count` processes over gloo; raises what one of them raises."""
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.12.4 the server searches only its own path for what it is to import.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (count, port, partial(work, *arguments, **options))
    torch.multiprocessing.start_processes(_rank, given, nprocs=count, daemon=True, start_method="forkserver")


def _rank(number: int, count: int, port: int, work: Callable[[], Any]) -> None:
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    work()
