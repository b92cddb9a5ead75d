"""Several processes and machines before one output: who is refused, by which name things go, and who finishes."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

import cache_format as cf
from cache_format.storage.claims import this_process
from cache_samples import contents
from generating import generate
from pipeline.student.training.trainer import DistillTrainer
from pipeline.teacher.engines.answer_writer import AnswerWriter
from runs import build_cache, distance, train, weights
from runs import command as run
from tiny import completions, write_jsonl


def without_config(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the options as the user wrote them, which spell paths in their own way."""
    assert "distill_config.json" in files
    return {name: data for name, data in files.items() if name != "distill_config.json"}


def capture(teacher: object, text: object, output: object, *more: object) -> list[object]:
    words: list[Any] = ["cache-teacher", "--teacher", teacher, "--data", text, "--output", output, "--seq-len", 48]
    return [*words, "--sample-by", "line", "--rows-per-shard", 16, "--top-k", 8, "--device", "cpu", *more]


# -- claims of machines that are gone ---------------------------------------------------------------------------------


def test_writer_elsewhere_counts_as_gone_when_the_user_says_so(tmp_path: Path, teacher_dir: Path, text_file: Path):
    """A plain run, its --overwrite, and merge; silent for 74 seconds, which is less than the default."""
    words = capture(teacher_dir, text_file, tmp_path / "cache")

    def claimed() -> None:
        claim = tmp_path / "cache" / "claims" / "all.0.json"
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.write_text(json.dumps(asdict(replace(this_process(), host="other", machine="another boot", pid=1))))
        os.utime(claim, (time.time() - 74, time.time() - 74))

    claimed()
    line = run(*words, status=1).stderr.splitlines()[-1]
    assert "seconds ago" in line and "its claim ends 5 minutes after" in line
    assert "is gone; this run takes over" in run(*words, "--stale-after", 10).stderr
    assert "(--stale-after)" in line
    claimed()
    assert run(*words, "--overwrite", status=1).stderr.count("--stale-after") == 1
    run(*words, "--overwrite", "--stale-after", 10)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.rename(tmp_path / "cache" / "manifest.partial.json")
    claimed()
    assert "writes this cache" in run("merge", tmp_path / "cache", status=1).stderr
    run("merge", tmp_path / "cache", "--stale-after", 10)
    assert cf.verify_cache(tmp_path / "cache").rows > 0


# -- the same things by other names -----------------------------------------------------------------------------------


@pytest.mark.long
def test_another_spelling_of_the_same_files_goes_on_with_the_run(
    tmp_path: Path, teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Absolute, relative, with a slash, and under another mount with other times; shards and manifest are the first
    one's, whoever goes on."""
    shutil.copytree(teacher_dir, tmp_path / "mount" / "weights")
    shutil.copy(text_file, tmp_path / "mount" / "corpus.txt")
    os.utime(tmp_path / "mount" / "corpus.txt", (1, 1))
    (tmp_path / "text.txt").symlink_to(text_file)
    (tmp_path / "teacher").symlink_to(teacher_dir)
    monkeypatch.chdir(tmp_path)
    run(*capture("teacher", "text.txt", "whole"))
    expected = contents(tmp_path / "whole")
    spellings = [
        ("teacher/", tmp_path / "text.txt"),
        (teacher_dir, "./text.txt"),
        ("mount/weights", "mount/corpus.txt"),
    ]
    for i, (teacher, text) in enumerate(spellings):
        output = tmp_path / f"begun-{i}"
        run(*capture("teacher", "text.txt", output, "--shard-range", "0:1"))
        run(*capture(teacher, text, output))
        assert without_config(contents(output)) == without_config(expected)
    assert "none: everything was there" in run(*capture("mount/weights/", "mount/corpus.txt", "whole")).stdout
    assert contents(tmp_path / "whole") == expected


def test_other_weights_or_tokens_are_refused_by_whatever_name(
    tmp_path: Path, teacher_dir: Path, padded_teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_dir, "weights")
    shutil.copy(text_file, "text.txt")
    run(*capture("weights", "text.txt", "begun", "--shard-range", "0:1"))
    run(*capture("weights", "text.txt", "whole"))
    before = {name: contents(tmp_path / name) for name in ("begun", "whole")}
    (tmp_path / "other.txt").write_text(text_file.read_text().replace("the", "a", 1))
    for name in before:
        line = run(*capture("weights", "other.txt", name), status=1).stderr.splitlines()[-1]
        assert "corpus.token_stream_sha256 recorded" in line and "corpus.source recorded" in line
        assert ("--overwrite" in line) == (name == "whole")
    shutil.copytree("weights", "longer")  # the same weights, that read positions in another way
    config = json.loads(Path("longer/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    Path("longer/config.json").write_text(json.dumps(config))
    for name in before:
        line = run(*capture("longer", "text.txt", name), status=1).stderr.splitlines()[-1]
        assert "teacher.config_fingerprint recorded" in line and "teacher.name recorded" in line
    shutil.rmtree("weights")
    shutil.copytree(padded_teacher_dir, "weights")  # under the name of the first
    for name in before:
        assert "teacher.weights_fingerprint" in run(*capture("weights", "text.txt", name), status=1).stderr
    assert {name: contents(tmp_path / name) for name in before} == before


def test_answers_go_on_under_another_spelling(
    tmp_path: Path, teacher_dir: Path, padded_teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Answers that wait for their cache, and a finished one; other prompts or weights are refused."""
    options = {"answers_per_prompt": 2, "max_new_tokens": 4}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", completions(4))
    other_teacher, other_prompts = Path(f"{teacher_dir}/../{teacher_dir.name}"), tmp_path / "mount" / "prompts.jsonl"
    other_prompts.parent.mkdir()
    shutil.copy(prompts, other_prompts)
    generate(teacher_dir, prompts, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cf.CacheWriter, "write", interrupted)
        generate(teacher_dir, prompts, tmp_path / "begun", **options)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerWriter, "write", None)
        for output in ("whole", "begun"):
            assert generate(other_teacher, other_prompts, tmp_path / output, **options).answers == 8
            assert without_config(contents(tmp_path / output)) == without_config(expected)
    longer = write_jsonl(tmp_path / "longer.jsonl", completions(5))
    for teacher, data, what in (
        (teacher_dir, longer, "prompts.files"),
        (padded_teacher_dir, prompts, "weights_finger"),
    ):
        with pytest.raises(cf.CacheError, match=f"finished cache .* made with other settings .*{what}"):
            generate(teacher, data, tmp_path / "whole", **options)
    assert contents(tmp_path / "whole") == expected


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# -- reading over a network -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_student_of_a_cache_on_a_store_has_a_worker_that_reads_ahead(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unless the user says otherwise; the weights are those of reading from a disk, one cache or two mixed."""
    cache, url = build_cache(tmp_path / "cache", teacher_dir, text_file), f"memory://{tmp_path.name}/cache"
    fsspec.filesystem("memory").put(str(cache), url, recursive=True)
    workers: list[int] = []
    loader = DistillTrainer.get_train_dataloader

    def watched(self: DistillTrainer) -> Any:
        workers.append(self.args.dataloader_num_workers)
        return loader(self)

    monkeypatch.setattr(DistillTrainer, "get_train_dataloader", watched)
    options: dict[str, Any] = {"student": student_dir, "max_steps": 4, "batch_size": 4}
    train(tmp_path / "disk", cache, **options)
    for number, given in (("url", {}), ("none", {"dataloader_num_workers": 0})):
        train(tmp_path / number, url, **options, **given)
        assert distance(weights(tmp_path / "disk"), weights(tmp_path / number)) == 0.0
    train(tmp_path / "file", url, **options, arguments={"dataloader_num_workers": 0})
    assert workers == [0, 1, 0, 0]
