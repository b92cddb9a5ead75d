"""Sources in which one row cannot be right: each is refused with file and row named, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from foreign_files import NESTED, Kit, import_rows, made_up_rows, nested, write_distillkit, write_lines, write_parquet
from pipeline.errors import DataError

K = 6
BAD = 2  # the row, counted from 0
ROWS = made_up_rows(4)

Change = Callable[[dict[str, Any]], object]


def at(name: str, position: int, entry: int, value: Any) -> Change:
    def change(row: dict[str, Any]) -> None:
        row[name][position][entry] = value

    return change


def replaced(**columns: Any) -> Change:
    return lambda row: row.update(columns)


MALFORMED: dict[str, tuple[Change, str]] = {
    "NaN": (at("logprobs", 7, 1, math.nan), "position 7: value nan of token"),
    "infinity": (at("logprobs", 7, 1, math.inf), "position 7: value inf"),
    "minus infinity": (at("logprobs", 0, 5, -math.inf), "position 0: value -inf"),
    "null value": (at("logprobs", 7, 1, None), "column 'logprobs'"),
    "text for a value": (at("logprobs", 7, 1, "low"), "column 'logprobs'"),
    "token twice": (lambda row: at("top", 7, 1, row["top"][7][0])(row), "position 7: token .* is listed twice"),
    "negative entry": (at("top", 7, 1, -1), "position 7: entry -1"),
    "likely token outside the vocabulary": (at("top", 7, 0, 5000), "position 7: token 5000 has probability"),
    "fraction of a token": (at("top", 7, 1, 3.5), "column 'top'.*whole numbers"),
    "probabilities above 1": (at("logprobs", 7, 1, -0.01), "position 7: its probabilities sum to"),
    "logits": (at("logprobs", 7, 0, 12.0), "position 7: .*values=logits"),
    "lists of different lengths": (lambda row: row["logprobs"][7].pop(), "different lengths: position 7 has 6 and 5"),
    "more values than lists": (lambda row: row["logprobs"].append([-1.0] * K), "40 and 41 positions"),
    "too few lists": (
        lambda row: [row[name].pop() for name in ("top", "logprobs") for _ in range(2)],
        "38 lists of entries for 40",
    ),
    "too many lists": (
        lambda row: [row[name].append(row[name][0]) for name in ("top", "logprobs")],
        "41 lists of entries for 40",
    ),
    "token of the text outside the vocabulary": (
        lambda row: row["tokens"].__setitem__(9, 400),
        "position 9: token 400",
    ),
    "negative token of the text": (lambda row: row["tokens"].__setitem__(9, -100), "position 9: token -100"),
    "no lists": (replaced(top=None), "no value in column 'top'"),
    "text instead of tokens": (replaced(tokens="hello"), "column 'tokens': str, expected a list"),
    "numbers instead of lists": (replaced(top=[1] * 40), "column 'top'.*expected a list of lists"),
    "deeper lists": (replaced(logprobs=[[[-1.0]] * K] * 40), "column 'logprobs'"),
    "mask of another length": (replaced(mask=[1] * 39), "39 values of mask for 40 tokens"),
    "attention of another length": (replaced(attention=[1] * 41), "41 values of attention for 40 tokens"),
    "negative attention": (replaced(attention=[-1] + [1] * 39), "attention -1"),
    "padding in the middle": (replaced(attention=[1] * 20 + [0] * 5 + [1] * 15), "position 20: padding between tokens"),
    "fraction in a mask": (replaced(mask=[0.5] * 40), "column 'mask'.*whole numbers"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_one_malformed_row(name: str, tmp_path: Path, tokenizer: Any):
    change, message = MALFORMED[name]
    columns = {**nested(ROWS, K), "mask": [[1] * 40] * 4, "attention": [[1] * 40] * 4}
    lines = [json.loads(json.dumps({each: columns[each][row] for each in columns})) for row in range(4)]
    change(lines[BAD])
    source = write_lines(tmp_path / "rows.jsonl", lines)
    options = {**NESTED, "column": (*NESTED["column"], "mask=mask attention=attention")}
    with pytest.raises(DataError, match=rf"rows\.jsonl, line {BAD + 1}: .*{message}"):
        import_rows(source, tmp_path / "cache", tokenizer, **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "values, value, message",
    [
        ("probabilities", -0.1, "position 3: probability -0.1, expected 0 to 1"),
        ("probabilities", math.nan, "position 3: value nan"),
        ("logits", math.inf, "position 3: value inf"),
        ("renormalised", math.nan, "position 3: value nan"),
    ],
)
def test_other_kinds_of_values(values: str, value: float, message: str, tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    columns["logprobs"] = [[[math.exp(v) for v in each] for each in row] for row in columns["logprobs"]]
    columns["logprobs"][BAD][3][0] = value
    source = write_parquet(tmp_path / "rows.parquet", columns)
    with pytest.raises(DataError, match=rf"rows\.parquet, row {BAD}: {message}"):
        import_rows(source, tmp_path / "cache", tokenizer, **{**NESTED, "values": values})


def test_distillkit_rows_of_other_lengths(tmp_path: Path, tokenizer: Any):
    folder = write_distillkit(tmp_path / "data", ROWS, Kit(k=4, exact_k=4))
    table = pq.read_table(folder / "data.parquet").to_pydict()
    for name, change, message in (
        ("compressed_logprobs", lambda lists: lists[7].pop(), "position 7: 15 bytes, expected 16"),
        ("bytepacked_indices", lambda lists: lists.pop(), "39 positions in compressed_logprobs, 38"),
        ("compressed_logprobs", lambda lists: lists[5].__setitem__(3, 0x7F), "position 5"),
    ):
        columns = json.loads(json.dumps(table))
        change(columns[name][BAD])
        write_parquet(folder / "data.parquet", columns)
        with pytest.raises(DataError, match=rf"data\.parquet, row {BAD}: .*{message}"):
            import_rows(folder, tmp_path / "cache", tokenizer)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1, 2]", "found a list, expected one JSON object"),
        ('{"choices": []}', "1 no choices"),
        ('{"choices": [{"logprobs": null}], "prompt": [1, 2]}', "no loss tokens"),
    ],
)
def test_lines_that_are_no_rows(line: str, message: str, tmp_path: Path, tokenizer: Any):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        import_rows(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer, format="responses")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables(name: str, tmp_path: Path, tokenizer: Any):
    (tmp_path / name).write_bytes(b"PAR1 this is no table")
    with pytest.raises(DataError, match=rf"{name}, row 0: it cannot be read"):
        import_rows(tmp_path / name, tmp_path / "cache", tokenizer)
