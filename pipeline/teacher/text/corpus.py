"""Text to tokenised documents, the first step of stage one.

    rows of any source ─▶ text, and spans of it that are in the loss ─▶ token ids, and which of them are loss tokens

The result is a memory-mapped Arrow file in the cache of `datasets` (HF_DATASETS_CACHE), about 4 bytes per token. A
second run on the same text with the same tokenizer and options finds it there; of several processes that need it, one
does the work. Cost: the tokenizer's time, and memory for one batch of documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from cache_format.storage.claims import Claims, wait_for
from cache_format.storage.directory import open_directory
from cache_format.wording import quantity
from pipeline.errors import ConfigError, ModelError
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.text import encoding
from pipeline.teacher.text.chat import arguments, messages, template, turns
from pipeline.teacher.text.chat.template import ChatTemplate
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.encoding import Affixes
from pipeline.teacher.text.formats import examples, kept_columns, row_format, teacher_prompts, token_ids
from pipeline.teacher.text.formats.examples import Example, read_examples
from pipeline.teacher.text.formats.kept_columns import KeptValues, check_kept
from pipeline.teacher.text.formats.row_format import IDS, Columns, check_chat_options, find_columns
from pipeline.teacher.text.reading import records
from pipeline.teacher.text.reading.data_paths import data_name
from pipeline.teacher.text.reading.records import RecordReader, reading
from pipeline.teacher.text.reading.sources import Source, load_source, quiet_datasets

_FEATURES = datasets.Features(
    input_ids=datasets.Sequence(datasets.Value("int32")),
    is_target=datasets.Sequence(datasets.Value("bool")),
)
_ROW = "row"  # of the source, that a document is from
# Columns of bools, whose sums are reported.
WITH_SPECIAL_TOKENS, SPLIT, ONLY_EOS = _FINDINGS = (
    "documents_with_special_tokens",
    "documents_with_split_tokens",
    "documents_with_only_eos",
)
_UNUSED_IDS = f"the text is used, not the column {IDS!r}. To use the ids, set `text_column={IDS}`."
# Documents in memory at once; one may be a whole book.
_DOCUMENTS_PER_BATCH = 64
_DOCUMENTS_PER_RECORD_BATCH = 256


@dataclass(frozen=True)
class Documents:
    """The tokenised text, in the order of the source."""

    # input_ids list<int32>, is_target list<bool> (in the loss), both empty for empty text; _ROW int64
    tokens: datasets.Dataset
    columns: Columns  # with a prompt for the teacher: `tokens` has the columns of `teacher_prompts.FEATURES` too
    loss_on: str  # all, assistant, completion or labels
    source: Source
    prefix: tuple[int, ...] = ()  # special tokens that the tokenizer puts before a text
    findings: Mapping[str, int] = field(default_factory=dict)  # name -> number of documents, where there are any
    options: dict[str, Any] = field(default_factory=dict)  # of chats, for the manifest
    warnings: tuple[str, ...] = ()
    kept: KeptValues | None = None  # columns of the data that the cache keeps

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the source, id) of the first token with an id of `limit` or more, of student or teacher; reads up to
        there."""
        names = ("input_ids",) if self.columns.teacher is None else ("input_ids", "teacher_prompt")
        for batch in self.tokens.data.to_batches():
            for name in names:
                column = batch.column(name)
                ids = column.flatten()
                if len(ids) and pc.max(ids).as_py() >= limit:
                    place = int((ids.to_numpy() >= limit).argmax())
                    ends = column.offsets.to_numpy()[1:] - column.offsets[0].as_py()
                    document = int(np.searchsorted(ends, place, side="right"))
                    return batch.column(_ROW)[document].as_py(), ids[place].as_py()
        return None

    def row_of(self, document: int) -> int:
        """The row of the source that a document is from; a chat may be several documents."""
        return int(self.tokens[document][_ROW])


def tokenise_documents(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = True
) -> Documents:
    """Load the text, render conversations, tokenise.

    Args:
        special_tokens: put the tokenizer's special tokens around each text, and EOS unless `config.append_eos` is
            False; otherwise texts have none at their ends.

    Raises:
        DataError: the text cannot be read.
        ModelError: the tokenizer lacks what the text needs.
        ConfigError: the options do not go with the text or the tokenizer.
    """
    source = load_source(config)
    rows = source.rows
    name = data_name(config.data)
    columns = find_columns(source, config.text_column, name)
    loss_on = columns.loss_choices[0] if config.loss_on == "auto" else config.loss_on
    if loss_on not in columns.loss_choices:
        reason = "" if columns.teacher is None else ": the student does not see what the teacher reads before it"
        raise ConfigError(
            f"{name}: `loss_on` {loss_on} cannot be used with {columns.format} data "
            f"(column {', '.join(columns.all_names)}), expected {' or '.join(columns.loss_choices)}{reason}."
        )
    if columns.is_ids:
        _check_id_options(config, name, special_tokens=special_tokens)
    elif columns.teacher is not None and not special_tokens:
        raise ConfigError(f"{name}: {columns.teacher!r} is for causal teachers. Remove this column.")
    check_chat_options(config, columns, name)
    check_kept(config.keep_columns, source, name)
    if config.turns == "last" and loss_on == "all":
        raise ConfigError("`turns=last`: the loss is on all tokens with `loss_on=all`. Leave one of them out.")
    append_eos = config.append_eos is not False and special_tokens and not (columns.is_chat or columns.is_ids)
    if not columns.is_ids:
        _check_tokenizer(tokenizer, loss_on, append_eos)
    chat_template = arguments.open_template(config, tokenizer) if columns.is_chat else None
    affixes = _affixes(tokenizer, columns, append_eos=append_eos, special_tokens=special_tokens)
    tokens = _map_cached(
        rows,
        partial(
            _tokenise_batch,
            data=name,
            reader=source.reader,
            columns=columns,
            loss_on=loss_on,
            keep_columns=config.keep_columns,
            turns=config.turns,
            template=chat_template,
            affixes=affixes,
            tokenizer=tokenizer if loss_on in ("all", "labels") else encoding.with_exact_offsets(tokenizer),
        ),
        _fingerprint(rows, columns, loss_on, append_eos, special_tokens, tokenizer, config, chat_template),
        config.num_proc,
    )
    counts = {name: pc.sum(tokens.data.column(name)).as_py() or 0 for name in _FINDINGS}
    findings = {name: count for name, count in counts.items() if count}
    kept = KeptValues.read(tokens, config.keep_columns, name) if config.keep_columns else None
    documents = Documents(tokens, columns, loss_on, source, affixes.prefix, findings, kept=kept)
    if chat_template is None:
        unused = IDS in source.reader.names and not columns.is_ids
        return replace(documents, warnings=(f"{name}: {_UNUSED_IDS}",)) if unused else documents
    warnings = list(arguments.find_unused(config, chat_template, source, columns.names))
    if len(tokens) > len(rows):
        warnings.append(
            f"{quantity(len(rows), 'chat')} became {quantity(len(tokens), 'document')}: the chat template "
            "renders earlier turns differently when more messages follow, so each answer gets a document of its own. "
            "Use `turns=last` to keep only the last answer of each chat."
        )
    if IDS in source.reader.names:
        warnings.append(_UNUSED_IDS)
    return replace(
        documents,
        options=arguments.describe_options(config, chat_template),
        warnings=tuple(f"{name}: {each}" for each in warnings),
    )


def _check_id_options(config: DataConfig, data: str, *, special_tokens: bool) -> None:
    """Raises: ConfigError for what would change token ids."""
    if not special_tokens:
        raise ConfigError(
            f"{data}: found token ids, which are for causal teachers only: the text of a masked one gets its special "
            "tokens window by window. Give it text."
        )
    if config.append_eos:
        raise ConfigError("`append_eos=True`: token ids are scored as they are. Leave it out.")


def _affixes(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, *, append_eos: bool, special_tokens: bool
) -> Affixes:
    prefix, suffix = encoding.special_affixes(tokenizer)
    if not special_tokens:
        return Affixes(tuple(prefix), tuple(suffix), "removed")
    if columns.is_chat:
        return Affixes(tuple(prefix), placement="rendered")
    if append_eos and suffix[-1:] != [tokenizer.eos_token_id]:
        suffix = [*suffix, tokenizer.eos_token_id]
    return Affixes(tuple(prefix), tuple(suffix))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, loss_on: str, append_eos: bool) -> None:
    name = tokenizer.name_or_path or "teacher"
    if loss_on != "all" and not tokenizer.is_fast:
        raise ModelError(
            f"{name}: found a slow tokenizer, expected a fast one, whose character offsets are needed to find the loss "
            "tokens. Convert it, or use `loss_on=all`."
        )
    if append_eos and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{name}: the tokenizer has no EOS token to end documents with. Set one, or use `append_eos=False`."
        )


def _tokenise_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    data: str,
    reader: RecordReader,
    columns: Columns,
    loss_on: str,
    keep_columns: Sequence[str],
    turns: str,
    template: ChatTemplate | None,
    affixes: Affixes,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Any]]:
    """Rows of the source to the columns of `_FEATURES` and `_FINDINGS`; a row may become several documents."""
    with reading(data, indices):
        rows = reader.read(batch, [*columns.to_read(reader.names), *keep_columns])
    places = [f"{data}, row {index}" for index in indices]
    if columns.is_ids:
        options: dict[str, Any] = {"names": columns.names, "all_in_loss": loss_on == "all", "teacher": columns.teacher}
        documents = [token_ids.read_token_ids(row, where, **options) for row, where in zip(rows, places, strict=True)]
        origins = list(range(len(rows)))
    else:
        how: dict[str, Any] = {"columns": columns, "loss_on": loss_on, "turns": turns, "template": template}
        texts = [
            (example, origin)
            for origin, (row, where) in enumerate(zip(rows, places, strict=True))
            for example in read_examples(row, where, **how)
        ]
        documents = _encode([(example, places[origin]) for example, origin in texts], tokenizer, affixes)
        origins = [origin for _, origin in texts]
    ends = {*affixes.suffix, tokenizer.eos_token_id} - {None}
    findings = (
        [each.had_affixes for each in documents],
        [each.split for each in documents],
        [_only_ends(each, ends) for each in documents],
    )
    return {
        "input_ids": [each.ids for each in documents],
        "is_target": [each.targets for each in documents],
        _ROW: [indices[origin] for origin in origins],
        **({} if columns.teacher is None else teacher_prompts.columns_of(documents)),
        **kept_columns.columns_of([rows[i] for i in origins], [places[i] for i in origins], keep_columns),
        **dict(zip(_FINDINGS, findings, strict=True)),
    }


def _encode(
    texts: Sequence[tuple[Example, str]], tokenizer: PreTrainedTokenizerBase, affixes: Affixes
) -> list[encoding.Tokens]:
    """Args: texts: each with the row that it is from."""
    documents = encoding.encode([example for example, _ in texts], tokenizer, affixes)
    with_own = [(place, example.teacher) for place, (example, _) in enumerate(texts) if example.teacher is not None]
    read = encoding.encode([teacher for _, teacher in with_own], tokenizer, affixes)
    for (place, _), teacher in zip(with_own, read, strict=True):
        documents[place] = teacher_prompts.with_teacher_prompt(documents[place], teacher, texts[place][1])
    return documents


def _only_ends(document: encoding.Tokens, ends: Iterable[int]) -> bool:
    """Whether the document has loss tokens, but none except EOS. Nothing predicts its first token."""
    learned = document.ids[1:][document.targets[1:]]
    return len(learned) > 0 and bool(np.isin(learned, list(ends)).all())


def _map_cached(
    rows: datasets.Dataset, function: partial[Any], fingerprint: str, num_proc: int | None
) -> datasets.Dataset:
    further = teacher_prompts.FEATURES if function.keywords["columns"].teacher is not None else {}
    further = {**further, **kept_columns.features_of(function.keywords["keep_columns"])}
    further[_ROW] = datasets.Value("int64")
    features = datasets.Features({**_FEATURES, **further, **dict.fromkeys(_FINDINGS, datasets.Value("bool"))})
    # An explicit file: the default is next to the source, which may be the user's own folder.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "distill"
    cache.mkdir(parents=True, exist_ok=True)
    claims = Claims(open_directory(cache))
    try:
        wait_for(claims, f"documents-{fingerprint}")
        return _map(rows, function, features, fingerprint, num_proc, cache)
    finally:
        claims.close()


def _map(
    rows: datasets.Dataset,
    function: partial[Any],
    features: datasets.Features,
    fingerprint: str,
    num_proc: int | None,
    cache: Path,
) -> datasets.Dataset:
    with quiet_datasets():
        return rows.map(
            function,
            with_indices=True,
            batched=True,
            batch_size=_DOCUMENTS_PER_BATCH,
            writer_batch_size=_DOCUMENTS_PER_RECORD_BATCH,
            remove_columns=rows.column_names,
            features=features,
            num_proc=num_proc,
            cache_file_name=str(cache / f"documents-{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
        )


def _fingerprint(
    rows: datasets.Dataset,
    columns: Columns,
    loss_on: str,
    append_eos: bool,
    special_tokens: bool,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    chat_template: ChatTemplate | None,
) -> str:
    """Fingerprint of everything that decides the tokens, including this code: once corrected, it must not find its
    earlier results. `datasets` would hash the pickled tokenizer, which changes with use."""
    of_text = (__file__, row_format.__file__, examples.__file__, records.__file__, encoding.__file__)
    of_ids_and_prompts = (token_ids.__file__, teacher_prompts.__file__, kept_columns.__file__)
    of_chats = (arguments.__file__, messages.__file__, template.__file__, turns.__file__)
    code = (*of_text, *of_ids_and_prompts, *of_chats)
    decides = {
        "rows": rows._fingerprint,
        "columns": [columns.format, *columns.all_names],
        "loss_on": loss_on,
        "keep_columns": list(config.keep_columns),
        "append_eos": append_eos,
        "special_tokens": special_tokens,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat": {} if chat_template is None else arguments.describe_options(config, chat_template),
        "code": [hashlib.sha256(Path(module).read_bytes()).hexdigest() for module in code],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
