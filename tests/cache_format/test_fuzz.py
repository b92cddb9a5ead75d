"""What fuzzing has found worth keeping, again; and single bits flipped (`benchmarks/fuzz.py`, docs/security.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import cache_format as cf
from benchmarks import fuzz, fuzzed


@pytest.mark.long
@pytest.mark.parametrize("target", fuzzed.TARGETS)
def test_kept_inputs_are_rows_or_an_error(target: str, tmp_path: Path):
    sound, instead = fuzzed.part_of(*fuzzed.TARGETS[target])
    assert fuzzed.read(instead(sound), tmp_path / "sound")
    kept = fuzz.seeds(target)
    assert len(kept) >= 5
    accepted = [fuzzed.read(instead(data), tmp_path / "cache") for data in kept]
    assert not all(accepted)


def test_a_flipped_bit_is_found_in_the_file_that_it_is_in():
    outcomes = fuzz.flips(201, seed=7)
    assert sum(outcomes.values()) == 201
    expected = {"manifest.json", fuzzed.SHARD, fuzzed.SIDECAR, fuzzed.LEXICON, cf.HEAD}
    assert {outcome.partition(": ")[0] for outcome in outcomes} >= expected
    assert [outcome for outcome in outcomes if not outcome.endswith(f": {fuzz.FOUND}")] == []


def test_the_command_counts_flips(tmp_path: Path):
    words = ["flips", "--count", "3", "--results", str(tmp_path)]
    finished = CliRunner().invoke(fuzz.main, words, catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    assert json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))["summary"]["flips"] == 3


def test_another_file_than_the_damaged_one_does_not_count(tmp_path: Path):
    """A shard and its sidecar differ in the ending of their names only, and advice names the shard."""
    for name, data in fuzzed.sound_cache("columns").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    expected = fuzz.values(tmp_path)
    (tmp_path / fuzzed.SIDECAR).write_bytes((tmp_path / fuzzed.SIDECAR).read_bytes() + b" ")
    assert fuzz._outcome(tmp_path, fuzzed.SIDECAR, expected) == fuzz.FOUND
    assert fuzz._outcome(tmp_path, fuzzed.SHARD, expected).startswith("found, FILE NOT NAMED")


@pytest.mark.long
def test_the_search_would_see_a_silent_change(monkeypatch: pytest.MonkeyPatch):
    """With checksums made true again a flip may well change a value."""
    written = Path.write_bytes

    def and_resealed(file: Path, data: bytes) -> int:
        done = written(file, data)
        if file.name.endswith(".arrow"):
            folder = file.parent if file.name == fuzzed.LEXICON else file.parent.parent
            if (folder / "manifest.json").exists():
                files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
                for name, sealed in fuzzed.resealed(files).items():
                    written(folder / name, sealed)
        return done

    monkeypatch.setattr(Path, "write_bytes", and_resealed)
    assert any(outcome.endswith("SILENT CHANGE") for outcome in fuzz.flips(100, seed=1))
