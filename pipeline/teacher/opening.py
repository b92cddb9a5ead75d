"""What a run of stage one begins with: the text as rows, and the teacher, checked to be what the rows are for.

Shared by everything that puts a text to a teacher: capture, and the plan of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.head import Head, check_packing, check_padding, open_head
from pipeline.models.loading import load_config, load_model, load_tokenizer, model_name
from pipeline.models.objective import Objective, check_objective, most_positions
from pipeline.models.placement import check_split
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.cache_config import CacheTeacherConfig, MaskRule
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.text.masked_corpus import MaskedCorpus, build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, build_corpus

Corpus = TokenCorpus | MaskedCorpus


class Text(Protocol):
    """What a teacher is opened for and a cache is described by: a corpus, prompts, or the answers to them."""

    @property
    def objective(self) -> Objective: ...

    @property
    def description(self) -> dict[str, Any]: ...


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


def open_corpus(config: CacheTeacherConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The rows that the teacher of a run is to see: of what it predicts, masked or not.

    Raises: DataError, ModelError, ConfigError, each with the next step.
    """
    # What llama.cpp runs, and hence what a .gguf file holds, predicts the next token.
    known = load_config(config.teacher, **_source(config))
    found = known or PreTrainedConfig()
    if config.tensor_parallel:
        check_split(model_name(config.teacher), known)
    if check_objective(config.objective, found, model_name(config.teacher)) == "masked":
        return build_masked_corpus(config.data, tokenizer, config.masking or MaskRule())
    if config.masking is not None:
        raise ConfigError(
            f"`mask_probability` and the other masking options: {model_name(config.teacher)} is a causal language "
            "model, whose input is not masked. Leave these options out."
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
    config: CacheTeacherConfig, text: Text, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Head:
    """The teacher on `device`, and the way to run its head.

    Raises: ModelError, ConfigError: it cannot be loaded, would see what it must not, or takes shorter rows.
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
    if masked:
        check_padding(model, head)
    elif text.description["packing"]:
        check_packing(model, head)
    limit = most_positions(model.config)
    if limit is not None and config.data.seq_len > limit:
        raise ConfigError(
            f"`seq_len` {config.data.seq_len}: this teacher was trained on at most {limit} positions. "
            f"Use `seq_len` {limit} or less."
        )
    return head


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
