"""`distill plan`: what it says beforehand is what `cache-teacher` then does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import cache_format as cf
import distill
from cli import main
from pipeline.inspection import describe_targets
from pipeline.options import options_of
from pipeline.teacher import plan
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generation_config import GENERATION
from pipeline.teacher.writing.worker_config import PROCESSES
from pipeline.teacher.writing.workers import Worker
from tiny import english

ROWS_TAKEN = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "text.txt"
    path.write_text(english(400), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(teacher_dir: Path, text: Path) -> list[Any]:
    """Options of both commands, but for the output."""
    return ["--teacher", teacher_dir, "--data", text, "--seq-len", 64, "--device", "cpu"]


def run(*given: Any, status: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, given)))
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def planned(words: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("planned") / "cache"
    found = json.loads(run("plan", *words, "--output", output, "--rows", ROWS_TAKEN, "--json").stdout)
    assert not output.exists() and not list(output.parent.iterdir())
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("targets", "encoding"),
    [
        ("top-k --top-k 64", "columns"),
        ("threshold", "columns"),
        ("threshold --tail-threshold 0.125", "packed"),
        ("random", "packed"),
    ],
)
def test_bytes_entries_and_mass_are_those_of_the_cache(
    planned: dict[str, Any], words: list[Any], tmp_path: Path, targets: str, encoding: str
):
    run("cache-teacher", *words, "--output", tmp_path / "cache", "--targets", *targets.split(), "--encoding", encoding)
    cache = cf.open_cache(tmp_path / "cache")
    assert (planned["rows"], planned["tokens"]) == (len(cache), cache.num_tokens)
    assert planned["sample_rows"] == ROWS_TAKEN < len(cache) / 4
    kept = describe_targets(cache.metadata.targets)
    (rule,) = (rule for rule in planned["rules"] if describe_targets(rule["targets"]) == kept)
    # A little more than it takes: a twentieth of a record batch is compressed alone.
    assert rule["bytes"][encoding] == pytest.approx(cache.manifest.stored_bytes, rel=0.15)
    counted = np.concatenate([row.loss_mask for row in cache.iter_rows()])
    entries = np.concatenate([row.targets.counts for row in cache.iter_rows()])[counted]
    residual = np.concatenate([row.targets.residual_logprob for row in cache.iter_rows()])[counted]
    assert rule["entries_per_token"] == pytest.approx(entries.mean(), rel=0.05)
    assert rule["exact_mass"] == pytest.approx(1 - np.exp(residual).mean(), abs=0.02)


def test_the_settings_asked_for_come_first_and_once(words: list[Any], tmp_path: Path, planned: dict[str, Any]):
    given = ["--targets", "threshold", "--tail-threshold", 0.02, "--output", tmp_path / "c", "--rows", 2, "--json"]
    rules = json.loads(run("plan", *words, *given).stdout)["rules"]
    names = [describe_targets(rule["targets"]) for rule in rules]
    assert [rule["chosen"] for rule in rules] == [True] + [False] * (len(rules) - 1)
    assert names[0] == "threshold, τ = 0.02, K = 1" and len(set(names)) == len(names)
    default = planned["rules"][0]
    assert default["chosen"] and default["targets"]["kind"] == "threshold"


@pytest.mark.long
@pytest.mark.parametrize("rows", [2, 8])
def test_small_shards_cost_what_they_will_cost(words: list[Any], tmp_path: Path, planned: dict[str, Any], rows: int):
    given = [*words, "--output", tmp_path / "cache", "--rows-per-shard", rows]
    rule = json.loads(run("plan", *given, "--rows", ROWS_TAKEN, "--json").stdout)["rules"][0]
    run("cache-teacher", *given)
    found = cf.open_cache(tmp_path / "cache").manifest
    assert found.metadata.num_shards == -(-planned["rows"] // rows)
    assert rule["bytes"]["columns"] == pytest.approx(found.stored_bytes, rel=0.05)
    assert rule["bytes"]["columns"] > 1.1 * planned["rules"][0]["bytes"]["columns"]


@pytest.mark.long
def test_other_kinds_are_compared_with_the_same_samples_and_temperature(words: list[Any], tmp_path: Path):
    given = [*words, "--output", tmp_path / "c", "--rows", 2, "--targets", "threshold", "--samples", 3]
    given += ["--temperature", 2]
    rules = [rule["targets"] for rule in json.loads(run("plan", *given, "--json").stdout)["rules"]]
    assert [rule["tail_threshold"] for rule in rules if rule["kind"] == "threshold"] == [0.05, 0.125, 0.02]
    assert {rule["samples"] for rule in rules if "samples" in rule} == {3}
    assert {rule["temperature"] for rule in rules} == {2.0}
    assert run("plan", *given).stdout.count("threshold 0.05") == 1


@pytest.mark.long
def test_of_several_processes_each_takes_its_own_device_and_the_first_speaks(
    words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: list[Any] = []
    device = Worker.device

    def watched(self: Worker, name: str, model: Any) -> torch.device:
        taken.append((self.local_rank, name))
        return device(self, name, model)

    monkeypatch.setattr(Worker, "device", watched)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    result = run("plan", *words, "--output", tmp_path / "c", "--rows", 2)
    assert (result.stdout, result.stderr) == ("", "") and taken == [(1, "cpu")]
    monkeypatch.setenv("RANK", "0")
    assert "Predicted cost of this cache" in run("plan", *words, "--output", tmp_path / "c", "--rows", 2).stdout


@pytest.mark.long
def test_time_and_cost_follow_from_the_speed(words: list[Any], tmp_path: Path):
    output = run("plan", *words, "--output", tmp_path / "c", "--rows", 4, "--cost-per-hour", 36, "--json").stdout
    found = json.loads(output)
    for rule in found["rules"]:
        assert rule["seconds"] == pytest.approx(found["tokens"] / rule["tokens_per_s"])
    table = run("plan", *words, "--output", tmp_path / "c", "--rows", 4, "--cost-per-hour", 36).stdout
    assert "per million tokens, at 36 an hour" in table and "▶ threshold 0.05" in table
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table


def test_slow_writing_limits_the_speed(words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def slow(rows: list[cf.CacheRow], *given: Any) -> tuple[int, int, int]:
        clock["seconds"] += 100.0
        return 1000, 100, 10

    clock = {"seconds": 0.0}
    monkeypatch.setattr(plan, "_written", slow)
    monkeypatch.setattr(
        plan.time, "perf_counter", lambda: clock.update(seconds=clock["seconds"] + 1e-3) or clock["seconds"]
    )
    found = json.loads(run("plan", *words, "--output", tmp_path / "c", "--rows", 4, "--json").stdout)
    for rule in found["rules"]:
        assert rule["writer_bound"] and rule["tokens_per_s"] == pytest.approx(found["sample_tokens"] / 100, rel=0.01)
    assert "* limited by encoding" in run("plan", *words, "--output", tmp_path / "c", "--rows", 4).stdout


@pytest.mark.long
def test_a_disk_that_is_too_small_is_said(words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage(NamedTuple):
        total: int = 10**9
        used: int = 10**9 - 1000
        free: int = 1000

    given = [*words, "--output", tmp_path / "not/yet/there", "--rows", 4]
    assert "warning" not in run("plan", *given).stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage() if path == tmp_path else 1 / 0)
    result = run("plan", *given)
    assert "1.0 kB are free there, but the cache will take about" in result.stderr
    assert json.loads(run("plan", *given, "--json").stdout)["fits"] is False
    assert json.loads(run("plan", *words, "--output", "memory://x", "--rows", 4, "--json").stdout)["fits"] is True


@pytest.mark.long
def test_rows_are_taken_from_all_over_the_text(teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A text whose second half is one word: much of the sample must be of it."""
    text = tmp_path / "text.txt"
    text.write_text(english(200) + "snow snow snow snow snow snow\n" * 500, encoding="utf-8")
    seen: list[float] = []
    run_rows = plan._Sample.run

    def watched(self: Any, requests: Any, on_progress: Any) -> None:
        seen.extend(np.bincount(request.row.input_ids).max() / request.tokens for request in requests)
        run_rows(self, requests, on_progress)

    monkeypatch.setattr(plan._Sample, "run", watched)
    words = ["--teacher", teacher_dir, "--data", text, "--seq-len", 64, "--device", "cpu", "--output", tmp_path / "c"]
    run("plan", *words, "--rows", 20)
    repeated = sum(share > 0.2 for share in seen)
    assert len(seen) == 20 and 4 <= repeated <= 16


def test_answers_are_not_planned(teacher_dir: Path, text: Path, tmp_path: Path):
    given = {"teacher": str(teacher_dir), "data": str(text), "output": str(tmp_path / "cache")}
    with pytest.raises(distill.ConfigError, match="`generate`, `gen_seed`: plans are made for given text only"):
        distill.plan(**given, generate=True, gen_seed=1)
    (tmp_path / "run.json").write_text(json.dumps({**given, "generate": True}))
    result = run("plan", "--config", tmp_path / "run.json", status=1)
    assert "generate: plans are made for given text only" in result.stderr


def test_every_option_of_the_real_thing_is_there_and_complains_alike(words: list[Any], tmp_path: Path):
    commands = (main.get_command(click.Context(main), name) for name in ("cache-teacher", "plan"))
    real, planning = ({p.name for p in command.params} for command in commands if command is not None)
    declared = options_of(CacheTeacherConfig).values()
    writing = {each.name for each in declared if each.metadata.group in (GENERATION, PROCESSES)}
    assert real - planning == writing | {"overwrite", "push_to_hub", "public"}
    assert planning - real == {"rows", "cost_per_hour"}
    given = [*words, "--output", tmp_path / "c"]
    for wrong in (["--targets", "random", "--top-p", 0.5], ["--top-k", 5000]):
        assert (
            run("plan", *given, *wrong, status=1).stderr.splitlines()[-1]
            == (run("cache-teacher", *given, *wrong, status=1).stderr.splitlines()[-1])
        )


def test_nothing_of_it_needs_gradients(words: list[Any], tmp_path: Path):
    run("plan", *words, "--output", tmp_path / "c", "--rows", 2)
    assert torch.is_grad_enabled()
