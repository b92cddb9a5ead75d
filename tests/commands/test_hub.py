"""Uploading a cache to the hub: which files, in which order, and that `datasets` opens the result. No network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

import cache_format as cf
from cli import main
from made_up import made_up
from pipeline import hub
from runs import build_cache
from sampled import threshold


class Hub:
    """Records the calls to the client, and keeps the uploaded files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.error = folder, [], None
        self.token_error: Exception | None = None
        self.write_error: Exception | None = None
        self.upload_errors: list[BaseException | None] = []  # of the next uploads

    def files(self) -> list[str]:
        return sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append(("create", repository, options))
        if self.error is not None:
            raise self.error
        return f"https://hub/datasets/{repository}"

    def whoami(self) -> dict[str, str]:
        self.calls.append(("whoami",))
        if self.token_error is not None:
            raise self.token_error
        return {"name": "someone"}

    def auth_check(self, repository: str, **options: Any) -> None:
        self.calls.append(("check", repository, options))
        if self.write_error is not None:
            raise self.write_error

    def upload_folder(
        self,
        *,
        folder_path: Path,
        allow_patterns: Sequence[str] = ("*",),
        ignore_patterns: Sequence[str] = (),
        delete_patterns: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if (error := self.upload_errors.pop(0) if self.upload_errors else None) is not None:
            raise error
        files = [f.relative_to(folder_path).as_posix() for f in sorted(folder_path.rglob("*")) if f.is_file()]
        chosen = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        self.calls.append(("upload", options["repo_id"], chosen))
        (created, *_) = [call for call in self.calls if call[0] == "create"]
        assert options["repo_type"] == created[2]["repo_type"]
        for name in filter_repo_objects(self.files(), allow_patterns=delete_patterns or ()):
            (self.folder / name).unlink()
        for name in chosen:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / name)


@pytest.fixture()
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", found)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    return build_cache(tmp_path_factory.mktemp("hub") / "cache", teacher_dir, text_file, targets=threshold(0.1))


def push(*words: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["push", *map(str, words)])
    assert result.exit_code == status, result.output
    return result


def test_the_repository_is_the_cache_and_its_manifest_comes_last(cache: Path, fake: Hub):
    (cache / "stray.txt").write_text("not of the cache")
    result = push(cache, "someone/targets")
    (cache / "stray.txt").unlink()
    assert "Pushed to https://hub/datasets/someone/targets" in result.stderr
    (_, _, options), (_, _, first), (_, _, last) = fake.calls
    assert options == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert last == ["manifest.json"] and "manifest.json" not in first and "stray.txt" not in first
    pushed = cf.open_cache(fake.folder)
    cf.verify_cache(fake.folder, deep=True)
    assert pushed.tokenizer_files() == cf.open_cache(cache).tokenizer_files()


def test_a_cache_replaces_the_one_that_is_there(fake: Hub, tmp_path: Path):
    """Shards that are left over would be read by `datasets`, and the old manifest would describe new shards."""
    made_up(tmp_path / "large", rows=40, encoding="packed", tokenizer_files={"old.json": b"{}", "both.json": b"{}"})
    made_up(tmp_path / "small", rows=12, seed=1, tokenizer_files={"both.json": b"{}", "new.json": b"{}"})
    push(tmp_path / "large", "someone/targets")
    (fake.folder / "LICENSE").write_text("of its owner")
    fake.upload_errors = [None, OSError("connection reset")]
    push(tmp_path / "small", "someone/targets", status=1)
    with pytest.raises(cf.FormatError, match=r"no manifest\.json"):
        cf.open_cache(fake.folder)
    push(tmp_path / "small", "someone/targets")
    of_the_cache = [f.relative_to(tmp_path / "small") for f in (tmp_path / "small").rglob("*") if f.is_file()]
    assert fake.files() == sorted([*map(str, of_the_cache), "LICENSE"])
    assert cf.verify_cache(fake.folder, deep=True).rows == 12


def test_datasets_opens_it_by_its_card(cache: Path, fake: Hub, tmp_path: Path):
    push(cache, "someone/targets")
    loaded = datasets.load_dataset(str(fake.folder), cache_dir=str(tmp_path / "datasets"))["train"]
    expected = cf.open_cache(cache)
    assert len(loaded) == len(expected)
    for index in (0, len(expected) - 1):
        assert loaded[index]["input_ids"] == expected[index].input_ids.tolist()
        np.testing.assert_array_equal(np.float32(loaded[index]["target_logprobs"]), expected[index].targets.logprobs)


def test_a_damaged_cache_is_not_uploaded(cache: Path, fake: Hub, tmp_path: Path):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    shard = damaged / "shards/shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert "checksum" in push(damaged, "someone/targets", status=1).stderr
    assert fake.calls == []


def test_an_error_of_the_hub_is_passed_on_with_the_next_step(cache: Path, fake: Hub):
    class Response:
        headers: dict[str, str] = {}
        request = None
        status_code = 401

    fake.error = HfHubHTTPError("401 Client Error: Unauthorized", response=Response())  # type: ignore[arg-type]
    line = push(cache, "someone/targets", status=1).stderr.splitlines()[-1]
    assert "401" in line and "hf auth login" in line and f"distill push {cache} someone/targets" in line
    fake.error = ZeroDivisionError()  # a bug is not reported as an error of the hub
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(main, ["push", str(cache), "someone/targets"], catch_exceptions=False)


def test_names_are_checked_before_any_work(cache: Path, fake: Hub, teacher_dir: Path, text_file: Path, tmp_path: Path):
    assert "Give OWNER/NAME" in push(cache, "a/b/c", status=1).stderr
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", text_file, "--output", tmp_path / "c"]
    result = CliRunner().invoke(main, [str(word) for word in [*words, "--push-to-hub", "no spaces"]])
    assert result.exit_code == 1 and "Give OWNER/NAME" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
    assert "only a local cache" in push("memory://cache", "someone/targets", status=1).stderr
    assert fake.calls == []


def capture(*words: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["cache-teacher", *map(str, words)])
    assert result.exit_code == status, result.output
    return result


def test_a_run_that_could_not_be_pushed_is_refused(fake: Hub, teacher_dir: Path, text_file: Path):
    words = ["--teacher", teacher_dir, "--data", text_file, "--output", "memory://c4", "--push-to-hub", "me/x"]
    for more in ([], ["--generate"]):
        line = capture(*words, *more, status=1).stderr
        assert line.startswith("Error: ") and "me/x: only a local cache can be pushed, found memory://c4" in line
        assert len(line.splitlines()) == 1
    assert fake.calls == []
    with pytest.raises(cf.FormatError, match="no such directory"):
        cf.open_cache("memory://c4")


@pytest.mark.long
def test_the_process_that_finishes_the_cache_pushes_it(
    fake: Hub, teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["--teacher", teacher_dir, "--data", text_file, "--output", tmp_path / "c", "--sample-by", "line"]
    words += ["--seq-len", 48, "--rows-per-shard", 16, "--device", "cpu", "--push-to-hub", "someone/new"]
    by_hand = f"distill push {tmp_path / 'c'} someone/new"
    said = capture(*words, "--shard-range", "0:1").stderr.splitlines()
    assert f"Not pushed: the cache is not finished yet. Once it is: {by_hand}" in said and fake.calls == []
    # Under torchrun the first process, which prints, may not be the last to finish.
    with monkeypatch.context() as patch:
        for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
            patch.setenv(name, value)
        result = capture(*words)
    assert result.stderr == "Pushed to https://hub/datasets/someone/new\n" and result.stdout == ""
    assert [call[0] for call in fake.calls] == ["create", "upload", "upload"]
    result = capture(*words, "--num-workers", 3, "--worker-index", 0, "--json")
    assert f"another process finished the cache and pushes it. If it did not: {by_hand}" in result.stderr
    assert json.loads(result.stdout)["wrote_manifest"] is False and len(fake.calls) == 3
    capture(*words)  # a run that finds the cache finished pushes it again: the push may have failed
    assert len(fake.calls) == 6 and len(cf.open_cache(fake.folder)) == len(cf.open_cache(tmp_path / "c"))


def test_capture_pushes_a_finished_cache(fake: Hub, teacher_dir: Path, text_file: Path, tmp_path: Path):
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", text_file, "--output", tmp_path / "c"]
    words += ["--seq-len", 48, "--device", "cpu", "--push-to-hub", "someone/new"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert [call[0] for call in fake.calls] == ["create", "upload", "upload"]
    assert len(cf.open_cache(fake.folder)) == len(cf.open_cache(tmp_path / "c"))


def test_a_student_is_pushed_as_a_model_without_its_checkpoints(fake: Hub, tmp_path: Path):
    student = tmp_path / "student"
    names = ["config.json", "model.safetensors", "README.md", "distill_config.json", "checkpoint-4/optimizer.pt"]
    for name in [*names, "runs/today/events", "training_args.bin"]:
        (student / name).parent.mkdir(parents=True, exist_ok=True)
        (student / name).write_text("{}")
    assert "has not finished" in push(student, "someone/student", status=1).stderr and not fake.calls
    (student / "trainer_state.json").write_text("{}")
    found = push(student, "someone/student", "--json", tmp_path / "out.json")
    (_, _, options), (_, _, files) = fake.calls
    assert options == {"repo_type": "model", "private": True, "exist_ok": True}
    assert sorted(files) == sorted([*names[:4], "trainer_state.json"])
    assert json.loads((tmp_path / "out.json").read_text())["student"] == str(student), found.output
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json", "LICENSE"):
        (fake.folder / name).write_text("of what was pushed before")
    push(student, "someone/student")
    assert fake.files() == sorted([*files, "LICENSE"])
    fake.error = OSError("no route")
    assert "the hub did not accept the student: no route" in push(student, "someone/student", status=1).stderr


@pytest.mark.parametrize("flags, private", [((), True), (("--private",), True), (("--public",), False)])
def test_a_new_repository_is_private_by_default(
    flags: tuple[str, ...], private: bool, cache: Path, student_dir: Path, fake: Hub, tmp_path: Path
):
    """The same for caches and students, by hand or for a run, which creates it before it begins."""
    student = tmp_path / "student"
    student.mkdir()
    for name in ("config.json", "distill_config.json", "trainer_state.json"):
        (student / name).write_text("{}")
    for pushed in (cache, student):
        push(pushed, "someone/new", *flags)
        assert [call[2]["private"] for call in fake.calls if call[0] == "create"] == [private]
        fake.calls.clear()
    fake.write_error = OSError("no access")
    result = CliRunner().invoke(main, [*training(cache, student_dir, tmp_path / "out", "someone/new"), *flags])
    assert result.exit_code == 1 and fake.calls[1][2]["private"] == private
    fake.error = OSError("no route")
    again = push(cache, "someone/new", *flags, status=1).stderr.rstrip()
    assert again.endswith(f"distill push {cache} someone/new{'' if private else ' with --public'}")


@pytest.mark.parametrize("command", ["cache-teacher", "train-student"])
def test_a_visibility_needs_a_repository(command: str, cache: Path, teacher_dir: Path, text_file: Path, tmp_path: Path):
    words = {
        "cache-teacher": ["--teacher", teacher_dir, "--data", text_file],
        "train-student": ["--cache", cache, "--student", teacher_dir],
    }[command]
    result = CliRunner().invoke(main, [command, *map(str, words), "--output", str(tmp_path / "out"), "--public"])
    assert result.exit_code == 2 and "--public: only with --push-to-hub" in result.stderr


# -- train-student --push-to-hub --------------------------------------------------------------------------------------


def training(cache: Path, student: Path, output: Path, repository: str) -> list[str]:
    words = ["train-student", "--cache", cache, "--student", student, "--output", output, "--max-steps", 1]
    return [str(word) for word in (*words, "--device", "cpu", "--push-to-hub", repository)]


def test_training_pushes_the_student_to_a_private_repository(cache: Path, student_dir: Path, fake: Hub, tmp_path: Path):
    output = tmp_path / "student"
    result = CliRunner().invoke(main, [*training(cache, student_dir, output, "someone/student"), "--json"])
    assert result.exit_code == 0, result.output
    private = {"repo_type": "model", "private": True, "exist_ok": True}
    assert fake.calls[:3] == [
        ("whoami",),
        ("create", "someone/student", private),
        ("check", "someone/student", {"repo_type": "model", "write": True}),
    ]
    assert fake.calls[3] == ("create", "someone/student", private) and fake.calls[4][0] == "upload"
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= {file.name for file in fake.folder.iterdir()}
    assert json.loads(result.stdout)["steps"] == 1 and "Pushed to https://hub/" in result.stderr


@pytest.mark.parametrize("failing", ["token_error", "write_error"])
def test_training_does_not_begin_without_a_repository_to_push_to(
    failing: str, cache: Path, student_dir: Path, fake: Hub, tmp_path: Path
):
    setattr(fake, failing, OSError("Token is required (write access).\nMore."))
    result = CliRunner().invoke(main, training(cache, student_dir, tmp_path / "s", "someone/student"))
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1 and line.startswith(
        "Error: --push-to-hub someone/student: cannot be written: Token is"
    )
    assert "Nothing was trained" in line and "hf auth login" in line and not (tmp_path / "s").exists()
    assert "upload" not in [call[0] for call in fake.calls]


def test_training_does_not_begin_with_a_wrong_name(cache: Path, student_dir: Path, fake: Hub, tmp_path: Path):
    result = CliRunner().invoke(main, training(cache, student_dir, tmp_path / "s", "no spaces"))
    assert result.exit_code == 1 and "Give OWNER/NAME" in result.stderr and fake.calls == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no route to the hub")], ids=["Ctrl-C", "network"])
def test_upload_that_ends_early_says_that_the_student_is_complete(
    cache: Path, student_dir: Path, fake: Hub, tmp_path: Path, error: BaseException
):
    fake.upload_errors = [error]
    words = [*training(cache, student_dir, tmp_path / "s", "someone/student"), "--json", str(tmp_path / "result.json")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == (1 if isinstance(error, OSError) else 130)
    line = result.stderr.splitlines()[-1]
    assert f"{tmp_path}/s is complete and unchanged" in line and line.endswith(f"push {tmp_path}/s someone/student")
    assert "Trained" in result.stdout and json.loads((tmp_path / "result.json").read_text())["steps"] == 1


def test_interrupted_upload_of_a_cache_says_how_to_continue(cache: Path, fake: Hub):
    fake.upload_errors = [KeyboardInterrupt()]
    result = push(cache, "someone/cache", "--public", status=130)
    line = result.stderr.splitlines()[-1]
    assert "the upload to someone/cache is not complete" in line
    assert line.endswith(f"distill push {cache} someone/cache --public")


def test_only_the_first_process_pushes(
    cache: Path, student_dir: Path, fake: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("pipeline.student.training.train.train_student", lambda *_, **__: None)
    result = CliRunner().invoke(main, training(cache, student_dir, tmp_path / "s", "someone/student"))
    assert result.exit_code == 0 and fake.calls == [] and result.output == ""
