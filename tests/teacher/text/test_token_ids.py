"""Token ids as input: scored exactly as they are, with the loss that their columns say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_format as cf
from dense import check_row, document_logprobs
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, build_corpus
from tiny import completions, tiny_llama, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer(add_bos=True)  # which must not add it here
BOS = TOKENIZER.bos_token_id


def rows_of(number: int = 6) -> list[dict[str, Any]]:
    """Prompts and completions, with all columns that may say what the loss is on; every second one begins with BOS."""
    rows = []
    for i, row in enumerate(completions(number, seed=2)):
        prompt, completion = (TOKENIZER(row[name], add_special_tokens=False)["input_ids"] for name in sorted(row)[::-1])
        prompt = [BOS] * (i % 2) + prompt
        ids, start = prompt + completion, len(prompt)
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * start + completion,
                "loss_mask": [0] * start + [1] * len(completion),
                "completion_mask": [False] * start + [True] * len(completion),
                "loss_spans": [[start, start + 2], [start + 2, len(ids)]],
            }
        )
    return rows


def corpus_of(data: Any, **options: Any) -> TokenCorpus:
    data = str(data) if isinstance(data, Path) else data
    return build_corpus(DataConfig(data=data, **{"seq_len": 2000, "packing": False, **options}), TOKENIZER)


def check_rows(corpus: TokenCorpus, rows: list[dict[str, Any]], *, everything: bool = False) -> None:
    assert len(corpus) == len(rows)
    for found, row in zip(corpus, rows, strict=True):
        assert found.input_ids.tolist() == row["input_ids"]
        learned = np.ones(len(row["input_ids"]), bool) if everything else np.array(row["loss_mask"], bool)
        assert found.loss_mask.tolist() == [*learned[1:].tolist(), False]


@pytest.mark.parametrize("column", ["labels", "loss_mask", "completion_mask", "loss_spans", None])
def test_loss_is_on_what_a_column_says(column: str | None) -> None:
    rows = rows_of()
    data = [{name: row[name] for name in ("input_ids", column) if name} for row in rows]
    corpus = corpus_of(data)
    check_rows(corpus, rows, everything=column is None)
    assert corpus.description["loss_on"] == ("all" if column is None else "labels")
    assert corpus.description["append_eos"] is False
    check_rows(corpus_of(data, loss_on="all"), rows, everything=True)


def test_several_columns_must_agree() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "assistant_masks": [1, 1, 0, 1]}
    (found,) = corpus_of([row])
    assert found.loss_mask.tolist() == [True, False, True, False]


def as_jsonl(rows: list[dict[str, Any]], folder: Path) -> Any:
    return write_jsonl(folder / "rows.jsonl", rows)


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> Any:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_saved(rows: list[dict[str, Any]], folder: Path) -> Any:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_dataset(rows: list[dict[str, Any]], folder: Path) -> Any:
    return datasets.Dataset.from_list(rows).with_format("torch")


def as_iterable(rows: list[dict[str, Any]], folder: Path) -> Any:
    return iter(rows)


def as_arrays(rows: list[dict[str, Any]], folder: Path) -> Any:
    return [{name: np.array(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("form", [as_jsonl, as_parquet, as_saved, as_dataset, as_iterable, as_arrays])
def test_sources(form: Callable[[list[dict[str, Any]], Path], Any], tmp_path: Path) -> None:
    rows = rows_of()
    given = [{name: row[name] for name in ("input_ids", "labels", "loss_spans")} for row in rows]
    check_rows(corpus_of(form(given, tmp_path)), rows)


def test_padding_is_left_out() -> None:
    ids, mask = [0, 0, 5, 6, 7, 0], [0, 0, 1, 1, 1, 0]
    row = {"input_ids": ids, "attention_mask": mask, "position_ids": [1, 1, 0, 1, 2, 1]}
    (found,) = corpus_of([row | {"labels": [-100, -100, -100, 6, 7, -100]}])
    assert found.input_ids.tolist() == [5, 6, 7] and found.loss_mask.tolist() == [True, True, False]


def test_text_wins_unless_the_ids_are_named() -> None:
    row = {"text": "Why?", "input_ids": [5, 6, 7], "labels": [-100, 6, 7], "id": "a"}
    text = corpus_of([row])
    assert text.description["format"] == "text" and "'input_ids'" in text.warnings[0]
    ids = corpus_of([row], text_column="input_ids")
    assert ids[0].input_ids.tolist() == [5, 6, 7] and ids.warnings == ()
    del row["text"]
    assert corpus_of([row]).description["columns"] == ["input_ids", "labels"]
    assert corpus_of([{"tokens": [5, 6]}], text_column="tokens")[0].input_ids.tolist() == [5, 6]


@pytest.mark.parametrize("packing", [True, False])
def test_targets_are_those_of_the_given_tokens(packing: bool, tmp_path: Path) -> None:
    """Long rows are cut into windows, which begin with BOS if the row does."""
    rows, teacher = rows_of(), tiny_llama(tmp_path / "teacher", TOKENIZER)
    given = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    data = DataConfig(data=given, seq_len=48, packing=packing)
    config = CacheTeacherConfig(
        teacher=str(teacher), data=data, output=str(tmp_path / "out"), targets=TargetRule(top_k=8), device="cpu"
    )
    cache_teacher(config)
    cache = cf.open_cache(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    for row in cache.iter_rows():
        check_row(row, document_logprobs(model, row, cache.metadata.vocab_size), cache.metadata)
    assert cache.num_loss_tokens == sum(sum(row["loss_mask"]) for row in rows)
    begins = [row.input_ids[0] for row in cache.iter_rows()]
    assert BOS in begins and any(each != BOS for each in begins)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [5, 6.5]}, "column 'input_ids': found values of type int, expected a list of token ids"),
    ({"input_ids": "5 6"}, "column 'input_ids': found str, expected a list of token ids"),
    ({"input_ids": [5, -6]}, "column 'input_ids', token 1: found id -6, expected 0 or more"),
    ({"input_ids": [5, 6], "labels": [5]}, "column 'labels': found 1 values, expected 2, one for each token"),
    ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "column 'labels', token 0: found label 6, .* not shifted"),
    ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "column 'loss_mask', token 1: found 2, expected 0 or 1"),
    ({"input_ids": [5, 6], "loss_mask": [0.5, 1.0]}, "column 'loss_mask': found values of type float"),
    ({"input_ids": [5, 6], "loss_spans": [[0, 3]]}, r"column 'loss_spans': found \[0, 3\], expected pairs"),
    ({"input_ids": [5, 6], "loss_spans": [1]}, "column 'loss_spans': found 1, expected pairs"),
    ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "column 'attention_mask': found 0 between ones"),
    ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, "column 'position_ids': .* several documents share the row"),
    ({"input_ids": [5, 6, 7], "seq_lengths": [1, 2]}, "column 'seq_lengths': found 2 lengths"),
]


@pytest.mark.parametrize("row, message", WRONG)
def test_a_row_that_cannot_be_used_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "loss_mask": [1, 1, 1], "loss_spans": [[0, 3]]}
    rows = [{name: good.get(name, row[name]) if name in good else None for name in row}, row]
    with pytest.raises(DataError, match=rf"rows.jsonl, row 1, {message}"):
        corpus_of(as_jsonl(rows, tmp_path))


def test_an_id_beyond_the_vocabulary_is_reported_before_anything_is_computed(tmp_path: Path) -> None:
    teacher = tiny_llama(tmp_path / "teacher", TOKENIZER, pad_vocab=8)
    data = DataConfig(data=as_jsonl([{"input_ids": [5, 6]}, {"input_ids": [5, 401, 6]}], tmp_path).as_posix())
    config = CacheTeacherConfig(teacher=str(teacher), data=data, output=str(tmp_path / "out"), device="cpu")
    with pytest.raises(
        DataError, match="rows.jsonl, row 1: found token id 401, expected ids below 400, the vocabulary"
    ):
        cache_teacher(config)


def test_an_id_that_only_the_teacher_reads_is_checked_too() -> None:
    rows = [{"input_ids": [5, 6], "loss_mask": [0, 1], "teacher_input_ids": ids} for ids in ([7, 8], [7, 399])]
    corpus = corpus_of(rows)
    assert corpus.first_token_beyond(399) == (1, 399) and corpus.first_token_beyond(400) is None


def test_options_that_would_change_the_ids(tmp_path: Path) -> None:
    data = as_jsonl(rows_of(2), tmp_path).as_posix()
    with pytest.raises(ConfigError, match="`append_eos=True`: token ids are scored as they are"):
        corpus_of(data, append_eos=True)
    with pytest.raises(ConfigError, match="`loss_on` assistant cannot be used with token-ids data .*labels or all"):
        corpus_of(data, loss_on="assistant")
    with pytest.raises(ConfigError, match="`turns` is for chats"):
        corpus_of(data, turns="last")
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "<|pad|>"
    with pytest.raises(ConfigError, match="token ids, which are for causal teachers only"):
        build_masked_corpus(DataConfig(data=data), tokenizer, MaskRule())
    teacher = tiny_llama(tmp_path / "teacher", TOKENIZER)
    settings = {"teacher": str(teacher), "data": DataConfig(data=data), "output": str(tmp_path / "out")}
    config = CacheTeacherConfig(**settings, generation=GenerationConfig())
    with pytest.raises(DataError, match="found token ids .*, expected prompts"):
        generate_cache(config)
