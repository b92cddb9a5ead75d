"""Errors of the environment as one line with a next step."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
ALMOST_NOTHING = 1 << 20  # bytes

# In errors of gloo, NCCL and torch's store, in lower case. Most are plain RuntimeErrors.
LOST_PEER = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "communicator was aborted")

CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_ENDPOINT_URL for other servers)",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "Log in (hf auth login)",
}
"""What to do when a kind of store refuses access."""


def rank_prefix() -> str:
    """Which of several processes reports an error: the others are otherwise silent."""
    return f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def is_lost_peer(error: Exception) -> bool:
    """Whether torch could not reach another of several processes because that one has ended."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    of_torch = type(error).__module__ == "torch.distributed" or "gloo" in text or "nccl" in text
    return of_torch and any(words in text for words in LOST_PEER)


def describe_os_error(error: OSError, output: str | None = None) -> str:
    """No space, no permission, a name that is too long: not a bug.

    Args:
        output: where the command writes, to name a full disk: libraries often do not say which file they wrote.
    """
    where = error.filename
    if error.errno not in FULL:
        text = error.strerror or str(error)
    else:
        text = os.strerror(error.errno)
        where = where or (output if output is not None and _is_full(output) else None)
    return f"{where}: {text}. {_remedy(error)}" if where else f"{text}. {_remedy(error)}"


def _is_full(path: str) -> bool:
    """Whether a local disk has no space left; the error may as well be about a temporary directory."""
    if "://" in path:
        return False
    place = Path(path).absolute()
    existing = next(each for each in (place, *place.parents) if each.exists())
    return shutil.disk_usage(existing).free < ALMOST_NOTHING


def _remedy(error: OSError) -> str:
    if error.errno in FULL:
        return "Free some space and run the same command again."
    if error.errno == errno.EACCES and "://" in str(error.filename):
        protocol = str(error.filename).partition("://")[0]
        credentials = CREDENTIALS.get(protocol, "Set the credentials that this store requires")
        return f"{credentials}, and check that they grant access."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Change its permissions, or choose another path."
    if error.errno in (errno.EIO, errno.ETIMEDOUT):
        return "Check the connection (or the disk), and run the same command again."
    return "Check the path."
