"""A process of several says in one line that another one has failed; other errors of torch keep their traceback."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.terminal.click_options import distill_command

# As torch 2.13 words them.
GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38548. This is "
    "typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error."
)
RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:7077: Connection reset by peer."
)
NCCL = "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"


def command_that_fails(error: Exception) -> Result:
    @distill_command("train")
    def train() -> None:
        raise error

    return CliRunner().invoke(train)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError(RESET),
        torch.distributed.DistBackendError(NCCL),
        torch.distributed.DistNetworkError("Connection reset by peer"),
    ],
)
def test_a_lost_peer_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = command_that_fails(error)
    assert result.exit_code == 1
    assert result.output == "Error: process 1: another process has failed; see its error.\n"


@pytest.mark.parametrize(
    "processes, error",
    [
        ("1", RuntimeError(GLOO)),
        ("2", RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        ("2", RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation")),
        ("2", torch.distributed.DistNetworkError("The server socket cannot be initialized on [::]:29500")),
    ],
)
def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, processes: str, error: Exception) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "0")
    assert command_that_fails(error).exception is error
