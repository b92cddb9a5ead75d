"""Checks that a student, a cache and a held-out cache match, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head import Head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.isolation.shared_rows import check_packing, check_padding
from pipeline.models.loading import has_own_code, load_config, load_tokenizer, model_name
from pipeline.models.objective import NAMES, most_positions, objective_for, objective_of
from pipeline.models.tokenizers import check_same_tokenizer, load_cache_tokenizer
from pipeline.student.model.initialization import configuration
from pipeline.student.model.student_limits import token_rows


def check_student(
    caches: Sequence[cf.Cache],
    student: str | PreTrainedModel | None,
    *,
    config_file: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cross_tokenizer: bool = False,
    otherwise: str = "Or train across tokenizers with `cross_tokenizer=project` or `cross_tokenizer=uld`.",
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer to save with the student, and warnings.

    A student without a tokenizer (bare weights, a configuration, a loaded model) gets the cache's tokenizer; then only
    the number of its output rows can be checked. The configuration of a .gguf file is not checked.

    Args:
        caches: the training or evaluation cache, then others with the same tokens.
        student, config_file: as in `load_student`.
        tokenizer: the student's tokenizer, if it is not loaded with the student's name.
        cross_tokenizer: the student keeps its own tokens; rows that are too long for it will be divided.
        otherwise: alternative for a student with another tokenizer, for the error.

    Raises:
        MismatchError: the student has other tokens than the cache, or another objective.
        ConfigError: the caches have longer rows than the student takes.
        ModelError: the student's configuration or tokenizer cannot be loaded.
    """
    cache = caches[0]
    vocab_size = cache.metadata.vocab_size
    teacher = load_cache_tokenizer(cache)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    name = config_file or ("" if student is None else model_name(student))
    config = None
    if config_file is not None:
        config = configuration(config_file, vocab_size)
    elif student is not None:
        config = load_config(student, **options)
    own = _own_tokenizer(student, tokenizer, options)
    if cross_tokenizer:
        if config is not None:
            _check_objective(cache, config, name)
        return _foreign_tokenizer(teacher, own, name)
    try:
        warnings = [] if own is None else check_same_tokenizer(teacher, own, vocab_size=vocab_size)
    except cf.MismatchError as error:
        raise cf.MismatchError(f"{name}: {error} {otherwise}") from error
    if isinstance(student, PreTrainedModel) and own is None:
        warnings.append(
            f"{name}: loaded model without `tokenizer`, so its tokens cannot be compared with those of {cache.path}. "
            "It is used, and saved, with the tokenizer of the cache"
        )
    rows = None if config is None else token_rows(config)
    if rows is not None and rows < vocab_size:
        raise cf.MismatchError(
            f"{name}: predicts {rows:,} tokens, but {cache.path} has targets over {vocab_size:,} tokens. "
            "Choose a student from the teacher's model family, or a configuration whose vocab_size is at least that."
        )
    if config is not None:
        _check_objective(cache, config, name)
        for each in caches:
            _check_length(each, config, name)
    return own or teacher, warnings


def _own_tokenizer(
    student: str | PreTrainedModel | None, tokenizer: str | PreTrainedTokenizerBase | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The student's own tokenizer: the given one, else the one that its name leads to; None if it has none."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer, **options)
    if student is None or isinstance(student, PreTrainedModel) or not _has_tokenizer(student):
        return None
    return load_tokenizer(student, **options)


def _foreign_tokenizer(
    teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None, name: str
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    if own is None:
        raise ConfigError(
            f"`cross_tokenizer`: {name} has no tokenizer of its own. Choose a `student` that has one, or set "
            "`tokenizer`."
        )
    try:
        check_same_tokenizer(teacher, own)
    except cf.MismatchError:
        return own, []
    return own, [
        "`cross_tokenizer` is not needed: the student has the teacher's tokenizer. Without it, everything is faster"
    ]


def check_same_teacher_tokens(train: cf.Cache, held_out: cf.Cache) -> list[str]:
    """Raises MismatchError if two caches have different tokens; returns a warning if the teachers differ."""
    ours, theirs = train.metadata, held_out.metadata
    for what, a, b in (
        ("vocabulary size", ours.vocab_size, theirs.vocab_size),
        ("vocabulary", ours.tokenizer.get("vocabulary"), theirs.tokenizer.get("vocabulary")),
        ("alignment", ours.alignment, theirs.alignment),
    ):
        if a != b:
            raise cf.MismatchError(
                f"{held_out.path}: found {what} {b}, expected {a} as in {train.path}, because evaluation must "
                "use the same vocabulary and alignment as training. Cache the held-out text with the same teacher."
            )
    if ours.teacher.get("weights_fingerprint") != theirs.teacher.get("weights_fingerprint"):
        return [f"{held_out.path} has targets of a different teacher than {train.path}"]
    return []


def _check_objective(cache: cf.Cache, student: PreTrainedConfig, name: str) -> None:
    """Raises MismatchError if the student is causal and the targets are masked, or the other way round."""
    expected, found = objective_for(cache.metadata.alignment), objective_of(student)
    if found != expected:
        predicted = {"causal": "the next token", "masked": "masked tokens"}
        raise cf.MismatchError(
            f"{name}: found a {NAMES[found]}, expected a {NAMES[expected]}, because {cache.path} has targets for "
            f"{predicted[expected]}. Choose another student, or cache the text with a {NAMES[found]}."
        )


def _check_length(cache: cf.Cache, student: PreTrainedConfig, name: str) -> None:
    """Raises ConfigError if the cache has longer rows than the student takes."""
    limit = most_positions(student)
    window = cache.metadata.corpus.get("window_length")
    if limit is not None and window is not None and window > limit:
        raise ConfigError(
            f"{name}: takes at most {limit:,} positions, but the rows of {cache.path} have up to {window:,}. "
            f"Choose another student, or cache the text with `seq_len` {limit}."
        )


def check_isolation(cache: cf.Cache, head: Head, *, batch_size: int) -> None:
    """Raises ModelError if the student sees later tokens, other rows of a batch, or other documents of a packed row."""
    longest = cache.metadata.corpus.get("window_length") or 0
    if head.masked:
        check_padding(head.model, head)
        return
    check_causal(head)
    if cache.metadata.corpus.get("packing") is not False:  # rows may hold several documents
        try:
            check_packing(head.model, head, longest)
        except ModelError as error:
            raise ModelError(f"{cache.path} has packed rows, which the student cannot be run on: {error}") from error
    elif batch_size > 1 and has_own_code(head.model):
        check_padding(head.model, head, longest)


def _has_tokenizer(student: str) -> bool:
    path = Path(student)
    if not path.is_dir():
        return True  # hub names and GGUF files have one
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
