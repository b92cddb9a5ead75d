"""Options of what runs the teacher. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pipeline.errors import ConfigError
from pipeline.options import check_ranges, option, read_table

if TYPE_CHECKING:
    from pipeline.teacher.cache_config import CacheTeacherConfig

TEACHER, VLLM = "Teacher", "vLLM"

DEFAULT_ROWS = 8
Tokens: TypeAlias = int | Literal["auto"]

BATCH_SIZE = partial(
    option,
    None,
    help="Rows per forward pass; halved when out of memory.",
    group=TEACHER,
    minimum=1,
    common=True,
    default_text=f"{DEFAULT_ROWS}; on CUDA see `batch_tokens`",
)
BATCH_TOKENS = partial(
    option,
    None,
    help="Tokens per forward pass over text, padding included, instead of a number of rows; halved when out of memory. "
    "auto: doubled until the teacher gets no faster.",
    group=TEACHER,
    minimum=1,
    common=True,
    metavar="N|auto",
    default_text="auto on CUDA, unless `batch_size` is given",
)
PASSED_ON = ("quantization", "tensor_parallel_size", "max_model_len", "gpu_memory_utilization")
"""Options that are arguments of vLLM's `EngineArgs` under the same name."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Transformers, vLLM or a server, and the arguments of vLLM."""

    engine: Literal["auto", "transformers", "vllm", "server"] = option(
        "auto",
        help="What runs the teacher. auto: transformers, or server if `teacher` is a URL. vllm: vLLM in this process; "
        "causal teachers only.",
        group=TEACHER,
        common=True,
    )
    quantization: str | None = option(None, help="Quantization method, as vLLM names it.", group=VLLM)
    tensor_parallel_size: int | None = option(
        None, help="Number of GPUs that vLLM splits the teacher across.", group=VLLM, minimum=1, default_text="1"
    )
    max_model_len: int | None = option(
        None, help="Maximum number of tokens per document.", group=VLLM, minimum=2, default_text="`seq_len` + 1"
    )
    gpu_memory_utilization: float | None = option(
        None, help="Share of the GPU's memory that vLLM may use.", group=VLLM, above=0, maximum=1, default_text="vLLM's"
    )
    # A file, or (in Python and in a config file) its contents.
    engine_args: Any = option(
        None,
        help="TOML or JSON file with other arguments of vLLM's EngineArgs, such as max_num_seqs.",
        group=VLLM,
        metavar="FILE",
        table=True,
    )
    allow_untested: bool = option(False, help="Use a version of vLLM that was not tested.", group=VLLM)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.engine != "vllm":
            values = {**self._named(), "engine_args": self.engine_args, "allow_untested": self.allow_untested or None}
            for name, value in values.items():
                if value is not None:
                    raise ConfigError(f"`{name}`: only with `engine=vllm`. Leave it out.")

    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's `EngineArgs`. Raises: ConfigError if the file cannot be read, or one is given twice."""
        given = self.engine_args
        more = dict(given) if isinstance(given, Mapping) else {} if given is None else read_table("engine_args", given)
        named = {name: value for name, value in self._named().items() if value is not None}
        if isinstance(more.get("hf_token"), str):
            raise ConfigError(
                "`engine_args`: hf_token would be written into the cache. Remove it, and log in with hf auth login."
            )
        if twice := sorted(set(named) & set(more)):
            raise ConfigError(f"`{twice[0]}`: found in `engine_args` too. Give it once.")
        return named | more

    def _named(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PASSED_ON}


def check_batches(config: CacheTeacherConfig) -> None:
    """Checks how rows are put together and computed. Raises: ConfigError."""
    for name in ("device_map", "tensor_parallel"):
        if config.compile and getattr(config, name):
            raise ConfigError(f"`compile`: cannot be combined with `{name}`. Leave one of them out.")
    if config.batch_tokens is None:
        return
    if config.generation is None and config.batch_size is not None:
        raise ConfigError(f"`batch_tokens` {config.batch_tokens}: found `batch_size` too. Give one of them.")
    if config.generation is not None and config.generation.writer is None:
        raise ConfigError(
            f"`batch_tokens` {config.batch_tokens}: `generate` takes `batch_size` answers at a time. Leave it out."
        )
    if config.batch_tokens == "auto" and config.tensor_parallel:
        raise ConfigError(
            "`batch_tokens` auto: cannot be combined with `tensor_parallel`, because each process would find a "
            "different number. Give a number."
        )


def rows_per_pass(config: CacheTeacherConfig) -> int:
    """Rows or answers per forward pass, where no number of tokens limits it."""
    return config.batch_size or DEFAULT_ROWS


def most_rows_per_pass(config: CacheTeacherConfig) -> int:
    """Full rows of the largest forward pass that was asked for. "auto" tries no more than a record batch has."""
    if config.batch_tokens is None:
        return rows_per_pass(config)
    return 1 if config.batch_tokens == "auto" else max(1, config.batch_tokens // config.data.seq_len)


def tokens_per_pass(config: CacheTeacherConfig, device_type: str) -> Tokens | None:
    """What limits a forward pass over text: a number of tokens, one that is to be found, or (None) a number of rows."""
    if config.generation is not None:
        return None  # answers
    if config.batch_tokens is not None or config.batch_size is not None:
        return config.batch_tokens
    return "auto" if device_type == "cuda" and not config.tensor_parallel else None
