"""Options of stage one: `distill cache-teacher` and `distill plan`, `distill.cache_teacher` and `distill.plan`.

A run, and which of its options exclude each other. The options of each subject are declared where the subject is,
and are parts of `CacheTeacherConfig`: of the text in `text.data_config`, of the targets in `targets.rules`, and so on.
Standard library only (see `pipeline.options`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.models.loading_options import (
    COMPILE,
    DEVICE,
    DEVICE_MAP,
    DTYPE,
    PADDING_FREE,
    REVISION,
    TENSOR_PARALLEL,
    TRUST_REMOTE_CODE,
    Dtype,
)
from pipeline.models.paths import is_url
from pipeline.options import Metadata, check_ranges, flat, option, options_of, part
from pipeline.teacher.engines.engine_config import BATCH_SIZE, BATCH_TOKENS, EngineConfig, Tokens, check_batches
from pipeline.teacher.engines.server.server_config import ServerConfig, check_served
from pipeline.teacher.generation.generation_config import GENERATION, GenerationConfig
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import IO, DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.writing.worker_config import WorkerConfig

TEACHER, FILES = "Teacher", "Cache files"

STATES_OF_GIVEN_TEXT = "hidden states are stored for given text only"
WITHOUT_GENERATION = {
    "packing": "each answer is a row of its own",
    "append_eos": "an answer ends where the teacher ends it",
    "loss_on": "the loss is on the answer",
    "turns": "the loss is on the answer",
    "num_proc": "one process reads the prompts",
    "overlap": "prompts are not cut into windows",
    "all_positions": "the prompts get no targets",
    **dict.fromkeys(("num_workers", "worker_index", "shard_range", "tensor_parallel"), "one process generates"),
    "targets": STATES_OF_GIVEN_TEXT,  # hidden ones
}
"""Option that cannot be combined with `generate` -> why."""

WITHOUT_VLLM = {
    "batch_size": ", or set max_num_seqs in `engine_args`",
    "batch_tokens": ", or set max_num_batched_tokens in `engine_args`",
    "device": "; vLLM runs on the device that it is built for",
    "device_map": "",
    "tensor_parallel": ", and use `tensor_parallel_size`",
    "padding_free": "",
    "compile": "; vLLM compiles by itself",
}
"""Option that cannot be combined with `engine=vllm` -> what to do instead."""


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig:
    """One run of stage one."""

    # A directory, hub name or .gguf file; or (Python only) a loaded model.
    teacher: Any = option(
        help="Teacher: transformers directory, hub name, .gguf file, or the URL of a server.", group=IO, common=True
    )
    data: DataConfig = part(DataConfig)
    output: str = option(
        help="Cache directory or fsspec URL. An unfinished run in it is continued.", group=IO, common=True
    )
    objective: Literal["auto", "causal", "masked"] = option(
        "auto",
        help="What the teacher predicts: the next token, or masked tokens. auto: whichever it was trained for.",
        group=TEACHER,
    )
    targets: TargetRule = part(TargetRule)
    running: EngineConfig = part(EngineConfig)
    server: ServerConfig = part(ServerConfig, prefix=ServerConfig.PREFIX)
    batch_size: int | None = BATCH_SIZE()
    batch_tokens: Tokens | None = BATCH_TOKENS()
    padding_free: bool | None = PADDING_FREE(group=TEACHER)
    compile: bool = COMPILE(group=TEACHER)
    device: str = DEVICE(group=TEACHER)
    dtype: Dtype = DTYPE(
        group=TEACHER,
        help="auto: on a CPU float32, or bfloat16 if that is the checkpoint's dtype and a measurement finds it faster; "
        "elsewhere the checkpoint's dtype.",
    )
    device_map: str | None = DEVICE_MAP(group=TEACHER)
    tensor_parallel: bool = TENSOR_PARALLEL(group=TEACHER)
    revision: str | None = REVISION(group=TEACHER)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=TEACHER)
    # A directory or hub name, or (Python only) a tokenizer.
    tokenizer: Any = option(
        None,
        help="Tokenizer of the teacher: directory or hub name. Required for a teacher on a server.",
        group=TEACHER,
        metavar="DIR",
        default_text="the teacher's own",
    )
    masking: MaskRule | None = part(MaskRule, prefix=MaskRule.PREFIX, optional=True)
    hidden: HiddenRule | None = part(HiddenRule, prefix=HiddenRule.PREFIX, optional=True)
    all_positions: bool = option(
        False, help="Also store targets where the loss mask is off, such as in prompts.", group=FILES
    )
    rows_per_shard: int | None = option(
        None, help="Rows per shard file.", group=FILES, minimum=1, default_text="about 262,144 tokens"
    )
    encoding: Literal["columns", "packed"] = option(
        "columns",
        help="columns: readable by any Arrow reader. packed: 2/3 to 4/5 of the size, readable by distill only.",
        group=FILES,
    )
    compression_level: int = option(9, help="zstd compression level.", group=FILES, minimum=1, maximum=22)
    generation: GenerationConfig | None = part(
        GenerationConfig,
        prefix=GenerationConfig.PREFIX,
        optional=True,
        switch="generate",
        switch_metadata=Metadata(
            help="Let the teacher answer the prompts in the data, and cache its answers.", group=GENERATION, common=True
        ),
    )
    overwrite: bool = option(False, help="Delete the cache in the output directory first.", group=IO, common=True)
    workers: WorkerConfig = part(WorkerConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.generation is not None:
            self._check_generation()
        if self.running.engine == "vllm":
            self._check_vllm()
        check_served(self)
        check_batches(self)
        self._check_hidden()
        self._check_workers()

    def given(self, name: str) -> str:
        """The options of an optional part that are not at their defaults, in backticks; all of them if none is."""
        options = [each.name for each in options_of(CacheTeacherConfig).values() if each.path[0] == name]
        changed = flat(self)
        return ", ".join(f"`{each}`" for each in [each for each in options if each in changed] or options)

    def _check_hidden(self) -> None:
        if self.targets.kind != "hidden":
            if self.hidden is not None and self.hidden.layers is None:
                raise ConfigError(
                    f"{self.given('hidden')}: only with `hidden_states`. Name the layers to store, such as "
                    "`hidden_states=last`, or leave this out."
                )
            return
        if self.encoding != "columns":
            raise ConfigError(f"`encoding` {self.encoding}: hidden targets have no entries to pack. Leave it out.")
        if self.hidden is not None and self.hidden.every != 1:
            raise ConfigError(
                f"`hidden_every` {self.hidden.every}: `targets=hidden` needs the state of every position. Leave it out."
            )

    def _check_workers(self) -> None:
        count, index = self.workers.num_workers, self.workers.worker_index
        if count is not None and index is None:
            raise ConfigError(
                f"`num_workers` {count}: found no `worker_index`, expected the index of this process, 0 to "
                f"{count - 1}. Give it."
            )
        if count is None and index is not None:
            raise ConfigError(
                f"`worker_index` {index}: found no `num_workers`, expected the number of processes that write this "
                "cache. Give it."
            )

    def _check_vllm(self) -> None:
        given = flat(self)
        for name, instead in WITHOUT_VLLM.items():
            if name in given:
                raise ConfigError(f"`{name}`: cannot be combined with `engine=vllm`. Leave it out{instead}.")
        if self.masking is not None or self.objective == "masked":
            raise ConfigError("`engine` vllm: for causal teachers only. Use `engine=transformers`.")
        if self.generation is not None:
            self.generation.check_in_vllm()

    @property
    def on_server(self) -> bool:
        """Whether the teacher is the URL of a server."""
        return is_url(self.teacher)

    def _check_generation(self) -> None:
        given = flat(self)
        for name, why in WITHOUT_GENERATION.items():
            if name in given and (name != "targets" or self.targets.kind == "hidden"):
                raise ConfigError(f"`{name}`: cannot be combined with `generate`: {why}. Leave it out.")
        for name, why in (("hidden", STATES_OF_GIVEN_TEXT), ("masking", "a teacher that generates is not masked")):
            if getattr(self, name) is not None:
                raise ConfigError(f"{self.given(name)}: cannot be combined with `generate`: {why}. Leave it out.")
