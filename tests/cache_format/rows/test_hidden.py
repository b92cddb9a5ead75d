"""Hidden states beside the targets: stored exactly, read layer by layer, by anybody, and refused where they lie."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.codecs.encodings import codec_for
from cache_format.codecs.ipc import buffers_per_column, message_buffers
from cache_format.rows.hidden import find_invalid_state
from cache_samples import SHARD, complaint, forge_shard, sample_metadata, sample_row

LAYERS, WIDTH = (2, 5), 6


def hidden_metadata(dtype: str, rows: int = 10, **changes: Any) -> cf.CacheMetadata:
    hidden = {"layers": list(LAYERS), "teacher_layers": 5, "width": WIDTH, "dtype": dtype, "every": 2}
    targets = {"kind": "top-k", "k": 5, "temperature": 1.0, "max_entries": 9, "samples": 1, "hidden": hidden}
    return sample_metadata(rows, targets=targets, **changes)


def hidden_row(row: int, dtype: str, **changes: Any) -> cf.CacheRow:
    rng = np.random.default_rng(100 + row)
    found = sample_row(row, **changes)
    mask = rng.random(len(found.input_ids)) < 0.4
    if row == 3:
        mask[:] = False
    count = int(mask.sum())
    if dtype == "int8":
        states = {layer: rng.integers(-127, 128, (count, WIDTH)).astype(np.int8) for layer in LAYERS}
        scales = {layer: rng.random(count).astype(np.float32) for layer in LAYERS}
    else:
        states = {layer: rng.standard_normal((count, WIDTH)).astype(np.float16) for layer in LAYERS}
        scales = {}
    return cf.CacheRow(**{**vars(found), "hidden": cf.HiddenStates(mask, states, scales)})


def write(path: Path, dtype: str = "float16", **changes: Any) -> list[cf.CacheRow]:
    metadata = hidden_metadata(dtype, **changes)
    rows = [hidden_row(i, dtype, alignment=metadata.alignment) for i in range(metadata.num_rows)]
    with cf.CacheWriter(path, metadata) as writer:
        writer.write(rows)
    return rows


def check_same(found: cf.HiddenStates | None, expected: cf.HiddenStates | None, layers: tuple[int, ...]) -> None:
    assert found is not None and expected is not None and tuple(found.states) == layers
    assert np.array_equal(found.mask, expected.mask)
    for layer in layers:
        assert found.states[layer].dtype == expected.states[layer].dtype
        assert np.array_equal(found.states[layer], expected.states[layer])
        assert np.array_equal(found.values(layer), expected.values(layer))
        assert found.values(layer).dtype == np.float32 and found.values(layer).shape[1] == WIDTH


# ---- stored and read


@pytest.mark.long
@pytest.mark.parametrize("alignment", ["next", "same"])
@pytest.mark.parametrize("encoding", ["columns", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_round_trip(dtype: str, encoding: str, alignment: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "cache", dtype, encoding=encoding, alignment=alignment)
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.hidden == cf.HiddenSpec(layers=LAYERS, teacher_layers=5, width=WIDTH, dtype=dtype, every=2)
    for found, expected in zip(cache, rows, strict=True):
        check_same(found.hidden, expected.hidden, LAYERS)
    cf.verify_cache(tmp_path / "cache", deep=False)
    assert "hidden_2" in cache.column_bytes()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_only_the_layers_that_are_asked_for_are_decoded(dtype: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "cache", dtype)
    one = cf.open_cache(tmp_path / "cache", hidden_layers=[5])
    check_same(one[1].hidden, rows[1].hidden, (5,))
    assert cf.open_cache(tmp_path / "cache", hidden_layers=[])[1].hidden is None
    check_same(pickle.loads(pickle.dumps(one))[4].hidden, rows[4].hidden, (5,))


def test_any_reader_shows_them(tmp_path: Path) -> None:
    rows = write(tmp_path / "cache")
    write(tmp_path / "int8", "int8")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "cache" / SHARD))).read_all()
    expected = rows[1].hidden
    assert expected is not None
    assert np.array_equal(np.array(table["hidden_2"][1].as_py(), np.float16), expected.states[2])
    assert table["hidden_mask"][1].as_py() == expected.mask.tolist()
    frame = polars.from_arrow(table)
    assert np.array_equal(np.array(frame["hidden_2"].to_list()[1], np.float16), expected.states[2])
    integers = pa.ipc.open_file(pa.memory_map(str(tmp_path / "int8" / SHARD))).read_all()
    connection = duckdb.connect()  # which knows no half floats, and refuses a table that has some
    connection.register("integers", integers)
    ((states, scales),) = connection.execute("select hidden_5, hidden_5_scale from integers where row = 1").fetchall()
    of_int8 = hidden_row(1, "int8").hidden
    assert of_int8 is not None
    found = np.array(states, np.float32) * np.array(scales, np.float32)[:, None]
    assert np.array_equal(found, of_int8.values(5))


def test_a_run_that_was_stopped_may_not_go_on_with_other_layers(tmp_path: Path) -> None:
    metadata = hidden_metadata("float16")
    with pytest.raises(KeyboardInterrupt), cf.CacheWriter(tmp_path / "cache", metadata) as writer:
        writer.write([hidden_row(i, "float16") for i in range(4)])
        raise KeyboardInterrupt
    for other in (hidden_metadata("int8"), sample_metadata()):
        with pytest.raises(cf.MismatchError, match="targets.hidden"):
            cf.CacheWriter(tmp_path / "cache", other, resume=True)


# ---- converted


def test_conversion_keeps_or_drops_them(tmp_path: Path) -> None:
    rows = write(tmp_path / "cache")
    for name, conversion in (
        ("kept", cf.Conversion(encoding="packed", rows_per_shard=3)),
        ("dropped", cf.Conversion(drop_hidden=True)),
    ):
        list(cf.convert_cache(tmp_path / "cache", tmp_path / name, conversion))
    for found, expected in zip(cf.open_cache(tmp_path / "kept"), rows, strict=True):
        check_same(found.hidden, expected.hidden, LAYERS)
    dropped = cf.open_cache(tmp_path / "dropped")
    assert dropped.metadata.hidden is None and dropped[0].hidden is None
    assert not any(name.startswith("hidden") for name in dropped.column_bytes())
    assert np.array_equal(dropped[1].targets.ids, rows[1].targets.ids)
    with pytest.raises(cf.MismatchError, match="`drop_hidden=True`: there are no hidden states"):
        list(cf.convert_cache(tmp_path / "dropped", tmp_path / "x", cf.Conversion(drop_hidden=True)))


# ---- refused when written


def changed(row: cf.CacheRow, **changes: Any) -> cf.CacheRow:
    assert row.hidden is not None
    return cf.CacheRow(**{**vars(row), "hidden": cf.HiddenStates(**{**vars(row.hidden), **changes})})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_states_that_are_not_numbers_are_not_written(value: float, tmp_path: Path) -> None:
    rows = [hidden_row(i, "float16") for i in range(2)]
    position = int(np.flatnonzero(rows[1].hidden.mask)[1])
    rows[1].hidden.states[5][1, 3] = value
    with pytest.raises(ValueError, match=f"row 1, position {position}: the hidden state of layer 5 is not finite"):
        cf.CacheWriter(tmp_path / "cache", hidden_metadata("float16")).write(rows)


def test_states_of_another_shape_are_not_written(tmp_path: Path) -> None:
    row = hidden_row(0, "float16")
    states = row.hidden.states
    bad = {
        "its mask names": changed(row, states={layer: each[1:] for layer, each in states.items()}),
        "for 6 positions, expected 7": changed(row, mask=row.hidden.mask[1:]),
        "of width": changed(row, states={layer: each[:, 1:] for layer, each in states.items()}),
        "are float32": changed(row, states={layer: each.astype(np.float32) for layer, each in states.items()}),
        "the metadata name": changed(row, states={2: states[2]}),
        "unlike the metadata": cf.CacheRow(**{**vars(row), "hidden": None}),
    }
    for i, (words, each) in enumerate(bad.items()):
        with pytest.raises(ValueError, match=words):
            cf.CacheWriter(tmp_path / str(i), hidden_metadata("float16", rows_per_record_batch=1)).write([each])
    integers = changed(hidden_row(0, "int8"), scales={})
    with pytest.raises(ValueError, match="scales of layers"):
        cf.CacheWriter(tmp_path / "scales", hidden_metadata("int8", rows_per_record_batch=1)).write([integers])
    pair = [row, cf.CacheRow(**{**vars(hidden_row(1, "float16")), "hidden": None})]
    with pytest.raises(ValueError, match="rows have hidden states of different layers"):
        cf.CacheWriter(tmp_path / "pair", hidden_metadata("float16")).write(pair)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [5, 2]},
        {"layers": []},
        {"layers": [2, 7]},
        {"layers": [-1]},
        {"layers": [1.5]},
        {"width": 0},
        {"width": 10**9},
        {"width": "6"},
        {"dtype": "float64"},
        {"every": 0},
        {"teacher_layers": 10**9},
    ],
    ids=str,
)
def test_specifications_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hidden"):
        cf.HiddenSpec.from_json({**hidden_metadata("int8").targets["hidden"], **changes})


@pytest.mark.long
def test_the_bit_test_for_half_floats_is_that_of_numpy() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
    for value, finite in zip(every, np.isfinite(every[:, 0]), strict=True):
        found = find_invalid_state(cf.HiddenStates(np.ones(1, bool), {0: value[None]}))
        assert (found is None) == finite


# ---- refused when read


def shortened(columns: dict[str, pa.Array], name: str) -> None:
    """One item fewer in the first row that has any."""
    lists = columns[name].to_pylist()
    next(each for each in lists if each).pop()
    columns[name] = pa.array(lists, columns[name].type)


def replaced(columns: dict[str, pa.Array], name: str, value: Any) -> None:
    lists = columns[name].to_pylist()
    first = next(each for each in lists if each)
    first[0] = [value] * WIDTH if isinstance(first[0], list) else value
    columns[name] = pa.array(lists, columns[name].type)


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "fewer states": ("float16", lambda c: shortened(c, "hidden_5"), "for each position of hidden_mask"),
    "fewer scales": ("int8", lambda c: shortened(c, "hidden_2_scale"), "for each position of hidden_mask"),
    "a mask too short": ("float16", lambda c: shortened(c, "hidden_mask"), "hidden_mask and input_ids differ"),
    "infinite": ("float16", lambda c: replaced(c, "hidden_2", float("inf")), "layer 2 is not finite"),
    "a scale that is NaN": ("int8", lambda c: replaced(c, "hidden_5_scale", float("nan")), "layer 5 is not finite"),
    "a scale below 0": ("int8", lambda c: replaced(c, "hidden_5_scale", -1.0), "layer 5 is not finite"),
    "a layer missing": ("float16", lambda c: c.pop("hidden_5"), "columns are not those"),
    "another dtype": (
        "float16",
        lambda c: c.update(hidden_5=c["hidden_5"].cast(pa.list_(pa.list_(pa.float32(), WIDTH)))),
        "columns are not those",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("lie", HOSTILE)
def test_lies_are_found(lie: str, tmp_path: Path) -> None:
    dtype, change, words = HOSTILE[lie]
    write(tmp_path / "cache", dtype)
    forge_shard(tmp_path / "cache", change)
    assert words in complaint(tmp_path / "cache")


def test_states_that_expand_to_more_than_there_are_positions_for(tmp_path: Path) -> None:
    """A mebibyte of zeros is some hundred bytes on disk."""
    write(tmp_path / "cache")

    def bomb(columns: dict[str, pa.Array]) -> None:
        kind = columns["hidden_2"].type
        zeros = pa.array(np.zeros(WIDTH * 2**18, np.float16))
        items = pa.FixedSizeListArray.from_arrays(zeros, type=kind.value_type)
        starts = pa.array([0, *[len(items)] * len(columns["row"])], pa.int32())
        columns["hidden_2"] = pa.ListArray.from_arrays(starts, items, type=kind)

    forge_shard(tmp_path / "cache", bomb)
    assert (tmp_path / "cache" / SHARD).stat().st_size < 100_000
    assert "column hidden_2 expands to more bytes" in complaint(tmp_path / "cache")


def test_buffers_are_counted_as_arrow_writes_them(tmp_path: Path) -> None:
    write(tmp_path / "cache", "int8")
    with pa.memory_map(str(tmp_path / "cache" / SHARD)) as file:
        data = file.read_buffer()
    batches = json.loads((tmp_path / "cache/shards/shard-00000.json").read_text())["record_batches"]
    part = data.slice(batches[0]["start"], batches[0]["stop"] - batches[0]["start"])
    (message,) = message_buffers(part)
    assert sum(buffers_per_column(codec_for(hidden_metadata("int8")).schema).values()) == len(message.compressed)
