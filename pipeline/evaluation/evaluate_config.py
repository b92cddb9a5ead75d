"""Options of `distill evaluate` and `distill.evaluate`. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.models.loading_options import DEVICE, DTYPE, PADDING_FREE, REVISION, TRUST_REMOTE_CODE, Dtype
from pipeline.options import check_ranges, option
from pipeline.student.cache_paths import CACHE_DIR, CACHE_DIR_GB

FEW_TOKENS, FEW_ROWS = 1000, 10
"""With fewer loss tokens, or rows that hold them, numbers are marked: neither they nor their intervals say much."""

FEW_NOTE = f"*: fewer than {FEW_TOKENS:,} loss tokens or {FEW_ROWS} rows, too few to rely on"

MOST_NATS = 700.0
"""Cross-entropy above which exp() would overflow: the perplexity is not reported there."""

IO, TASKS, STUDENT, READING, HARDWARE = "Input", "Tasks", "Student", "Reading the cache", "Hardware"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of a student on a cache."""

    cache: str = option(help="Held-out cache directory or URL.", group=IO, common=True)
    # A directory, hub name or .gguf file; or (Python only) a loaded model.
    student: Any = option(help="Student: transformers directory, hub name, or .gguf file.", group=IO, common=True)
    # Python only: a tokenizer object, for a student that is one too.
    tokenizer: Any = option(None, help="Tokenizer of a student that is given as an object.", group=IO, python_only=True)
    card: bool = option(
        False, help="Write the metrics into the README.md of the student's directory, unless it was edited.", group=IO
    )
    tasks: tuple[str, ...] = option(
        (),
        help="Task of lm-eval to score as well: its name or a YAML file (needs distill[tasks]); may be given several "
        "times.",
        group=TASKS,
        metavar="NAME|YAML",
        common=True,
    )
    # A directory, hub name or .gguf file; or (Python only) a loaded model, with the tokenizer of the cache.
    teacher: Any = option(None, help="Teacher to score on the same tasks.", group=TASKS)
    max_rows: int | None = option(None, help="Use only the first N rows.", group=IO, minimum=1, common=True)
    by: str | None = option(
        None,
        help="Show the metrics for each value of this column too, such as a domain; the cache must keep it.",
        group=IO,
        metavar="COLUMN",
        common=True,
    )
    cross_tokenizer: Literal["project", "uld"] | None = option(
        None,
        help="For students whose tokenizer differs: compare only where tokens of both end at the same byte. "
        "Both values measure the same.",
        group=STUDENT,
        common=True,
    )
    revision: str | None = REVISION(group=STUDENT)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=STUDENT)
    cache_dir: str | None = CACHE_DIR(group=READING)
    cache_dir_gb: float = CACHE_DIR_GB(group=READING)
    batch_size: int = option(8, help="Rows per forward pass.", group=HARDWARE, minimum=1, common=True)
    padding_free: bool | None = PADDING_FREE(group=HARDWARE)
    device: str = DEVICE(group=HARDWARE)
    dtype: Dtype = DTYPE(group=HARDWARE)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.teacher is not None and not self.tasks:
            raise ConfigError("`teacher`: only with `tasks`, because its targets are in the cache. Leave it out.")


def shown_perplexity(nats: float) -> str:
    """exp(nats) for people."""
    if nats > MOST_NATS:
        return "> 1e304"
    return shown_number(math.exp(nats))


def shown_number(value: float) -> str:
    """1,234.56, or 1.2e+06 from a million."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"
