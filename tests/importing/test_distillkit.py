"""DistillKit's columns: every encoding, packed rows, raw lists, and a configuration that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from foreign_files import (
    Kit,
    check_entries,
    encode,
    import_rows,
    made_up_rows,
    nested,
    pack,
    write_distillkit,
    write_parquet,
)
from pipeline.errors import ConfigError, DataError
from pipeline.importing.readers.distillkit_reader import Bin, Compression, unpack_integers

ROWS = made_up_rows(2)
PUBLIC = Kit(k=128, exact_k=32, terms=(0, 1, 2))  # of the packed data sets of arcee-ai

KITS = {
    "exact": Kit(),
    "exact, no delta": Kit(delta=False),
    "public": PUBLIC,
    "float16": Kit(exact_dtype="float16"),
    "bfloat16": Kit(exact_dtype="bfloat16", delta=False),
    "float64": Kit(exact_dtype="float64", k=32, exact_k=8, terms=(0, 1), term_dtype="float64"),
    "sqrt and exp": Kit(k=64, exact_k=16, terms=(0, 1, "sqrt", "exp"), normalize_t=True),
    "residuals": Kit(k=64, exact_k=8, terms=(0, 1), bins=(("float32", 8, 16), ("float16", 4, 16), ("float32", 1, 10))),
    "residuals only": Kit(k=32, exact_k=8, bins=(("float32", 11, 24),)),
    "bfloat16 terms": Kit(k=64, exact_k=16, terms=(0, 1), term_dtype="bfloat16", normalize_t=True),
}


def compression(kit: Kit, folder: Path) -> Compression:
    write_distillkit(folder, ROWS[:1], kit)
    return Compression.from_yaml(folder / "compression_config.yaml")


@pytest.mark.parametrize("name", KITS)
def test_encodings(name: str, tmp_path: Path):
    """Decoded values are the encoded ones, as close as the encoding can be."""
    kit = KITS[name]
    found = compression(kit, tmp_path)
    ids, values = ROWS[0].top(kit.k)
    assert found.ids(pack(ids, 9)).tolist() == ids.tolist()
    data = encode(values, kit)
    assert data.shape[1] == found.logprob_bytes
    decoded = found.logprobs(data).double().numpy()
    narrow = "16" in kit.exact_dtype
    np.testing.assert_allclose(decoded[:, : kit.exact_k], values[:, : kit.exact_k], atol=0.05 if narrow else 1e-5)
    assert np.abs(np.exp(decoded) - np.exp(values)).max() < 0.02
    assert np.abs(decoded - values).max() < 1.5


def test_terms_and_residuals_by_hand():
    """values = [-1, -2], then differences 0.5·t + residuals (1, 0, …), scale 0.25; all accumulated."""
    found = Compression(d=400, k=6, exact_k=2, terms=(1,), bins=(Bin(torch.float32, 4, 2),), term_dtype=torch.float32)
    parts = [np.array([-1.0, -2.0], "<f4"), np.array([-0.5], "<f4"), np.array([0.25], "<f4")]
    data = np.concatenate([each.view(np.uint8) for each in parts] + [np.array([0b1100_0111], np.uint8)])
    differences = [-1.0, -2.0, -0.0 + 0.25 * (12 - 8), -0.5 + 0.25 * (7 - 8), -1.0, -1.5]
    assert found.logprobs(data[None]).tolist() == [np.cumsum(differences).tolist()]


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 17, 18, 24, 57])
def test_packed_integers(bits: int):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (5, 13))
    assert unpack_integers(pack(numbers, bits), bits, 13).tolist() == numbers.tolist()


def test_import(tmp_path: Path, tokenizer: Any):
    cache, summary = import_rows(write_distillkit(tmp_path / "data", ROWS), tmp_path / "cache", tokenizer)
    check_entries(cache, ROWS, 16)
    imported = cache.metadata.capture["imported"]
    assert imported["reader"] == "DistillKit"
    assert {"d", "k", "exact_k", "exact_dtype", "terms", "term_dtype", "bins", "normalize_t"} <= set(imported)
    assert not summary.renormalised


def test_packed_rows(tmp_path: Path, tokenizer: Any):
    """The input is as long as the lists, and `attention_mask` numbers the documents."""
    kit = Kit()
    tops = [row.top(kit.k) for row in ROWS]
    bytes_ = pa.list_(pa.list_(pa.uint8()))
    joined = {
        "compressed_logprobs": pa.array([sum([encode(v, kit).tolist()[:-1] for _, v in tops], [])], bytes_),
        "bytepacked_indices": pa.array([sum([pack(i, 9).tolist()[:-1] for i, _ in tops], [])], bytes_),
        "input_ids": [sum([row.ids.tolist()[:-1] for row in ROWS], [])],
        "attention_mask": [[1] * 39 + [2] * 39],
    }
    folder = write_distillkit(tmp_path / "data", ROWS, kit)
    write_parquet(folder / "data.parquet", joined)
    cache, _ = import_rows(folder, tmp_path / "cache", tokenizer)
    row = cache[0]
    assert row.segment_lengths.tolist() == [39, 39]
    assert np.flatnonzero(~row.loss_mask).tolist() == [38, 77]
    assert row.targets.at(50)[0].tolist() == sorted(tops[1][0][11])


def test_raw_lists(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, 16)
    names = {"input_ids": "tokens", "token_ids": "top", "top_values": "logprobs"}
    source = write_parquet(tmp_path / "a.parquet", {name: columns[each] for name, each in names.items()})
    check_entries(import_rows(source, tmp_path / "cache", tokenizer)[0], ROWS, 16)
    logits = [[[v + 9.0 for v in each] for each in row] for row in columns["logprobs"]]
    source = write_parquet(
        tmp_path / "b.parquet", {"input_ids": columns["tokens"], "token_ids": columns["top"], "top_values": logits}
    )
    with pytest.raises(DataError, match=r"row 0: position 0: .* sum to .*values=logits"):
        import_rows(source, tmp_path / "wrong", tokenizer)
    assert import_rows(source, tmp_path / "right", tokenizer, values="logits")[1].renormalised


def test_messages_beside_are_ignored(tmp_path: Path, tokenizer: Any):
    messages = [[{"role": "user", "content": "Hello"}]] * 2
    folder = write_distillkit(tmp_path / "data", ROWS, messages=messages)
    check_entries(import_rows(folder, tmp_path / "cache", tokenizer)[0], ROWS, 16)


def test_the_configuration_may_lie_elsewhere(tmp_path: Path, tokenizer: Any):
    folder = write_distillkit(tmp_path / "deep/down/data", ROWS)
    (folder / "compression_config.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(ConfigError) as caught:
        import_rows(folder, tmp_path / "cache", tokenizer)
    assert caught.value.field == "layout"
    check_entries(import_rows(folder, tmp_path / "cache", tokenizer, layout=str(tmp_path / "other.yaml"))[0], ROWS, 16)


@pytest.mark.parametrize(
    "text", ["", "[1]", "d: 400", "d: 400\nk: 4\nexact_k: 8", "d: 400\nk: 8\nexact_k: 4\npolynomial_terms: [cos]"]
)
def test_configurations_that_are_none(text: str, tmp_path: Path, tokenizer: Any):
    folder = write_distillkit(tmp_path / "data", ROWS)
    (folder / "compression_config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        import_rows(folder, tmp_path / "cache", tokenizer)
    assert caught.value.field == "layout"


def test_a_configuration_of_other_data(tmp_path: Path, tokenizer: Any):
    folder = write_distillkit(tmp_path / "data", ROWS)
    write_distillkit(tmp_path / "other", ROWS, Kit(k=8, exact_k=8))
    with pytest.raises(DataError, match=r"row 0: column 'compressed_logprobs': 64 bytes per position, expected 32"):
        import_rows(folder, tmp_path / "cache", tokenizer, layout=str(tmp_path / "other/compression_config.yaml"))
