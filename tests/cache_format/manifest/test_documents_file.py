"""documents.arrow: what comes back is what was written, and nothing else is accepted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.codecs import ipc
from cache_format.manifest.documents_file import DOCUMENTS, KeptColumn, documents_bytes, kept_columns
from cache_samples import sample_metadata

VALUES, CODES, DOCUMENTS_OF_ROW = ["web", "code", "unused", "books"], np.array([0, 1, 1, 3, 0]), [2, 3]


def about(contents: bytes, names: list[str], rows: int = 2) -> cf.CacheMetadata:
    recorded = {"keep_columns": names, "documents_file": cf.describe_documents(contents)}
    return sample_metadata(corpus={"rows": rows, **recorded})


def test_columns_come_back_sorted_and_without_unused_values() -> None:
    column = KeptColumn.of(VALUES, CODES, DOCUMENTS_OF_ROW)
    assert column.values == ("books", "code", "web")
    assert [column[row] for row in range(len(column))] == [["web", "code"], ["code", "books", "web"]]
    contents = documents_bytes({"domain": column, "again": column})
    found = kept_columns(contents, about(contents, ["domain", "again"]), "here")
    assert list(found) == ["domain", "again"]
    for each in found.values():
        assert each.values == column.values and each[0] == column[0] and each[1] == column[1]
    assert contents == documents_bytes({"domain": column, "again": column})
    # Any Arrow reader shows a list of strings for each row.
    table = pa.ipc.open_file(pa.py_buffer(contents)).read_all()
    assert table["domain"].to_pylist() == [["web", "code"], ["code", "books", "web"]]


@pytest.mark.parametrize("values", [["a\nb"], [""], ["a" * 101], [str(i) for i in range(257)]])
def test_values_that_no_table_can_show_are_refused(values: list[str]) -> None:
    with pytest.raises(ValueError, match="expected at most 256, each of 1 to 100 printable characters"):
        KeptColumn.of(values, np.arange(len(values)), [len(values)])


def test_a_long_run_of_one_value_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed it would expand by more than readers accept."""
    monkeypatch.setattr(ipc, "EXPANDS_ANYWAY", 2**12)
    documents = 2**17
    column = KeptColumn.of(["web"], np.zeros(documents, np.uint8), [documents])
    contents = documents_bytes({"domain": column})
    assert len(kept_columns(contents, about(contents, ["domain"], rows=1), "here")["domain"].codes) == documents


def file_of(compression: str | None = None, **columns: pa.Array) -> bytes:
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_batch(batch)
    return sink.getvalue().to_pybytes()


ITEM = pa.field("item", pa.dictionary(pa.uint8(), pa.string()), nullable=False)


def lists(values: list[str], codes: list[list[int]], kind: Any = ITEM) -> pa.Array:
    flat = pa.DictionaryArray.from_arrays(pa.array(sum(codes, []), pa.uint8()), pa.array(values), safe=False)
    ends = np.concatenate([[0], np.cumsum([len(each) for each in codes])])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, type=pa.list_(kind))


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"ARROW1\0\0" + b"\xff" * 64,
        file_of(domain=pa.array([["web"], ["code"]])),  # not encoded as a dictionary
        file_of(domain=lists(["web"], [[0], []])),  # a row without documents
        file_of(domain=lists(["web"], [[0]])),  # too few rows
        file_of(other=lists(["web"], [[0], [0]])),
        file_of(domain=lists(["web", "web"], [[0], [1]])),
        file_of(domain=lists(["\x1b[2J"], [[0], [0]])),
        file_of(domain=lists(["web"], [[0], [1]])),  # a code without a value
    ],
)
def test_other_contents_are_one_error(contents: bytes) -> None:
    with pytest.raises(cf.FormatError, match=r"^here: .*Restore it from a copy, or make the cache again\.$") as error:
        kept_columns(contents, about(contents, ["domain"]), "here")
    assert "\n" not in str(error.value)


def test_contents_cannot_expand_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros compress a thousandfold: sizes are added up before anything is decompressed."""
    contents = file_of("zstd", domain=lists(["web"], [[0] * 2**18]))
    kept_columns(contents, about(contents, ["domain"], rows=1), "here")
    monkeypatch.setattr(ipc, "EXPANDS_ANYWAY", 2**12)
    with pytest.raises(cf.FormatError, match="here: .*expand to .*, expected at most 64 times as many"):
        kept_columns(contents, about(contents, ["domain"], rows=1), "here")


def test_many_values_are_refused_before_they_are_decoded() -> None:
    """Codes of one byte can name 256 of them; each would take fifty bytes more as a Python string."""
    contents = file_of(domain=lists(["ab"] * 2**17, [[0]]))
    tracemalloc.start()
    with pytest.raises(cf.FormatError, match="here: .*131,072 values, expected at most 256"):
        kept_columns(contents, about(contents, ["domain"], rows=1), "here")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18


def test_names_and_file_belong_together() -> None:
    for facts in ({"keep_columns": ["domain"]}, {"documents_file": cf.describe_documents(b"")}):
        with pytest.raises(ValueError, match="keep_columns and documents_file belong together"):
            sample_metadata(corpus={"rows": 2, **facts})


def test_the_file_is_written_once(tmp_path: Path) -> None:
    cf.write_documents(tmp_path, b"contents")
    written = (tmp_path / DOCUMENTS).stat().st_mtime_ns
    cf.write_documents(tmp_path, b"contents")
    assert (tmp_path / DOCUMENTS).stat().st_mtime_ns == written
    cf.write_documents(tmp_path, b"damaged before")
    assert (tmp_path / DOCUMENTS).read_bytes() == b"damaged before"
