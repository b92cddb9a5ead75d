"""Paths of caches: PATH:WEIGHT of several caches in a run, and where copies are kept. Standard library only."""

from __future__ import annotations

import math
import os
import re
from functools import partial

from pipeline.errors import ConfigError
from pipeline.options import option

# Options of every command that reads a cache row by row; a configuration adds the heading.
CACHE_DIR = partial(option, None, help="Keep local copies of shards read from an object store here.")
CACHE_DIR_GB = partial(option, 100.0, help="Size limit of these copies in GB.", minimum=0.001, below=math.inf)

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


def parse_weight(text: str) -> tuple[str, float | None]:
    """PATH:WEIGHT -> both; the weight is None if there is no number after the last colon, as in s3://bucket/cache.

    A directory with exactly this name is a path, unless one without the number exists too.

    Raises: ConfigError for a weight that is not positive, or a name that could mean either.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or not NUMBER.fullmatch(number):
        return text, None
    if os.path.exists(text):
        if os.path.exists(path):
            raise ConfigError(
                f"`cache` {text}: both {path} and {text} exist. Write {path}:{number}:1 for the second of them, or "
                f"./{path}/:{number} for the first with a weight."
            )
        return text, None
    weight = float(number)
    if not 0.0 < weight < math.inf:
        raise ConfigError(
            f"`cache` {text}: weight {number}, expected a positive number. Weights are relative to each other, such as "
            "A:0.7 B:0.3; leave out a cache that you do not want to use."
        )
    return path, weight
