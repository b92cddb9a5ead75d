"""What a run of stage one begins with: the text as rows, and the teacher, checked to be what the rows are for.

Shared by everything that puts a text to a teacher: capture, and the plan of one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError, DataError
from pipeline.models.head import Head, check_packing, check_padding, open_head
from pipeline.models.head_export import export_head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.loading import has_own_code, load_config, load_model, load_tokenizer, model_name
from pipeline.models.objective import Objective, check_objective, most_positions
from pipeline.models.paths import adapter_base
from pipeline.models.placement import check_split
from pipeline.models.tokenizers import real_vocab_size
from pipeline.overlap import check_inputs_apart
from pipeline.teacher.cache_config import CacheTeacherConfig, MaskRule
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.server.server_engine import ServerEngine
from pipeline.teacher.engines.server.server_opening import check_client, open_server
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.engines.vllm_engine import VllmEngine
from pipeline.teacher.engines.vllm_opening import check_installed, check_rotary, open_vllm
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.hidden_targets import states_spec
from pipeline.teacher.text.data_paths import data_name, local_paths
from pipeline.teacher.text.masked.masked_corpus import MaskedCorpus, build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, build_corpus

Corpus = TokenCorpus | MaskedCorpus


class Text(Protocol):
    """What a teacher is opened for and a cache is described by: a corpus, prompts, or the answers to them."""

    @property
    def objective(self) -> Objective: ...

    @property
    def description(self) -> dict[str, Any]: ...


class TokenisedText(Text, Protocol):
    """What a teacher is to read: a corpus, or prompts."""

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the source, id) of the first token with an id of `limit` or more."""
        ...


class CachedText(Text, Protocol):
    """The text of a cache: a corpus, or the answers that were kept."""

    def __len__(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_loss_tokens(self) -> int: ...

    @property
    def token_stream_sha256(self) -> str: ...

    @property
    def report(self) -> Mapping[str, float]: ...


def check_inputs(config: CacheTeacherConfig, *folders: str) -> None:
    """Checks where the inputs of a run lie, and that its engine is installed.

    Raises: ConfigError.
    """
    if config.running.engine == "vllm":
        check_installed(allow_untested=config.running.allow_untested)
    if config.on_server:
        check_client()
    inputs = {
        "teacher": config.teacher,
        "tokenizer": config.tokenizer,
        "data": local_paths(config.data.data),
        "device_map": config.device_map,
        "gen_keep_if": None if config.generation is None else (config.generation.keep_if or "").rpartition(":")[0],
    }
    for folder in folders:
        check_inputs_apart(folder, inputs)


def open_corpus(config: CacheTeacherConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The rows that the teacher of a run is to see: of what it predicts, masked or not.

    Raises: DataError, ModelError, ConfigError, each with the next step.
    """
    if config.on_server:
        return build_corpus(config.data, tokenizer)
    # What llama.cpp runs, and hence what a .gguf file holds, predicts the next token.
    known = load_config(config.teacher, **_source(config))
    found = known or PreTrainedConfig()
    if config.tensor_parallel:
        check_split(model_name(config.teacher), known)
    if check_objective(config.objective, found, model_name(config.teacher)) == "masked":
        return build_masked_corpus(config.data, tokenizer, config.masking or MaskRule())
    if config.masking is not None:
        raise ConfigError(
            f"{config.given('masking')}: {model_name(config.teacher)} is a causal language model, whose input is not "
            "masked. Leave it out."
        )
    return build_corpus(config.data, tokenizer)


def as_dated(config: CacheTeacherConfig, description: Mapping[str, Any] | None) -> CacheTeacherConfig:
    """The configuration with the date that a text was made with, for a chat template that prints today's: other workers
    and a continuation on another day must see the same text.

    Args:
        description: of a text, as in the manifest; None: there is none yet.
    """
    if config.data.template_date is not None or description is None:
        return config
    return replace(config, data=replace(config.data, template_date=description.get("template_date")))


def open_tokenizer(config: CacheTeacherConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer: the given one, or the one that comes with the teacher."""
    return load_tokenizer(config.tokenizer or config.teacher, **_source(config))


def open_teacher(
    config: CacheTeacherConfig, text: TokenisedText, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Head:
    """The teacher on `device`, and the way to run its head.

    Raises:
        ModelError, ConfigError: it cannot be loaded, would see what it must not, or takes shorter rows.
        DataError: the text has a token that it does not know.
    """
    masked = text.objective == "masked"
    model = load_model(
        config.teacher,
        objective=text.objective,
        dtype=config.dtype,
        device=device,
        device_map=config.device_map,
        tensor_parallel=config.tensor_parallel,
        **_source(config),
    )
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]), masked=masked)
    _check_tokens(config, text, tokenizer, min(head.vocab_size, model.get_input_embeddings().weight.shape[0]))
    if masked:
        check_padding(model, head)
    else:
        check_causal(head)
        if text.description["packing"]:
            check_packing(model, head, config.data.seq_len)
        elif config.batch_size > 1 and has_own_code(model):
            check_padding(model, head, config.data.seq_len)
    _check_length(config, model.config)
    return head


def _check_length(config: CacheTeacherConfig, teacher: PreTrainedConfig) -> None:
    limit = most_positions(teacher)
    if limit is not None and config.data.seq_len > limit:
        raise ConfigError(
            f"`seq_len` {config.data.seq_len}: this teacher was trained on at most {limit} positions. "
            f"Use `seq_len` {limit} or less."
        )


def _open_vllm(
    config: CacheTeacherConfig, text: TokenisedText, tokenizer: PreTrainedTokenizerBase, *, timed: bool
) -> VllmEngine:
    known = load_config(config.teacher, **_source(config))
    if not isinstance(config.teacher, str | os.PathLike) or known is None or adapter_base(str(config.teacher)):
        raise ConfigError(
            f"`engine` vllm: {model_name(config.teacher)} is a .gguf file, an adapter or a loaded model, expected a "
            "directory or hub name. Use `engine=transformers`."
        )
    if text.objective == "masked":
        raise ConfigError(f"`engine` vllm: {model_name(config.teacher)} is a masked language model. Use transformers.")
    rows = known.get_text_config().vocab_size
    vocab_size = real_vocab_size(tokenizer, rows)
    _check_tokens(config, text, tokenizer, vocab_size)
    _check_length(config, known)
    arguments = config.running.arguments()
    check_rotary(known, model_name(config.teacher), arguments.get("max_model_len", config.data.seq_len + 1))
    engine = open_vllm(
        str(config.teacher),
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        dtype=config.dtype,
        engine_args=arguments,
        store_head=config.targets.kind == "hidden",
        allow_untested=config.running.allow_untested,
        timed=timed,
        generates=config.generation is not None,
        **_source(config),
    )
    engine.hidden = states_spec(config.hidden, engine, engine.stored_head)
    return engine


def open_engine(
    config: CacheTeacherConfig,
    text: TokenisedText,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    timed: bool = False,
) -> TransformersEngine | VllmEngine | ServerEngine:
    """The engine that a run asks for targets or answers.

    Args:
        timed: measure what the rows cost.

    Raises: as `open_teacher`, `open_vllm` and `open_server`.
    """
    if config.on_server:
        if timed:
            raise ConfigError(f"`teacher` {config.teacher}: a plan needs a teacher in this process, found a server.")
        return open_server(
            config.teacher,
            config.server,
            tokenizer,
            rule=config.targets,
            seq_len=config.data.seq_len,
            all_positions=config.all_positions,
            generates=config.generation is not None,
        )
    if config.running.engine == "vllm":
        return _open_vllm(config, text, tokenizer, timed=timed)
    head = open_teacher(config, text, tokenizer, device)
    export = export_head(head) if config.targets.kind == "hidden" else None
    return TransformersEngine(
        head,
        device=device,
        batch_size=config.batch_size,
        export=export,
        hidden=states_spec(config.hidden, head, export),
        divisible=not config.tensor_parallel,
        timed=timed,
    )


def _check_tokens(
    config: CacheTeacherConfig, text: TokenisedText, tokenizer: PreTrainedTokenizerBase, known: int
) -> None:
    """Raise DataError if the text has a token that the teacher has no embedding or no output row for.

    The tokens are read only if the tokenizer has such tokens at all.

    Args:
        known: ids below it are known to the teacher.
    """
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    if vocabulary <= known or (found := text.first_token_beyond(known)) is None:
        return
    row, token = found
    raise DataError(
        f"{data_name(config.data.data)}, row {row}: found token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, "
        f"expected ids below {known:,}: {model_name(config.teacher)} has no embedding for it, although its tokenizer "
        f"has {vocabulary:,} tokens. Remove it from the text, or use the tokenizer that belongs to the model."
    )


def row_request(config: CacheTeacherConfig, corpus: Corpus, index: int, hidden: cf.HiddenSpec | None) -> RowRequest:
    """What an engine is asked about a row of the corpus.

    Args:
        hidden: the states to store, if any.
    """
    row = corpus[index]
    stored = np.ones_like(row.loss_mask) if config.all_positions else np.asarray(row.loss_mask, bool)
    states = None if hidden is None else hidden_states.chosen(stored, index, hidden.every)
    return RowRequest(index=index, row=row, place=index, stored=stored, with_states=states)


def _source(config: CacheTeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
