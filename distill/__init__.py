"""Offline knowledge distillation of language models.

    import distill

    distill.cache_teacher("models/teacher", "data/train.jsonl", "caches/train")
    distill.train_student("caches/train", "models/student", "students/first")
    print(distill.evaluate("caches/heldout", "students/first").kl)

Functions take the options of the command of the same name as keyword arguments. They raise exceptions and print
nothing: stages are logged to the logger "distill", warnings are `DistillWarning`, progress goes to `on_progress`.
Importing the package is fast: torch is imported only by functions that need it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_format import (
        Cache,
        CacheError,
        ClaimLostError,
        CorruptShardError,
        DistillError,
        FormatError,
        MismatchError,
        SparseTargets,
        open_cache,
    )
    from distill.functions import (
        Verification,
        cache_teacher,
        evaluate,
        export_cache,
        import_cache,
        plan,
        report,
        train_student,
        verify,
    )
    from distill.run_progress import DistillWarning, Progress
    from pipeline.errors import ConfigError, DataError, DivergedError, ModelError
    from pipeline.losses import fused_head_loss, sparse_kl

    __version__: str

_MODULES = {
    "distill.functions": (
        *("cache_teacher", "train_student", "evaluate", "report", "plan", "verify", "import_cache", "export_cache"),
        "Verification",
    ),
    "distill.run_progress": ("Progress", "DistillWarning"),
    "cache_format": (
        *("open_cache", "Cache", "SparseTargets", "DistillError", "CacheError", "FormatError", "CorruptShardError"),
        *("MismatchError", "ClaimLostError"),
    ),
    "pipeline.errors": ("DataError", "ModelError", "ConfigError", "DivergedError"),
    "pipeline.losses": ("sparse_kl", "fused_head_loss"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Cache",
    "CacheError",
    "ClaimLostError",
    "ConfigError",
    "CorruptShardError",
    "DataError",
    "DistillError",
    "DistillWarning",
    "DivergedError",
    "FormatError",
    "MismatchError",
    "ModelError",
    "Progress",
    "SparseTargets",
    "Verification",
    "__version__",
    "cache_teacher",
    "evaluate",
    "export_cache",
    "fused_head_loss",
    "import_cache",
    "open_cache",
    "plan",
    "report",
    "sparse_kl",
    "train_student",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("distill")
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
