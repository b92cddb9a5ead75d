"""Options of stage one: `distill cache-teacher` and `distill plan`, `distill.cache_teacher` and `distill.plan`.

One dataclass for each subject, all of them parts of `CacheTeacherConfig`. Every default, range and help text of stage
one is here, but for those of targets, which are in `targets.rules`. Standard library only (see `pipeline.options`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

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
from pipeline.teacher.targets.rules import TargetRule

if TYPE_CHECKING:
    import cache_format as cf

MAX_SEED = 2**64 - 1

IO, TEXT, TEACHER = "Input and output", "Text", "Teacher"
MASKED, HIDDEN = "Masked language models", "Hidden states"
FILES, PROCESSES = "Cache files", "Several processes"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes rows of tokens."""

    # A path or hub name; several paths; or (Python only) a datasets.Dataset or an iterable of dicts.
    data: Any = option(
        help="Text: file, glob or directory (.txt .jsonl .parquet .csv .arrow), or a dataset on the hub.",
        group=IO,
        common=True,
    )
    data_config: str | None = option(None, help="Configuration (subset) of a hub dataset.", group=TEXT)
    split: str = option("train", help="Split of the dataset, or a slice such as train[:10%].", group=TEXT)
    text_column: str | None = option(
        None,
        help="Column of strings, chat messages or token ids.",
        group=TEXT,
        default_text="messages, prompt with completion, text, or input_ids",
        common=True,
    )
    sample_by: Literal["document", "paragraph", "line"] = option(
        "document", help="Unit of text in a .txt file that becomes one document.", group=TEXT
    )
    loss_on: Literal["auto", "all", "assistant", "completion", "labels"] = option(
        "auto",
        help="Tokens in the loss. auto: all tokens of plain text, assistant messages in a chat, the completion of a "
        "prompt, or what the labels or masks beside token ids say.",
        group=TEXT,
    )
    turns: Literal["all", "last"] = option(
        "all", help="Assistant messages of a chat that are in the loss: all of them, or the last one.", group=TEXT
    )
    # JSON on the command line; in Python and in a config file its contents.
    chat_template_kwargs: Any = option(
        None,
        help="Arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'. Columns of a "
        "row win over them.",
        group=TEXT,
        metavar="JSON",
        table=True,
    )
    template_date: str | None = option(
        None,
        help="Date for chat templates that print today's date.",
        group=TEXT,
        metavar="YYYY-MM-DD",
        default_text="that of a cache already begun, else today",
    )
    append_eos: bool | None = option(
        None, help="End every text with EOS.", group=TEXT, default_text="on for causal teachers"
    )
    max_documents: int | None = option(None, help="Use only the first N documents.", group=TEXT, minimum=1)
    packing: bool | None = option(
        None, help="Pack several short documents into a row.", group=TEXT, default_text="on for causal teachers"
    )
    seq_len: int = option(1024, help="Maximum number of tokens per row.", group=TEXT, minimum=2, common=True)
    teacher_seq_len: int | None = option(
        None,
        help="Maximum number of tokens that the teacher reads for a row, in data with a prompt for the teacher.",
        group=TEXT,
        minimum=2,
        default_text="4 times seq_len, at most the teacher's positions",
    )
    overlap: int = option(
        1,
        help="Tokens that each later window of a long document repeats as context, outside the loss.",
        group=TEXT,
        minimum=1,
    )
    num_proc: int | None = option(None, help="Number of processes that tokenize the text.", group=TEXT, minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.chat_template_kwargs is not None:
            object.__setattr__(self, "chat_template_kwargs", check_template_arguments(self.chat_template_kwargs))
        try:
            datetime.date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            raise ConfigError(f"`template_date` {self.template_date}: expected a date such as 2026-01-31.") from None

    def to_json(self) -> dict[str, Any]:
        """What decides the rows, besides the text itself, as in the manifest."""
        # Not asdict: it would copy `data`, which may be a generator.
        left_out = {"data", "num_proc", *_OF_CHATS} | (set() if self.overlap > 1 else {"overlap"})
        left_out |= {"teacher_seq_len"} if self.teacher_seq_len is None else set()
        names = [field.name for field in fields(self) if field.name not in left_out]
        return {_RECORDED_AS.get(name, name): getattr(self, name) for name in names} | self.chat_options()

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any], data: Any) -> DataConfig:
        """The options that a manifest records, for the text itself."""
        names = [field.name for field in fields(cls) if field.name not in ("data", "num_proc")]
        given = {name: recorded.get(_RECORDED_AS.get(name, name)) for name in names}
        return cls(data=data, **{name: value for name, value in given.items() if value is not None})

    def chat_options(self) -> dict[str, Any]:
        """The options of chats that are not at their default, as in the manifest."""
        return {name: value for name in _OF_CHATS if (value := getattr(self, name)) not in (None, "all", {})}


_RECORDED_AS = {"seq_len": "window_length", "teacher_seq_len": "teacher_window_length"}
_OF_CHATS = ("turns", "chat_template_kwargs", "template_date")
# What the messages of a row and the rendering itself set.
_NOT_ARGUMENTS = {"messages", "conversation", "conversations", "chat_template", "add_generation_prompt"} | {
    "continue_final_message",
    "return_assistant_tokens_mask",
}


def check_template_arguments(given: Any) -> dict[str, Any]:
    """The arguments of a chat template, which may be given as JSON. Raises: ConfigError."""
    expected = 'expected a JSON object such as {"enable_thinking": false}'
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConfigError(f"`chat_template_kwargs`: not JSON ({error}), {expected}.") from error
    if not isinstance(given, Mapping):
        raise ConfigError(f"`chat_template_kwargs`: found {type(given).__name__}, {expected}.")
    if from_data := sorted(_NOT_ARGUMENTS & set(given)):
        raise ConfigError(f"`chat_template_kwargs`: {from_data[0]!r} comes from the data. Leave it out.")
    return dict(given)


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How rows are masked for a masked language model. The defaults are BERT's."""

    PREFIX: ClassVar = "mask_"

    probability: float = option(
        0.15, help="Probability that a token is selected for prediction.", group=MASKED, above=0, maximum=1
    )
    mask_replace_prob: float = option(
        0.8,
        name="mask_replace_prob",
        help="Share of the selected tokens that become the mask token.",
        group=MASKED,
        minimum=0,
        maximum=1,
    )
    random_replace_prob: float = option(
        0.1,
        name="random_replace_prob",
        help="Share of the selected tokens that become a random token.",
        group=MASKED,
        minimum=0,
        maximum=1,
    )
    seed: int = option(
        0, help="Seed for masking (combined with row and position).", group=MASKED, minimum=0, maximum=MAX_SEED
    )
    copies: int = option(1, help="Rows per window of text, each masked differently.", group=MASKED, minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self, self.PREFIX)
        shares = (self.mask_replace_prob, self.random_replace_prob)
        if sum(shares) > 1.0 + 1e-9:
            raise ConfigError(
                f"`mask_replace_prob` {shares[0]} and `random_replace_prob` {shares[1]}: expected at most 1 together, "
                "since both are shares of the selected tokens."
            )


class Layered(Protocol):
    """A teacher, or its head."""

    def layers(self) -> tuple[int, int]:
        """The number of layers, and the width of their states."""
        ...


@dataclass(frozen=True, kw_only=True)
class HiddenRule:
    """Which hidden states are stored; `spec` resolves it for a given teacher."""

    PREFIX: ClassVar = "hidden_"

    layers: str | None = option(
        None,
        name="hidden_states",
        help="Store hidden states too: last, all, or layers such as 6,12,18.",
        group=HIDDEN,
        metavar="LAYERS",
    )  # None: only the states that hidden targets consist of
    dtype: Literal["float16", "float32", "int8"] = option(
        "float16", help="Data type of stored states; int8 has one scale per position.", group=HIDDEN
    )
    every: int = option(1, help="Store hidden states at every N-th position only.", group=HIDDEN, minimum=1)

    def __post_init__(self) -> None:
        named = self.layers not in (None, "last", "all")
        if named and not all(word.strip().isdecimal() for word in str(self.layers).split(",")):
            raise ConfigError(f"`hidden_states` {self.layers}: expected last, all, or layers such as 6,12,18.")
        check_ranges(self, self.PREFIX)

    def spec(self, teacher: Layered) -> cf.HiddenSpec:
        """Raises: ConfigError for layers that this teacher does not have; ModelError if it gives no states."""
        import cache_format as cf

        last, width = teacher.layers()
        if self.layers == "last":
            layers = [last]
        elif self.layers == "all":
            layers = list(range(1, last + 1))
        else:
            layers = sorted({int(word) for word in str(self.layers).split(",")})
        if layers[-1] > last:
            raise ConfigError(
                f"`hidden_states` {self.layers}: this teacher has layers 0 (the output of the embeddings) to {last}. "
                "Choose among them."
            )
        return cf.HiddenSpec(layers=tuple(layers), teacher_layers=last, width=width, dtype=self.dtype, every=self.every)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How this process shares the work with others."""

    num_workers: int | None = option(
        None,
        help="Number of processes that write this cache, each started separately.",
        group=PROCESSES,
        default_text="set by torchrun",
        minimum=1,
    )
    worker_index: int | None = option(None, help="Index of this process, from 0.", group=PROCESSES, minimum=0)
    shard_range: str | None = option(
        None, help="Write only shards A up to but not including B.", group=PROCESSES, metavar="A:B"
    )
    allow_rounding: bool = option(
        False,
        help="Continue even if the device type, thread count, batch size or library versions differ.",
        group=PROCESSES,
    )
    stale_after: float = option(
        300.0,
        help="Seconds of silence after which a writer on another machine is considered dead.",
        group=PROCESSES,
        above=0,
    )

    def __post_init__(self) -> None:
        check_ranges(self)


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
        help="auto: float32 on a CPU, or bfloat16 if the checkpoint is and it is measured to be faster there; the "
        "checkpoint's own dtype elsewhere.",
    )
    device_map: str | None = DEVICE_MAP(group=TEACHER)
    tensor_parallel: bool = TENSOR_PARALLEL(group=TEACHER)
    revision: str | None = REVISION(group=TEACHER)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=TEACHER)
    # A directory or hub name, or (Python only) a tokenizer.
    tokenizer: Any = option(
        None,
        help="Tokenizer of the teacher: directory or hub name. A teacher on a server needs it.",
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
