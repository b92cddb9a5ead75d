"""Import: resumed, repeated, refused. Export: and what import makes of it. Students: as from a cache of our own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import cache_format as cf
import distill
from foreign_files import (
    NESTED,
    Kit,
    check_entries,
    encode,
    import_rows,
    made_up_rows,
    nested,
    pack,
    write_lines,
    write_parquet,
)
from made_up import THRESHOLD, made_up
from pipeline.errors import ConfigError, DataError
from pipeline.importing import import_cache as importing
from pipeline.importing.export_cache import export_cache
from runs import SGD, build_cache, command, distance, train, weights
from torture import contents

K = 6
# ---- import: stops and repetitions


@pytest.mark.long
def test_an_interrupted_import_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    rows = made_up_rows(20)
    source = write_parquet(tmp_path / "rows.parquet", nested(rows, K))
    options = {**NESTED, "rows_per_shard": 4}
    whole, _ = import_rows(source, tmp_path / "whole", tokenizer, **options)
    write = cf.CacheWriter.write

    def stopping(writer: cf.CacheWriter, batch: list[cf.CacheRow]) -> None:
        if batch[0].row == 10:
            raise KeyboardInterrupt
        write(writer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(cf.CacheWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            import_rows(source, tmp_path / "cache", tokenizer, **options)
    assert not (tmp_path / "cache/manifest.json").exists()
    decoded: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(cf.CacheWriter, "write", lambda w, batch: (decoded.append(batch[0].row), write(w, batch)))
        import_rows(source, tmp_path / "cache", tokenizer, **options)
    assert decoded == list(range(8, 20))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    check_entries(whole, rows, K)


def test_a_finished_import_is_left_alone(tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(3), K))
    import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")} == before
    with pytest.raises(cf.MismatchError):
        import_rows(source, tmp_path / "cache", tokenizer, **NESTED, top_k=2)
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **NESTED, top_k=2, overwrite=True)
    assert cache.metadata.max_entries == 2


@pytest.mark.parametrize("what", ["values", "entries", "mask", "segments"])
def test_an_import_of_a_changed_source_is_not_continued(
    what: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    """Same text, so that only the digest of the rows tells the sources apart."""
    columns = nested(made_up_rows(4), K)
    columns |= {"mask": [[1] * 40 for _ in range(4)], "segments": [[1] * 40 for _ in range(4)]}
    roles = f"{NESTED['column'][0]} mask=mask attention=segments"
    options = {**NESTED, "column": (roles,), "rows_per_shard": 1}
    source = write_parquet(tmp_path / "rows.parquet", columns)
    import_rows(source, tmp_path / "finished", tokenizer, **options)
    write = cf.CacheWriter.write

    def stopping(writer: cf.CacheWriter, batch: list[cf.CacheRow]) -> None:
        if batch[0].row == 2:
            raise KeyboardInterrupt
        write(writer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(cf.CacheWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            import_rows(source, tmp_path / "begun", tokenizer, **options)
    row = 1  # complete in both caches
    if what == "values":
        columns["logprobs"][row] = [[value - 0.7 for value in values] for values in columns["logprobs"][row]]
    elif what == "entries":
        unlisted = next(i for i in range(400) if i not in columns["top"][row][7])
        columns["top"][row][7][-1] = unlisted
    else:
        columns[what][row][20:] = [0 if what == "mask" else 2] * 20
    write_parquet(source, columns)
    for name in ("begun", "finished"):
        with pytest.raises(cf.MismatchError, match="rows_sha256"):
            import_rows(source, tmp_path / name, tokenizer, **options)
    again, _ = import_rows(source, tmp_path / "finished", tokenizer, **options, overwrite=True)
    assert again.metadata.capture["imported"]["shift"] == 0


def test_the_shift_is_among_the_settings(tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(2, length=20), K))
    import_rows(source, tmp_path / "cache", tokenizer, **{**NESTED, "shift": 1})
    with pytest.raises(cf.MismatchError, match=r"capture\.imported\.shift recorded 1, given 0"):
        import_rows(source, tmp_path / "cache", tokenizer, **NESTED)


def test_a_finished_import_of_older_versions_is_left_alone(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    """One that was made with other libraries, and by a version that recorded neither `shift` nor a digest."""
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(3), K))
    make = importing.import_metadata

    def older(*arguments: Any) -> cf.CacheMetadata:
        metadata = make(*arguments)
        imported = metadata.capture["imported"]
        known = {name: imported[name] for name in imported if name not in ("shift", "rows_sha256")}
        return replace(metadata, capture={"imported": known}, libraries={**metadata.libraries, "numpy": "1.0"})

    with monkeypatch.context() as patched:
        patched.setattr(importing, "import_metadata", older)
        import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    before = contents(tmp_path / "cache")
    import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    assert contents(tmp_path / "cache") == before
    with pytest.raises(cf.MismatchError, match=r"top_k"):
        import_rows(source, tmp_path / "cache", tokenizer, **NESTED, top_k=2)


def test_a_directory_of_something_else_is_refused_before_reading(tmp_path: Path, tokenizer: Any):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("x")
    with pytest.raises(cf.CacheError, match=r"thesis\.tex"):
        import_rows(tmp_path / "none.parquet", tmp_path / "cache", tokenizer, **NESTED)


def test_numbers_of_an_imported_cache_are_plausible(tmp_path: Path, tokenizer: Any):
    """`verify --deep` finds that mass, tail and the bound on the entropy can belong to one distribution."""
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(3, boost=2.0), K))
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **NESTED)
    cf.verify_cache(cache.path, deep=True)
    row = cache[0]
    ids, logprobs = row.targets.at(4)
    least = (
        -(np.exp(logprobs) * logprobs).sum() - np.exp(row.targets.residual_logprob[4]) * row.targets.residual_logprob[4]
    )
    assert abs(row.targets.entropy[4] - least) < 0.25  # 64 values
    assert not cache.metadata.entropy_known


# ---- export


@pytest.mark.long
@pytest.mark.parametrize("format", ["parquet", "axolotl"])
def test_export_and_import_give_the_same_entries(
    format: str, tmp_path: Path, teacher_dir: Path, text_file: Path, tokenizer: Any
):
    own = cf.open_cache(build_cache(tmp_path / "own", teacher_dir, text_file, rows_per_shard=8))
    summary = export_cache(own.path, str(tmp_path / "files"), format)
    assert summary.rows == len(own) and summary.files == own.metadata.num_shards > 1
    again, _ = import_rows(tmp_path / "files", tmp_path / "cache", tokenizer)
    assert len(again) == len(own) and again.metadata.targets["k"] == 16
    for theirs, ours in zip(again, own, strict=True):
        for name in ("input_ids", "loss_mask", "segment_lengths"):
            assert getattr(theirs, name).tolist() == getattr(ours, name).tolist()
        kept = np.repeat(ours.loss_mask, ours.targets.counts)
        assert theirs.targets.ids.tolist() == ours.targets.ids[kept].tolist()
        assert theirs.targets.logprobs.tolist() == ours.targets.logprobs[kept].tolist()


@pytest.mark.parametrize("format", ["parquet", "axolotl"])
def test_export_and_import_keep_what_the_columns_do_not_say(format: str, tmp_path: Path, tokenizer: Any):
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(3), K))
    options = {**NESTED, "values": "renormalised", "temperature": 2.0, "teacher": "ours"}
    first, _ = import_rows(source, tmp_path / "cache", tokenizer, **options, rows_per_shard=2)
    export_cache(first.path, str(tmp_path / "files"), format)
    again, summary = import_rows(tmp_path / "files", tmp_path / "again", tokenizer)
    assert summary.renormalised and again.metadata.targets == first.metadata.targets
    assert again.metadata.targets["temperature"] == 2.0 and again.metadata.teacher == {"name": "ours"}
    for name, given in (("values", "logprobs"), ("temperature", 1.0)):
        with pytest.raises(ConfigError, match=f"^`{name}` {given}: .*Leave it out"):
            import_rows(tmp_path / "files", tmp_path / "other", tokenizer, **{name: given})
    export_cache(
        import_rows(source, tmp_path / "plain", tokenizer, **NESTED)[0].path, str(tmp_path / "plain-files"), format
    )
    (tmp_path / "plain-files/part-00000.parquet").rename(tmp_path / "files/part-00002.parquet")
    with pytest.raises(DataError, match="part-00002.parquet: not of the same export"):
        import_rows(tmp_path / "files", tmp_path / "other", tokenizer)


@pytest.mark.parametrize("format", ["parquet", "axolotl"])
def test_probabilities_that_rounding_moved_above_1_are_imported_again(format: str, tmp_path: Path, tokenizer: Any):
    """32 equal tokens: the codebook's value next to 1/32 is 5.8 % larger."""
    rng = np.random.default_rng(0)
    columns = {
        "tokens": [rng.integers(5, 400, 20).tolist()],
        "top": [[rng.permutation(400)[:32].tolist() for _ in range(20)]],
        "logprobs": [[[float(np.log(1 / 32))] * 32] * 20],
    }
    first, _ = import_rows(write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED)
    assert np.exp(first[0].targets.at(0)[1]).sum() > 1.05
    export_cache(first.path, str(tmp_path / "files"), format)
    again, summary = import_rows(tmp_path / "files", tmp_path / "again", tokenizer)
    assert again[0].targets.logprobs.tolist() == first[0].targets.logprobs.tolist()
    assert summary.changed["positions whose probabilities summed to more than 1"] == 19
    columns["logprobs"] = [[[float(np.log(1.058 / 32))] * 32] * 20]  # of another program
    with pytest.raises(DataError, match=r"sum to 1\.058, expected at most 1\.02"):
        import_rows(write_parquet(tmp_path / "b.parquet", columns), tmp_path / "other", tokenizer, **NESTED)


def test_prepared_columns_of_axolotl(tmp_path: Path):
    cache = made_up(tmp_path / "cache", rows=5, share=0.5)
    export_cache(cache.path, str(tmp_path / "files"), "axolotl")
    rows = pq.read_table(tmp_path / "files").to_pylist()
    for made, row in zip(cache, rows, strict=True):
        tokens = len(made.input_ids)
        assert list(row) == [
            "input_ids",
            "labels",
            "attention_mask",
            "target_token_ids",
            "target_logprobs",
            "target_mask",
        ]
        assert {name: len(values) for name, values in row.items()} == dict.fromkeys(row, tokens)
        assert {len(each) for each in row["target_logprobs"]} == {cache.metadata.max_entries}
        for t in range(tokens):
            predicted = t > 0 and bool(made.loss_mask[t - 1])
            assert row["labels"][t] == (made.input_ids[t] if predicted else -100)
            assert row["target_mask"][t] == [int(made.loss_mask[t])] * 2
            if made.loss_mask[t]:
                assert row["target_logprobs"][t] == sorted(row["target_logprobs"][t], reverse=True)
                assert set(row["target_token_ids"][t]) == set(made.targets.at(t)[0].tolist())


def test_what_cannot_be_exported(tmp_path: Path):
    sampled = made_up(tmp_path / "sampled", rows=2, targets=THRESHOLD)
    with pytest.raises(cf.MismatchError, match="weights, and not log-probabilities"):
        export_cache(sampled.path, str(tmp_path / "files"), "parquet")
    plain = made_up(tmp_path / "plain", rows=2)
    with pytest.raises(ConfigError, match="`format` csv"):
        export_cache(plain.path, str(tmp_path / "files"), "csv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(cf.CacheError, match="expected an empty directory or none"):
        export_cache(plain.path, str(tmp_path / "full"), "parquet")


# ---- students


@pytest.mark.long
def test_students_of_both_caches_are_the_same(
    tmp_path: Path,
    teacher_dir: Path,
    student_dir: Path,
    text_file: Path,
    tokenizer: Any,
    raw_rows: list[cf.CacheRow],
):
    """A DistillKit file of the teacher's lists in float32, and our own cache of the same teacher, text and K."""
    own = cf.open_cache(build_cache(tmp_path / "own", teacher_dir, text_file, top_k=8))
    kit = Kit(k=8, exact_k=8, delta=False)
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "compressed_logprobs": []}
    columns["bytepacked_indices"] = []
    for row in raw_rows:
        targets = row.targets.sorted_by_probability()
        ids, values = np.tile(np.arange(8), (len(row.input_ids), 1)), np.full((len(row.input_ids), 8), -5.0)
        for t in np.flatnonzero(row.loss_mask):
            ids[t], values[t] = targets.at(t)
        columns["input_ids"].append(row.input_ids.tolist())
        documents = np.arange(1, 1 + len(row.segment_lengths))
        columns["attention_mask"].append(np.repeat(documents, row.segment_lengths).tolist())
        columns["compressed_logprobs"].append(encode(values, kit).tolist())
        columns["bytepacked_indices"].append(pack(ids, 9).tolist())
    write_parquet(tmp_path / "data/data.parquet", columns)
    (tmp_path / "data/compression_config.yaml").write_text(yaml.safe_dump(kit.to_yaml()))
    imported, _ = import_rows(tmp_path / "data", tmp_path / "imported", tokenizer, rows_per_shard=32)
    for ours, theirs in zip(own, imported, strict=True):
        assert theirs.loss_mask.tolist() == ours.loss_mask.tolist()
        kept = np.repeat(ours.loss_mask, ours.targets.counts)
        assert theirs.targets.ids.tolist() == ours.targets.ids[kept].tolist()
        assert theirs.targets.logprobs.tolist() == ours.targets.logprobs[kept].tolist()
    options: dict[str, Any] = {"student": student_dir, "epochs": 1, "batch_size": 4, "learning_rate": 0.5}
    for name, cache in (("a", own), ("b", imported)):
        train(tmp_path / name, Path(cache.path), arguments=SGD, **options)
    assert distance(weights(student_dir), weights(tmp_path / "a")) > 1e-2
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) < 2e-5


@pytest.fixture(scope="module")
def renormalised(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> cf.Cache:
    folder = tmp_path_factory.mktemp("renormalised")
    source = write_parquet(folder / "rows.parquet", nested(made_up_rows(8), K))
    return import_rows(source, folder / "cache", tokenizer, **{**NESTED, "values": "renormalised"})[0]


def test_renormalised_targets_train_on_their_entries_only(renormalised: cf.Cache, student_dir: Path, tmp_path: Path):
    summary = train(tmp_path / "default", Path(renormalised.path), student=student_dir, epochs=1, batch_size=4)
    assert summary.kl_estimate_kind is None
    found = distill.evaluate(renormalised.path, student_dir, device="cpu")
    assert found.kl_estimate_kind == "entries only"
    explicit = train(
        tmp_path / "explicit", Path(renormalised.path), student=student_dir, epochs=1, batch_size=4, tail="renormalise"
    )
    assert explicit is not None
    assert distance(weights(tmp_path / "default"), weights(tmp_path / "explicit")) == 0.0


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"tail": "bucket"}, "tail mass is unknown"),
        ({"tail": "label"}, "tail mass is unknown"),
        ({"position_weighting": "teacher-entropy"}, "only lower bounds of the teacher's entropies"),
    ],
)
def test_losses_that_need_what_is_unknown_are_refused(
    options: dict[str, str], reason: str, renormalised: cf.Cache, student_dir: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=reason) as caught:
        train(tmp_path / "student", Path(renormalised.path), student=student_dir, **options)
    assert caught.value.field == next(iter(options))


def test_targets_that_no_rule_chooses_are_not_compared_with_a_teacher(
    renormalised: cf.Cache, teacher_dir: Path, tmp_path: Path, tokenizer: Any
):
    columns = nested(made_up_rows(2), K)
    columns["top"][1][3].pop()
    columns["logprobs"][1][3].pop()
    uneven, _ = import_rows(write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer, **NESTED)
    assert uneven.metadata.targets.get("k") is None and uneven.metadata.max_entries == K
    for cache, what in ((uneven, "lists of different lengths"), (renormalised, "renormalised values")):
        with pytest.raises(ConfigError, match=what):
            distill.verify(cache.path, against_teacher=teacher_dir, device="cpu")


# ---- command line and functions


def test_command_line(tmp_path: Path, teacher_dir: Path):
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(3), K))
    options = ["--column", NESTED["column"][0], "--values", "logprobs", "--shift", "0", "--tokenizer", teacher_dir]
    result = command("import", source, "--output", tmp_path / "cache", *options)
    assert "117 of them loss tokens" in result.output
    shown = command("import", source, "--output", tmp_path / "cache", *options, "--json")
    assert json.loads(shown.stdout)["rows"] == 3
    again = command("import", "--config", tmp_path / "cache", "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "cache"), again.output
    stats = command("stats", tmp_path / "cache").output
    assert "mean at least" in stats
    command("export", tmp_path / "cache", "--output", tmp_path / "files")
    wrong = command(
        "import", source, "--output", tmp_path / "wrong", *options[:-4], "--shift", "1", *options[-2:], status=1
    )
    assert "Use --shift 0 if you gave 1" in wrong.stderr


def test_functions(tmp_path: Path, tokenizer: Any):
    source = write_lines(
        tmp_path / "rows.jsonl",
        [dict(zip(c, v, strict=True)) for c in [nested(made_up_rows(3), K)] for v in zip(*c.values(), strict=True)],
    )
    seen: list[distill.Progress] = []
    summary = distill.import_cache(source, tmp_path / "cache", tokenizer=tokenizer, **NESTED, on_progress=seen.append)
    assert summary.rows == 3 and seen[-1].done == seen[-1].total == 3
    assert distill.export_cache(tmp_path / "cache", tmp_path / "files").rows == 3
