"""Errors of the pipeline that a user can act on, next to those of a cache directory.

    DistillError        (cache_format.cache_errors) the command line prints it as one line, status 1
    ├── CacheError      a cache directory cannot be read, written or used: see cache_format.cache_errors
    ├── DataError       the text is missing, empty, malformed, or not of the requested kind
    ├── ModelError      a model or tokenizer cannot be loaded, or lacks what the run needs
    ├── ConfigError     an option is wrong, or contradicts another option, the model or the data
    ├── DivergedError   the loss or the weights became NaN or Inf
    └── DiskFullError   no space left for a checkpoint or the student; also an OSError

A message is one line: where, what was found, what was expected, why it matters, the next step. It names options by
their Python name in backticks, `top_k`, `tail=bucket` or `packing=False`; the command line shows its flags instead.
"""

from __future__ import annotations

import errno
import re

from cache_format.cache_errors import DistillError

OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
"""An option in a message: its name, and the value it is given with `=`."""


class DataError(DistillError):
    """The text cannot be read or used as it is."""


class ModelError(DistillError):
    """A model or tokenizer cannot be loaded, or lacks what the run needs."""


class ConfigError(DistillError):
    """An option is wrong, or contradicts another option, the model or the data."""

    @property
    def field(self) -> str | None:
        """The option that the message names first."""
        found = OPTION.search(str(self))
        return None if found is None else found[1]


class DivergedError(DistillError):
    """The loss or the weights of a student became NaN or Inf."""


class DiskFullError(DistillError, OSError):
    """There is no space left for a checkpoint or the student."""

    errno = errno.ENOSPC
