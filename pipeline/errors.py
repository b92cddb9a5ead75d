"""What a user can act on in the pipeline, beside the errors of a cache directory.

    DistillError        (cache_format.cache_errors) the command line prints it as one line, status 1
    ├── CacheError      a cache directory cannot be read, written or used: see cache_format.cache_errors
    ├── DataError       the text is missing, empty, malformed, or not of the kind asked for
    ├── ModelError      a model or tokenizer cannot be loaded, or cannot do what is asked
    ├── ConfigError     the options contradict one another, the model or the data
    └── DivergedError   training has come to numbers that are none

Messages are one line: where, what was found, what was expected, because of what, next step.
"""

from __future__ import annotations

from cache_format.cache_errors import DistillError


class DataError(DistillError):
    """The text cannot be read or used as it is."""


class ModelError(DistillError):
    """A model or tokenizer cannot be loaded, or lacks what the run needs."""


class ConfigError(DistillError):
    """The options contradict one another, the model or the data."""


class DivergedError(DistillError):
    """The loss or the weights of a student are no longer numbers."""
