"""Whether a student, a cache and a held-out cache belong together: asked before any weights are loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.head import Head, check_packing, check_padding
from pipeline.models.loading import load_config, load_tokenizer, reason
from pipeline.models.objective import NAMES, most_positions, objective_for, objective_of
from pipeline.models.tokenizers import check_same_tokenizer
from pipeline.student.model.initialization import configuration


def load_cache_tokenizer(cache: cf.Cache) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, from the files in the cache (checked against the manifest).

    Code among them is never run: --trust-remote-code speaks of models that are named, not of what came with a cache.

    Raises: FormatError if it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in cache.tokenizer_files().items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.get_vocab()  # some are objects without one
            return tokenizer
        except Exception as error:  # whatever parsers of other people raise for the files of a stranger
            why = reason(error).replace(folder, "tokenizer/")
            if "trust_remote_code" in str(error):
                why = "it needs code of its own, which is not run from a cache"
            raise cf.FormatError(
                f"{cache.path}: its tokenizer cannot be loaded: {why}. Restore it from a copy, or make the cache again "
                "with a tokenizer that transformers knows."
            ) from error


def check_student(
    caches: Sequence[cf.Cache],
    student: str | None,
    *,
    config_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cross_tokenizer: bool = False,
    otherwise: str = "Or train across tokenizers: --cross-tokenizer project, or uld.",
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer to save with the student, and warnings.

    A student without a tokenizer of its own (a bare model, a configuration) gets the cache's; then only the number of
    its output rows can be checked. What a .gguf file holds is only known once it is loaded.

    Args:
        caches: the one that the student is trained or evaluated on, and others of the same tokens.
        student, config_file: as in `load_student`.
        cross_tokenizer: the student's tokens are to be its own; who converts them divides what is too long for it.
        otherwise: what else to do about other tokens, in the words of the command.

    Raises:
        MismatchError: the student's tokens are not the cache's, with what differs.
        ConfigError, ModelError: it cannot be read, or takes shorter rows than the caches have.
    """
    cache = caches[0]
    vocab_size = cache.metadata.vocab_size
    teacher = load_cache_tokenizer(cache)
    config, own = None, None
    if config_file is not None:
        config = configuration(config_file, vocab_size)
    elif student is not None:
        config = load_config(student, revision=revision, trust_remote_code=trust_remote_code)
        if _has_tokenizer(student):
            own = load_tokenizer(student, revision=revision, trust_remote_code=trust_remote_code)
    if cross_tokenizer:
        if config is not None:
            _check_objective(cache, config, student)
        return _foreign_tokenizer(teacher, own, student or config_file or "")
    rows = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    try:
        warnings = [] if own is None else check_same_tokenizer(teacher, own, vocab_size=vocab_size)
    except cf.MismatchError as error:
        raise cf.MismatchError(f"{student}: {error} {otherwise}") from error
    if rows is not None and rows < vocab_size:
        raise cf.MismatchError(
            f"{config_file or student}: predicts {rows:,} tokens, the cache {cache.path} has targets "
            f"over {vocab_size:,}: its vocabulary is not the teacher's. Choose a student of the teacher's family, or "
            "a configuration with at least that vocab_size."
        )
    if config is not None:
        _check_objective(cache, config, config_file or student)
        for each in caches:
            _check_length(each, config, config_file or student)
    return own or teacher, warnings


def _foreign_tokenizer(
    teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None, name: str
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    if own is None:
        raise ConfigError(
            f"--cross-tokenizer: {name} has no tokenizer of its own to train it with. Give a --student that has one."
        )
    try:
        check_same_tokenizer(teacher, own)
    except cf.MismatchError:
        return own, []
    return own, [
        "--cross-tokenizer is not needed: the student's tokenizer is the teacher's. Training is faster without."
    ]


def check_same_teacher_tokens(train: cf.Cache, held_out: cf.Cache) -> list[str]:
    """Raises MismatchError if two caches speak of different tokens; warns if the teachers differ."""
    ours, theirs = train.metadata, held_out.metadata
    for what, a, b in (
        ("vocabulary size", ours.vocab_size, theirs.vocab_size),
        ("vocabulary", ours.tokenizer.get("vocabulary"), theirs.tokenizer.get("vocabulary")),
        ("alignment", ours.alignment, theirs.alignment),
    ):
        if a != b:
            raise cf.MismatchError(
                f"{held_out.path}: {what} {b}, expected {a} as in {train.path}: a student is evaluated on its own "
                "teacher's tokens. Cache the held-out text with the same teacher."
            )
    if ours.teacher.get("weights_fingerprint") != theirs.teacher.get("weights_fingerprint"):
        return [f"{held_out.path} was made with another teacher than {train.path}"]
    return []


def _check_objective(cache: cf.Cache, student: PreTrainedConfig, name: str | None) -> None:
    """Raises MismatchError if a student does not predict what the targets are about."""
    expected, found = objective_for(cache.metadata.alignment), objective_of(student)
    if found != expected:
        about = {"causal": "the next token", "masked": "masked tokens"}
        raise cf.MismatchError(
            f"{name}: is a {NAMES[found]}, expected a {NAMES[expected]}: the targets of {cache.path} are about "
            f"{about[expected]}. Choose another student, or cache the text with a {NAMES[found]}."
        )


def longest_row(student: str, trust_remote_code: bool = False) -> int | None:
    """Positions that a student takes, if its configuration says so; a .gguf file is not asked."""
    config = load_config(student, trust_remote_code=trust_remote_code)
    return None if config is None else most_positions(config)


def _check_length(cache: cf.Cache, student: PreTrainedConfig, name: str | None) -> None:
    """Raises ConfigError if the rows of a cache are longer than a student's configuration admits."""
    limit = most_positions(student)
    window = cache.metadata.corpus.get("window_length")
    if limit is not None and window is not None and window > limit:
        raise ConfigError(
            f"{name}: takes at most {limit:,} positions, the rows of {cache.path} have up to {window:,}. "
            f"Choose another student, or cache the text with --seq-len {limit}."
        )


def check_isolation(cache: cf.Cache, head: Head) -> None:
    """Raises ModelError if the student would see what is not part of a document: its neighbours, or the padding."""
    if head.masked:
        check_padding(head.model, head)
    elif cache.metadata.corpus.get("packing") is not False:  # rows may hold several documents
        check_packing(head.model, head)


def _has_tokenizer(student: str) -> bool:
    path = Path(student)
    if not path.is_dir():
        return True  # hub names and GGUF files come with one
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
