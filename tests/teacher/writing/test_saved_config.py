"""distill_config.json of a cache: there before the manifest is, whenever a run is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from cache_format.write.unfinished import UnfinishedCache
from cache_samples import contents
from generating import generate
from runs import build_cache
from tiny import completions, write_jsonl


@pytest.mark.long
@pytest.mark.parametrize("manifest_written", [False, True])
@pytest.mark.parametrize("generated", [False, True])
def test_a_finished_cache_has_it_even_if_its_run_was_killed(
    tmp_path: Path,
    teacher_dir: Path,
    text_file: Path,
    generated: bool,
    manifest_written: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", completions()[:4])

    def run(output: Path) -> dict[str, bytes]:
        if generated:
            generate(teacher_dir, prompts, output, max_new_tokens=4)
        else:
            build_cache(output, teacher_dir, text_file)
        return contents(output)

    def killed(*args: Any) -> None:
        if manifest_written:
            finish(*args)
        raise KeyboardInterrupt

    finish = UnfinishedCache.finish
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnfinishedCache, "finish", killed)
        run(tmp_path / "killed")
    found = contents(tmp_path / "killed")
    assert found["distill_config.json"] == whole["distill_config.json"]
    assert ("manifest.json" in found) is manifest_written
    assert run(tmp_path / "killed") == whole
    cf.verify_cache(tmp_path / "killed")
