"""Both encodings on the command line: captured, converted, and read by every other command alike."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cache_format as cf
from cache_samples import contents
from cli import main
from pipeline.commands import convert_command
from runs import command as run
from runs import distance, weights


def capture(output: Path, teacher: Path, text: Path, *more: object) -> dict[str, Any]:
    words = ["cache-teacher", "--teacher", teacher, "--data", text, "--output", output, "--seq-len", 48]
    words += ["--sample-by", "line", "--rows-per-shard", 16, "--device", "cpu", "--json"]
    return json.loads(run(*words, *more).stdout)


KINDS = {"top-k": ["--top-k", 16], "threshold": ["--targets", "threshold", "--tail-threshold", 0.1, "--samples", 2]}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind of targets in both encodings, both captured. Do not write into them."""
    folder = tmp_path_factory.mktemp("encodings")
    for kind, words in KINDS.items():
        for encoding in ("columns", "packed"):
            capture(folder / f"{kind}-{encoding}", teacher_dir, text_file, *words, "--encoding", encoding)
    return folder


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "shards").glob("*.arrow")}


# -- help and usage ---------------------------------------------------------------------------------------------------


def test_help_says_what_stays_and_gives_an_example():
    text = " ".join(run("convert", "--help").stdout.split())
    assert "Usage: main convert [OPTIONS] CACHE OUTPUT" in text
    for option in ("--encoding", "--compression-level", "--levels", "--top-k", "--samples", "--rows-per-shard"):
        assert option in text
    assert (
        "Everything that no option changes stays the same." in text
        and "After an interruption, the same command continues" in text
    )
    assert "distill convert caches/train caches/train-packed --encoding packed" in text
    assert "--encoding [columns|packed]" in run("cache-teacher", "--help-all").stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--encoding", "zip"],
        ["--top-k", 0],
        ["--top-k", "many"],
        ["--levels", 257],
        ["--samples", 0],
        ["--compression-level", 23],
        ["--rows-per-shard", 0],
        ["--targets", "top-k"],
    ],
)
def test_wrong_usage(folder: Path, tmp_path: Path, words: list[object]):
    places = [folder / "top-k-columns", tmp_path / "output"] if words else [folder / "top-k-columns"]
    result = run("convert", *places, *words, status=2)
    assert "Usage: " in result.stderr and not (tmp_path / "output").exists()


# -- results ----------------------------------------------------------------------------------------------------------


def test_result_for_people(folder: Path, tmp_path: Path):
    source, output = folder / "top-k-columns", tmp_path / "packed"
    result = run("convert", source, output, "--encoding", "packed")
    cache = cf.open_cache(output)
    assert f"Converted {output}" in result.stdout
    assert f"{len(cache):,}" in result.stdout and f"{cache.num_tokens:,}" in result.stdout
    for path in (source, output):
        per_token = cf.open_cache(path).manifest.stored_bytes / cache.num_tokens
        assert f"{per_token:.1f} bytes per token" in result.stdout


def test_result_for_scripts(folder: Path, tmp_path: Path):
    source, output = folder / "threshold-columns", tmp_path / "packed"
    data = json.loads(run("convert", source, output, "--encoding", "packed", "--json").stdout)
    cache = cf.open_cache(output)
    sizes = {str(path): cf.open_cache(path).manifest.stored_bytes for path in (source, output)}
    assert data == {"rows": len(cache), "tokens": cache.num_tokens, "bytes": sizes}
    on_disk = [*(output / "shards").glob("*.arrow"), output / "lexicon.arrow"]
    assert sizes[str(output)] == sum(file.stat().st_size for file in on_disk)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_captured_and_converted_are_the_same(folder: Path, tmp_path: Path, kind: str):
    """To the byte, whichever came first."""
    columns, packed = folder / f"{kind}-columns", folder / f"{kind}-packed"
    before = contents(columns), contents(packed)
    run("convert", columns, tmp_path / "packed", "--encoding", "packed")
    run("convert", packed, tmp_path / "columns", "--encoding", "columns")
    assert shards(tmp_path / "packed") == shards(packed) and shards(tmp_path / "columns") == shards(columns)
    assert (tmp_path / "packed/lexicon.arrow").read_bytes() == (packed / "lexicon.arrow").read_bytes()
    assert (contents(columns), contents(packed)) == before


@pytest.mark.long
def test_several_changes_at_once(folder: Path, tmp_path: Path):
    words = ["--top-k", 4, "--levels", 64, "--rows-per-shard", 5, "--rows-per-record-batch", 2]
    run("convert", folder / "top-k-columns", tmp_path / "few", *words, "--compression-level", 1, "--encoding", "packed")
    metadata = cf.open_cache(tmp_path / "few").metadata
    assert (metadata.max_entries, metadata.rows_per_shard, metadata.rows_per_record_batch) == (4, 5, 2)
    assert len(metadata.codebooks["target_logprobs"].values) == 64 and metadata.compression["level"] == 1
    run("convert", folder / "threshold-packed", tmp_path / "one", "--samples", 1)
    metadata = cf.open_cache(tmp_path / "one").metadata
    assert metadata.num_samples == 1 and metadata.encoding == "packed"
    run("convert", folder / "threshold-packed", tmp_path / "thin", "--samples", 1, "--tail-threshold", 0.3)
    metadata = cf.open_cache(tmp_path / "thin").metadata
    assert (metadata.num_samples, metadata.targets["tail_threshold"]) == (1, 0.3)
    for name in ("few", "one", "thin"):
        assert "intact" in run("verify", tmp_path / name, "--deep").stdout


@pytest.mark.long
def test_a_student_learns_from_a_thinned_cache(folder: Path, tmp_path: Path, student_dir: Path):
    """With the loss of threshold targets; the KL that is logged is that of the whole cache, but for the draws."""
    run("convert", folder / "threshold-columns", tmp_path / "thin", "--tail-threshold", 0.2)
    found = {}
    for path in (folder / "threshold-columns", tmp_path / "thin"):
        shown = run("evaluate", "--cache", path, "--student", student_dir, "--device", "cpu", "--json").stdout
        found[path] = json.loads(shown)["students"][str(student_dir)]
    whole, thin = found.values()
    assert thin["kl"] == pytest.approx(whole["kl"], rel=0.1) and thin["kl"] != whole["kl"]
    assert thin["ce"] == pytest.approx(whole["ce"]) and thin["agreement"] == whole["agreement"]
    words = [
        "--cache",
        tmp_path / "thin",
        "--student",
        student_dir,
        "--output",
        tmp_path / "student",
        "--device",
        "cpu",
    ]
    run("train-student", *words, "--max-steps", 2)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS = {
    "entries of a sample": ("threshold-packed", ["--top-k", 4], "--top-k: threshold targets are unbiased only with"),
    "more entries": ("top-k-columns", ["--top-k", 17], "--top-k 17: found up to 16 entries"),
    "samples of none": ("top-k-columns", ["--samples", 1], "--samples 1: top-k targets have none"),
    "more samples": ("threshold-columns", ["--samples", 3], "--samples 3: found 2 per position"),
    "no cache": ("nowhere", ["--encoding", "packed"], "no such directory"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_one_line(folder: Path, tmp_path: Path, name: str):
    source, words, expected = REFUSALS[name]
    result = run("convert", folder / source, tmp_path / "output", *words, status=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {folder / source}") and expected in line and result.stdout == ""
    assert not (tmp_path / "output").exists()


def test_every_number_of_levels_that_is_offered_works_or_is_refused(folder: Path, tmp_path: Path):
    option = next(option for option in convert_command.command.params if option.name == "levels")
    for levels in (option.type.min, option.type.max):
        words = ["convert", folder / "top-k-columns", tmp_path / str(levels), "--levels", levels]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0 or result.stderr.startswith("Error: "), result.exc_info


def test_places_that_are_taken(folder: Path, tmp_path: Path):
    source = shutil.copytree(folder / "top-k-columns", tmp_path / "source")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("years of work")
    run("convert", source, tmp_path / "finished", "--encoding", "packed")
    before = contents(tmp_path)
    for output, expected in (
        ("foreign", "thesis.tex"),
        ("finished", "found a finished cache"),
        ("source", "is the cache"),
    ):
        result = run("convert", source, tmp_path / output, "--encoding", "packed", status=1)
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ") and expected in line
        assert contents(tmp_path) == before


def test_a_damaged_source(folder: Path, tmp_path: Path):
    source = shutil.copytree(folder / "top-k-packed", tmp_path / "source")
    (source / "lexicon.arrow").write_bytes(b"")
    result = run("convert", source, tmp_path / "output", "--encoding", "columns", status=1)
    assert result.stderr.splitlines()[-1].startswith(f"Error: {source}/lexicon.arrow: checksum")
    assert not (tmp_path / "output/manifest.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_and_continued(folder: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    source, whole, parts = folder / "top-k-columns", tmp_path / "whole", tmp_path / "parts"
    words = ["--encoding", "packed", "--rows-per-shard", 8, "--rows-per-record-batch", 4]
    run("convert", source, whole, *words)
    write = cf.CacheWriter.write

    def interrupt(writer: cf.CacheWriter, rows: list[cf.CacheRow]) -> None:
        write(writer, rows)
        if writer.next_row >= 12:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(cf.CacheWriter, "write", interrupt)
        result = run("convert", source, parts, *words, status=130)
    assert result.stderr.splitlines()[-1] == (
        f"Interrupted: complete shards are kept in {parts}. Run the same command again to continue."
    )
    assert not (parts / "manifest.json").exists()
    assert 0 < len(shards(parts)) < len(shards(whole))
    run("convert", source, parts, *words)
    assert contents(parts) == contents(whole)


# -- a packed cache in every other command ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_capture_reports_the_same(folder: Path, tmp_path: Path, teacher_dir: Path, text_file: Path, kind: str):
    found = {}
    for encoding in ("columns", "packed"):
        path = tmp_path / encoding
        found[encoding] = capture(path, teacher_dir, text_file, *KINDS[kind], "--encoding", encoding)
        assert contents(path) == contents(folder / f"{kind}-{encoding}")
        assert found[encoding]["bytes"] == cf.open_cache(path).manifest.stored_bytes
    different = {name for name in found["columns"] if found["columns"][name] != found["packed"][name]}
    assert different <= {"output", "bytes", "seconds", "tokens_per_s"}


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_shows_the_same(folder: Path, kind: str):
    for row in (0, -1):
        words = ["--row", row, "--json", "--candidates", 8]
        columns, packed = (run("inspect", folder / f"{kind}-{e}", *words).stdout for e in ("columns", "packed"))
        assert json.loads(columns) == json.loads(packed) and json.loads(columns)["positions"]


@pytest.mark.parametrize("kind", KINDS)
def test_stats_are_the_same_but_for_sizes(folder: Path, kind: str):
    columns, packed = (json.loads(run("stats", folder / f"{kind}-{e}", "--json").stdout) for e in ("columns", "packed"))
    sizes = {"path", "bytes", "bytes_per_token"}
    sizes |= {f"{part}_bytes_per_token" for part in ("column", "beside", "stream", "stream_entropy")}
    assert {name for name in columns if columns[name] != packed[name]} == sizes
    assert set(packed["column_bytes_per_token"]) == {"row", "input_ids", "loss_mask", "segment_lengths", "packed"}
    assert packed["bytes"] == cf.open_cache(folder / f"{kind}-packed").manifest.stored_bytes
    assert "packed" in run("stats", folder / f"{kind}-packed").stdout


@pytest.mark.parametrize("kind", KINDS)
def test_verify_counts_the_same(folder: Path, kind: str):
    columns, packed = (
        json.loads(run("verify", folder / f"{kind}-{e}", "--json").stdout) for e in ("columns", "packed")
    )
    assert columns.pop("bytes") != packed.pop("bytes")
    assert columns == packed and columns["ok"] is True


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_the_same(folder: Path, tmp_path: Path, student_dir: Path, kind: str):
    """The same weights to the last bit, the same evaluation to the last digit."""
    words = ["train-student", "--student", student_dir, "--device", "cpu", "--max-steps", 3, "--learning-rate", 0.01]
    words += ["--resample"] if kind == "threshold" else []
    evaluations = {}
    for encoding in ("columns", "packed"):
        cache, output = folder / f"{kind}-{encoding}", tmp_path / encoding
        run(*words, "--cache", cache, "--output", output)
        result = run("evaluate", "--cache", cache, "--student", tmp_path / "columns", "--device", "cpu", "--json")
        (evaluations[encoding],) = json.loads(result.stdout)["students"].values()
    assert distance(weights(tmp_path / "columns"), weights(tmp_path / "packed")) == 0.0
    columns, packed = ({k: v for k, v in e.items() if "second" not in k} for e in evaluations.values())
    assert columns == packed and columns["kl"] > 0
