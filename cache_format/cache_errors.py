"""Everything a caller may want to catch, as one tree.

    DistillError                 something the user can act on; the command line prints one line
    └── CacheError               a cache directory; raised itself when a writer refuses one
        ├── FormatError          the directory as a whole: no cache, unfinished, newer, damaged
        ├── CorruptShardError    one shard is missing, damaged or says something false
        ├── MismatchError        two things that must agree do not: every difference is listed
        └── ClaimLostError       another writer has taken over

Messages are one line: where, what was found, what was expected, because of what, next step. A wrong
argument is a bug of the caller and stays a ValueError or a TypeError.
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
