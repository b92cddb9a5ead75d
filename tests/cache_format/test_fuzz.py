"""What fuzzing has found worth keeping, again; and single bits flipped (`benchmarks/fuzz.py`, docs/security.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_kept_inputs_are_rows_or_an_error(target: str, tmp_path: Path):
    sound, instead = fuzz.part_of(*fuzz.TARGETS[target])
    assert fuzz.read(instead(sound), tmp_path / "sound")
    kept = fuzz.seeds(target)
    assert len(kept) >= 5
    accepted = [fuzz.read(instead(data), tmp_path / "cache") for data in kept]
    assert not all(accepted)


def test_a_flipped_bit_is_found_or_changes_nothing():
    outcomes = fuzz.flips(201, seed=7)
    assert sum(outcomes.values()) == 201
    for outcome in outcomes:
        assert outcome.endswith(": found, with the file's name") or outcome == "README.md: without effect on any value"


def test_the_search_would_see_a_silent_change(monkeypatch: pytest.MonkeyPatch):
    """With checksums made true again a flip may well change a value."""
    written = Path.write_bytes

    def and_resealed(file: Path, data: bytes) -> int:
        done = written(file, data)
        if file.name.endswith(".arrow"):
            folder = file.parent if file.name == fuzz.LEXICON else file.parent.parent
            if (folder / "manifest.json").exists():
                files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
                for name, sealed in fuzz.resealed(files).items():
                    written(folder / name, sealed)
        return done

    monkeypatch.setattr(Path, "write_bytes", and_resealed)
    assert any(outcome.endswith("SILENT CHANGE") for outcome in fuzz.flips(100, seed=1))
