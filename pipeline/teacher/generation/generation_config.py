"""Options of a teacher, or another writer, that answers prompts. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from pipeline.errors import ConfigError
from pipeline.models.loading_options import DEVICE_MAP, Dtype
from pipeline.models.paths import split_revision
from pipeline.options import MAX_SEED, check_ranges, option

GENERATION = "Generation"

Keep = Literal["all", "first", "best"]

VLLM_TEMPERATURES = (0.01, 2)  # it refuses higher ones, and takes the lower end for those below
LOADING_THE_WRITER = ("writer_dtype", "writer_device_map", "writer_quantization", "writer_tensor_parallel_size")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How prompts are answered, by whom, and which answers are kept."""

    PREFIX: ClassVar = "gen_"

    temperature: float = option(
        1.0,
        help="Sampling temperature; 0 is greedy. Does not affect the targets.",
        group=GENERATION,
        minimum=0,
        below=float("inf"),
    )
    top_p: float = option(
        1.0,
        help="Sample from the smallest set of most likely tokens with this total probability.",
        group=GENERATION,
        above=0,
        maximum=1,
    )
    top_k: int = option(
        0, help="Sample from the K most likely tokens; 0: all.", group=GENERATION, minimum=0, maximum=2**31
    )
    seed: int = option(
        0, help="Seed for sampling (combined with prompt and answer).", group=GENERATION, minimum=0, maximum=MAX_SEED
    )
    answers_per_prompt: int = option(1, help="Answers per prompt.", group=GENERATION, minimum=1, maximum=2**16)
    max_new_tokens: int = option(
        256, help="Maximum length of an answer in tokens.", group=GENERATION, minimum=1, maximum=2**24
    )
    stop: tuple[str, ...] = option(
        (), help="String that ends an answer; may be given several times.", group=GENERATION, metavar="TEXT", text=True
    )
    keep_if: str | None = option(
        None,
        help="Keep only answers that this function accepts: module:function or file.py:function.",
        group=GENERATION,
        metavar="FUNCTION",
    )
    writer: str | None = option(
        None,
        name="writer",
        help="Model that answers instead of the teacher, such as a student; the teacher scores its answers.",
        group=GENERATION,
        metavar="MODEL[@REVISION]",
        common=True,
    )
    writer_dtype: Dtype | None = option(
        None, name="writer_dtype", help="Data type of the writer.", group=GENERATION, default_text="that of `dtype`"
    )
    writer_device_map: str | None = DEVICE_MAP(
        name="writer_device_map",
        help="Spread the writer across all devices, CPU and disk: auto (accelerate), or a JSON file of modules.",
        group=GENERATION,
    )
    writer_quantization: str | None = option(
        None,
        name="writer_quantization",
        help="Quantization method of the writer, as vLLM names it.",
        group=GENERATION,
    )
    writer_tensor_parallel_size: int | None = option(
        None,
        name="writer_tensor_parallel_size",
        help="Number of GPUs that vLLM splits the writer across.",
        group=GENERATION,
        minimum=1,
        default_text="1",
    )
    keep: Keep = option(
        "all", help="Accepted answers to keep per prompt: all, the first, or the best (most likely).", group=GENERATION
    )

    def __post_init__(self) -> None:
        check_ranges(self, self.PREFIX)
        if self.temperature == 0.0 and self.answers_per_prompt > 1:
            raise ConfigError(
                f"`gen_answers_per_prompt` {self.answers_per_prompt}: with `gen_temperature=0` all answers to a prompt "
                "are the same. Use 1, or a higher temperature."
            )
        if "" in self.stop:
            raise ConfigError("`gen_stop`: found an empty string, which every text contains. Leave it out.")

        for name in LOADING_THE_WRITER:
            if self.writer is None and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` {getattr(self, name)}: only with `writer`. Leave it out.")

    def check_in_vllm(self) -> None:
        """Raises: ConfigError for what vLLM does not sample with."""
        least, most = VLLM_TEMPERATURES
        if self.temperature and not least <= self.temperature <= most:
            raise ConfigError(
                f"`gen_temperature` {self.temperature:g}: vLLM samples at 0 or from {least} to {most}. Choose one of "
                "these, or use `engine=transformers`."
            )

    @property
    def writer_source(self) -> tuple[str | None, str | None]:
        """Name or path of the writer, and its revision if one is given."""
        return (None, None) if self.writer is None else split_revision(self.writer)

    def to_json(self) -> dict[str, Any]:
        """What decides the answers, as in the manifest."""
        decides = asdict(self)
        for name in ("keep_if", "keep", "writer", *LOADING_THE_WRITER):  # the manifest has the writer's fingerprints
            del decides[name]
        return {**decides, "stop": list(self.stop)}
