"""The generic mapper: layouts, kinds of values, shifts, masks, documents, and what it warns about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from foreign_files import NESTED, check_entries, import_rows, made_up_rows, nested, write_lines, write_parquet
from pipeline.errors import ConfigError, DataError

K = 12
ROWS = made_up_rows(3)


def listed(columns: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_parquet_file(tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(ROWS, K))
    cache, summary = import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    check_entries(cache, ROWS, K)
    assert cache.metadata.targets == {
        **{"kind": "top-k", "k": K, "max_entries": K, "temperature": 1.0, "positions": "counted"},
        "entropy": "lower-bound",
    }
    assert (summary.rows, summary.loss_tokens, summary.unusable, summary.changed) == (3, 3 * 39, {}, {})
    assert summary.label_listed > 0.99


def test_lines_files_and_patterns(tmp_path: Path, tokenizer: Any):
    lines = listed(nested(ROWS, K))
    for i, line in enumerate(lines):
        write_lines(tmp_path / "data" / f"{i}.jsonl", [line])
    for n, source in enumerate((tmp_path / "data", f"{tmp_path}/data/*.jsonl")):
        check_entries(import_rows(source, tmp_path / str(n), tokenizer, **NESTED)[0], ROWS, K)


def test_arrow_files_of_datasets(tmp_path: Path, tokenizer: Any):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(nested(ROWS, K)).save_to_disk(tmp_path / "saved")
    check_entries(import_rows(tmp_path / "saved", tmp_path / "cache", tokenizer, **NESTED)[0], ROWS, K)


def test_flat_lists(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    flat = {name: [sum(row, []) for row in columns[name]] for name in ("top", "logprobs")}
    source = write_parquet(tmp_path / "rows.parquet", {**columns, **flat})
    check_entries(import_rows(source, tmp_path / "cache", tokenizer, **NESTED, flat_k=K)[0], ROWS, K)


def test_one_column_of_parts(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    pairs = [
        [[v, [float(i) for i in t]] for v, t in zip(*each, strict=True)]
        for each in zip(columns["logprobs"], columns["top"], strict=True)
    ]
    source = write_parquet(tmp_path / "rows.parquet", {"inputs": columns["tokens"], "targets": pairs})
    options = {**NESTED, "column": ("ids=inputs", "values=targets[0]", "top_ids=targets[1]")}
    check_entries(import_rows(source, tmp_path / "cache", tokenizer, **options)[0], ROWS, K)


def test_order_within_a_position_does_not_matter(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    columns = {
        **columns,
        **{name: [[each[::-1] for each in row] for row in columns[name]] for name in ("top", "logprobs")},
    }
    source = write_parquet(tmp_path / "rows.parquet", columns)
    check_entries(import_rows(source, tmp_path / "cache", tokenizer, **NESTED)[0], ROWS, K)


@pytest.mark.parametrize("values", ["probabilities", "logits", "renormalised"])
def test_kinds_of_values(values: str, tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    arrays = [np.array(each) for each in columns["logprobs"]]
    exact = {
        "logits": lambda v: v + 7.5,
        "probabilities": np.exp,
        "renormalised": lambda v: np.exp(v) / np.exp(v).sum(1, keepdims=True),
    }
    source = write_parquet(
        tmp_path / "rows.parquet", {**columns, "logprobs": [exact[values](v).tolist() for v in arrays]}
    )
    warnings: list[str] = []
    options = {**NESTED, "values": values, "warnings": warnings}
    cache, summary = import_rows(source, tmp_path / "cache", tokenizer, **options)
    if values == "probabilities":
        check_entries(cache, ROWS, K)
        assert not summary.renormalised and not warnings
        return
    assert summary.renormalised and cache.metadata.renormalised and "tail=renormalise" in warnings[0]
    row = cache[1]
    ids, logprobs = row.targets.at(5)
    assert np.isneginf(row.targets.residual_logprob[5])
    assert abs(np.exp(logprobs.astype(float)).sum() - 1) < 0.05  # rounded to the codebook
    assert ids.tolist() == sorted(columns["top"][1][5])


def test_logits_with_a_normaliser_keep_the_tail(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    shifts = [[float(t % 5) for t in range(40)] for _ in ROWS]
    logits = [(np.array(v) + np.array(s)[:, None]).tolist() for v, s in zip(columns["logprobs"], shifts, strict=True)]
    source = write_parquet(tmp_path / "rows.parquet", {**columns, "logprobs": logits, "lse": shifts})
    options = {**NESTED, "values": "logits", "column": (*NESTED["column"], "normaliser=lse")}
    cache, summary = import_rows(source, tmp_path / "cache", tokenizer, **options)
    check_entries(cache, ROWS, K)
    assert not summary.renormalised


def test_shift_1(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    moved = {name: [[None, *row[:-1]] for row in columns[name]] for name in ("top", "logprobs")}
    source = write_parquet(tmp_path / "rows.parquet", {**columns, **moved})
    check_entries(import_rows(source, tmp_path / "cache", tokenizer, **{**NESTED, "shift": 1})[0], ROWS, K)
    with pytest.raises(DataError, match="off by one.*Use `shift=1`"):
        import_rows(source, tmp_path / "other", tokenizer, **NESTED)
    assert not (tmp_path / "other").exists()


def test_a_shift_that_is_not_there_is_found(tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(ROWS, K))
    with pytest.raises(DataError, match="off by one.*Use `shift=0`"):
        import_rows(source, tmp_path / "cache", tokenizer, **{**NESTED, "shift": 1})


def test_lists_of_another_text_are_reported(tmp_path: Path, tokenizer: Any):
    columns = {**nested(ROWS, K), "tokens": [row.ids.tolist() for row in made_up_rows(3, seed=9)]}
    warnings: list[str] = []
    import_rows(
        write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED, warnings=warnings
    )
    assert "another text" in warnings[0]


def test_masks_padding_and_documents(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS[:2], K)
    length, before = 40, 3
    columns = {
        "tokens": [[0] * before + row for row in columns["tokens"]],
        **{name: [[None] * before + row for row in columns[name]] for name in ("top", "logprobs")},
        "attention": [[0] * before + [1] * 10 + [2] * 30] * 2,
        "mask": [[0] * before + [0] * 20 + [1] * 20] * 2,
    }
    source = write_parquet(tmp_path / "rows.parquet", columns)
    options = {**NESTED, "column": (*NESTED["column"], "attention=attention mask=mask")}
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **options)
    row = cache[0]
    assert row.input_ids.tolist() == ROWS[0].ids.tolist() and row.segment_lengths.tolist() == [10, 30]
    predicted = np.flatnonzero(row.loss_mask) + 1
    assert predicted.tolist() == list(range(20, length))
    assert np.asarray(row.targets.counts)[~row.loss_mask].sum() == 0
    assert cache.metadata.corpus["packing"] is True


def test_documents_end_where_the_next_begins(tmp_path: Path, tokenizer: Any):
    columns = {**nested(ROWS, K), "attention": [[1] * 10 + [2] * 30] * 3}
    options = {**NESTED, "column": (*NESTED["column"], "attention=attention")}
    source = write_parquet(tmp_path / "rows.parquet", columns)
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **options)
    assert np.flatnonzero(~cache[0].loss_mask).tolist() == [9, 39]


def test_most_likely_entries_are_kept(tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(ROWS, K))
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **NESTED, top_k=4)
    check_entries(cache, ROWS, 4)


def test_double_bos_is_found_and_dropped(tmp_path: Path, tokenizer: Any):
    bos = tokenizer.bos_token_id
    columns = nested(ROWS, K)
    columns["tokens"] = [[bos, bos, *row[2:]] for row in columns["tokens"]]
    source = write_parquet(tmp_path / "rows.parquet", columns)
    warnings: list[str] = []
    cache, summary = import_rows(source, tmp_path / "a", tokenizer, **NESTED, warnings=warnings)
    assert "`drop_repeated_bos=True`" in warnings[0] and cache[0].input_ids[:2].tolist() == [bos, bos]
    cache, summary = import_rows(source, tmp_path / "b", tokenizer, **NESTED, drop_repeated_bos=True)
    assert summary.changed == {"documents that begin with two BOS tokens": 3}
    row = cache[0]
    assert row.input_ids.tolist() == [bos, *ROWS[0].ids[2:].tolist()] and row.segment_lengths.tolist() == [39]
    assert row.targets.at(0)[0].tolist() == sorted(columns["top"][0][1])


def test_rows_with_nothing_to_learn_are_named_and_counted(tmp_path: Path, tokenizer: Any):
    columns = {**nested(ROWS, K), "mask": [[1] * 40, [0] * 40, [1] * 40]}
    options = {**NESTED, "column": (*NESTED["column"], "mask=mask")}
    source = write_parquet(tmp_path / "rows.parquet", columns)
    cache, summary = import_rows(source, tmp_path / "cache", tokenizer, **options)
    assert summary.unusable == {"no loss tokens": 1}
    assert summary.examples == {"no loss tokens": [f"{source}, row 1"]}
    check_entries(cache, [ROWS[0], ROWS[2]], K)
    assert cache.metadata.capture["imported"]["unusable"] == {"no loss tokens": 1}


def test_unlikely_tokens_outside_the_vocabulary_are_left_out(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    for row in range(3):
        columns["top"][row][7].append(450)  # a padding row of the embedding
        columns["logprobs"][row][7].append(-12.0)
    cache, summary = import_rows(
        write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED
    )
    check_entries(cache, ROWS, K)
    assert summary.changed == {"entries outside the vocabulary": 3}


def test_float16_sums_a_little_above_1_are_rescaled(tmp_path: Path, tokenizer: Any):
    rows = made_up_rows(2, boost=14.0)
    columns = nested(rows, K)
    columns["logprobs"] = [[[v + 0.005 for v in each] for each in row] for row in columns["logprobs"]]
    cache, summary = import_rows(
        write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED
    )
    assert summary.changed["positions whose probabilities summed to more than 1"] > 50
    assert cache[0].targets.logprobs.max() <= 0
    import cache_format as cf

    cf.verify_cache(cache.path, deep=True)


def test_null_lists_are_positions_without_targets(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    columns["top"][0][4] = columns["logprobs"][0][4] = None
    cache, summary = import_rows(
        write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED
    )
    assert summary.changed == {"positions without entries": 1}
    assert not cache[0].loss_mask[4] and cache[0].loss_mask[5]


def test_fixed_size_and_half_precision_lists(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    kinds = {"top": pa.list_(pa.list_(pa.int32(), K)), "logprobs": pa.list_(pa.list_(pa.float16(), K))}
    arrays = {"tokens": columns["tokens"], "top": pa.array(columns["top"], kinds["top"])}
    arrays["logprobs"] = pa.array(
        [[[np.float16(v) for v in e] for e in r] for r in columns["logprobs"]], kinds["logprobs"]
    )
    check_entries(
        import_rows(write_parquet(tmp_path / "a.parquet", arrays), tmp_path / "cache", tokenizer, **NESTED)[0], ROWS, K
    )


@pytest.mark.parametrize(
    "options", [{"values": None}, {"shift": None}, {"column": ("ids=tokens",)}, {"column": ("x=y",)}]
)
def test_columns_need_to_be_described(options: dict[str, Any], tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "a.parquet", nested(ROWS, K))
    with pytest.raises(ConfigError) as caught:
        import_rows(source, tmp_path / "cache", tokenizer, **{**NESTED, **options})
    assert caught.value.field == next(iter(options))
