"""Options of what runs the teacher. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.options import check_ranges, option, read_table

TEACHER, VLLM = "Teacher", "vLLM"
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
        None, help="Maximum number of tokens per document.", group=VLLM, minimum=2, default_text="seq-len and one more"
    )
    gpu_memory_utilization: float | None = option(
        None, help="Share of the GPU's memory that vLLM may use.", group=VLLM, above=0, maximum=1, default_text="vLLM's"
    )
    # A file, or (Python only) a mapping.
    engine_args: Any = option(
        None,
        help="TOML or JSON file with other arguments of vLLM's EngineArgs, such as max_num_seqs.",
        group=VLLM,
        metavar="FILE",
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
        if twice := sorted(set(named) & set(more)):
            raise ConfigError(f"`{twice[0]}`: found in `engine_args` too. Give it once.")
        return named | more

    def _named(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PASSED_ON}
