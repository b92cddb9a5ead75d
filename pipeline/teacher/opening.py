"""Opens what a run of stage one needs: the text as rows, and a teacher that was checked to fit them.

Used by capture, plan and generation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError, DataError
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.devices.cpu_dtype import measure_dtypes, multiplies_bfloat16
from pipeline.models.devices.placement import check_split
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import export_head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.isolation.padding_free import without_padding
from pipeline.models.isolation.shared_rows import check_packing, check_padding
from pipeline.models.loading import DTYPES, has_own_code, load_config, load_model, load_tokenizer, model_name
from pipeline.models.loading_options import Dtype
from pipeline.models.objective import check_objective, most_positions
from pipeline.models.paths import adapter_base
from pipeline.models.tokenizers import real_vocab_size
from pipeline.overlap import check_inputs_apart
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.engine_config import rows_per_pass, tokens_per_pass
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.server.server_engine import ServerEngine
from pipeline.teacher.engines.server.server_opening import check_client, open_server
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.engines.vllm.vllm_engine import VllmEngine, closed_on_error
from pipeline.teacher.engines.vllm.vllm_opening import check_installed, check_rotary, open_vllm
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.hidden_targets import states_spec
from pipeline.teacher.text.corpus_protocols import TokenisedText
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import MaskedCorpus, build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, TokenRow, build_corpus
from pipeline.teacher.text.reading.data_paths import data_name, local_paths

Corpus = TokenCorpus | MaskedCorpus

DTYPE_TOKENS = 1024
"""Tokens of the batch that dtypes are compared with."""


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
    }
    if (generation := config.generation) is not None:
        inputs |= {"writer": generation.writer, "writer_device_map": generation.writer_device_map}
        inputs["gen_keep_if"] = (generation.keep_if or "").rpartition(":")[0]
    for folder in folders:
        check_inputs_apart(folder, inputs)


def open_corpus(config: CacheTeacherConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The rows of a run, masked if the teacher is a masked language model.

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
    corpus = build_corpus(config.data, tokenizer, positions=most_positions(found))
    if config.all_positions and corpus.has_teacher_prompts:
        raise ConfigError(
            "`all_positions`: the teacher reads a prompt of its own, so positions of the student's "
            "prompt have no targets. Leave it out."
        )
    return corpus


def as_dated(config: CacheTeacherConfig, description: Mapping[str, Any] | None) -> CacheTeacherConfig:
    """The configuration with the date that a text was made with, for a chat template that prints today's: other workers
    and a continuation on another day must see the same text.

    Args:
        description: of a text, as in the manifest; None: there is none yet.
    """
    if config.data.template_date is not None or description is None:
        return config
    return replace(config, data=replace(config.data, template_date=description.get("template_date")))


def with_dtype(
    config: CacheTeacherConfig,
    text: TokenisedText,
    device: torch.device,
    *,
    recorded: Dtype | None,
    alone: bool,
    on_stage: Callable[[str], None],
) -> CacheTeacherConfig:
    """The configuration with dtype "auto" resolved on a CPU that multiplies bfloat16 in hardware: for a bfloat16
    checkpoint, the faster one of bfloat16 and float32, unless an earlier run has chosen. Elsewhere nothing is measured
    or changed.

    Args:
        recorded: the dtype of a cache that was begun.
        alone: whether no other process writes the cache; several could choose differently.
    """
    kept = isinstance(config.teacher, PreTrainedModel) or config.on_server or config.running.engine == "vllm"
    if config.dtype != "auto" or device.type != "cpu" or kept or config.device_map is not None:
        return config
    if recorded in DTYPES:
        return replace(config, dtype=recorded)
    if not alone or config.tensor_parallel or not multiplies_bfloat16() or not _saved_in_bfloat16(config):
        return config
    on_stage("comparing bfloat16 and float32 on this CPU")
    load = partial(load_model, config.teacher, objective=text.objective, device=device, **_source(config))
    width = min(text.longest_read, DTYPE_TOKENS)
    speeds = measure_dtypes(lambda dtype: load(dtype=dtype), max(1, DTYPE_TOKENS // width), width)
    on_stage(f"`dtype` {speeds.faster}: {speeds.describe()}")
    return replace(config, dtype=speeds.faster)


def _saved_in_bfloat16(config: CacheTeacherConfig) -> bool:
    found = load_config(config.teacher, **_source(config))
    return found is not None and torch.bfloat16 in (found.dtype, found.get_text_config(decoder=True).dtype)


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
    _check_length(config, text, model.config)
    head = without_padding(head, text.longest_read, wanted=config.padding_free, device=head.device)
    if not masked and text.description["packing"]:
        check_packing(model, head, text.longest_read)
    elif not masked and rows_per_pass(config) > 1 and has_own_code(model):
        check_padding(model, head, text.longest_read)
    return head


def _check_length(config: CacheTeacherConfig, text: TokenisedText, teacher: PreTrainedConfig) -> None:
    limit = most_positions(teacher)
    if limit is not None and text.longest_read > limit:
        name = "teacher_seq_len" if text.has_teacher_prompts else "seq_len"
        raise ConfigError(
            f"`{name}` {text.longest_read}: {model_name(config.teacher)} was trained on at most {limit} positions. "
            f"Use `{name}` {limit} or less."
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
    text_config = known.get_text_config()
    vocab_size = real_vocab_size(tokenizer, text_config.vocab_size)
    _check_tokens(config, text, tokenizer, vocab_size)
    _check_length(config, text, known)
    arguments = config.running.arguments()
    check_rotary(known, model_name(config.teacher), arguments.get("max_model_len", text.longest_read + 1))
    engine = open_vllm(
        str(config.teacher),
        vocab_size=vocab_size,
        seq_len=text.longest_read,
        dtype=config.dtype,
        engine_args=arguments,
        store_head=config.targets.kind == "hidden",
        allow_untested=config.running.allow_untested,
        timed=timed,
        generates=config.generation is not None,
        inner_layers=config.hidden is not None and config.hidden.has_inner_layers(text_config.num_hidden_layers),
        **_source(config),
    )
    with closed_on_error(engine):
        engine.hidden = states_spec(config.hidden, engine, engine.stored_head)
        engine.check_states()
    return engine


def opening_stage(config: CacheTeacherConfig, device: torch.device, *, role: str = "teacher") -> str:
    """What `on_stage` says before `open_engine`. Args: role: of the model, teacher or writer."""
    return f"asking {config.teacher}" if config.on_server else f"loading the {role} on {device}"


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
        return open_server(
            config.teacher,
            config.server,
            tokenizer,
            rule=config.targets,
            seq_len=text.longest_read,
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
        batch_size=rows_per_pass(config),
        batch_tokens=tokens_per_pass(config, device.type),
        export=export,
        hidden=states_spec(config.hidden, head, export),
        compiled=CompiledLayers(head) if config.compile else None,
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
    given = text.description["format"] == "token-ids"
    if (vocabulary <= known and not given) or (found := text.first_token_beyond(known)) is None:
        return
    row, token = found
    if token >= vocabulary:
        raise DataError(
            f"{data_name(config.data.data)}, row {row}: found token id {token}, expected ids below {known:,}, the "
            f"vocabulary of {model_name(config.teacher)}. Use the teacher whose tokenizer made these ids."
        )
    raise DataError(
        f"{data_name(config.data.data)}, row {row}: found token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, "
        f"expected ids below {known:,}: {model_name(config.teacher)} has no embedding for it, although its tokenizer "
        f"has {vocabulary:,} tokens. Remove it from the text, or use the tokenizer that belongs to the model."
    )


def row_request(
    config: CacheTeacherConfig,
    row: TokenRow | cf.CacheRow,
    index: int,
    hidden: cf.HiddenSpec | None,
    *,
    place: int | None = None,
) -> RowRequest:
    """What an engine is asked about a row.

    Args:
        index: its number in the cache.
        hidden: the states to store, if any.
        place: key of the row's random numbers; default: its number.
    """
    stored = np.ones_like(row.loss_mask) if config.all_positions else np.asarray(row.loss_mask, bool)
    states = None if hidden is None else hidden_states.chosen(stored, index, hidden.every)
    return RowRequest(
        index=index,
        row=row,
        place=index if place is None else place,
        stored=stored,
        with_states=states,
        teacher=row.teacher if isinstance(row, TokenRow) else None,
    )


def _source(config: CacheTeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
