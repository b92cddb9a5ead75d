"""The error tree of the project.

    DistillError                 the user can act on it; the command line prints one line
    └── CacheError               a cache directory; raised itself when a writer refuses one
        ├── FormatError          the directory as a whole: no cache, unfinished, newer, damaged
        ├── CorruptShardError    one shard is missing, damaged or breaks a rule of the format
        ├── MismatchError        two things that must agree differ; the message lists every difference
        └── ClaimLostError       another writer has taken over

A message is one line: where, found, expected, why it matters, next step. Wrong arguments are bugs of the caller and
raise ValueError or TypeError.
"""

from __future__ import annotations


class DistillError(Exception):
    """Root of all errors that a user can act on."""


class CacheError(DistillError):
    """A cache directory cannot be read or written."""


class FormatError(CacheError):
    """The directory is not an intact, finished cache of a format version known here."""


class CorruptShardError(CacheError):
    """The bytes of a shard or its sidecar are not what the manifest promises."""


class MismatchError(CacheError):
    """What is given differs from what is recorded."""


class ClaimLostError(CacheError):
    """Another writer has taken over what this one was writing."""
