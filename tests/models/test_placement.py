"""Teachers spread by a device map, left on disk or split over processes give the same targets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ranks import on_processes
from test_resume import contents
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import cache_format as cf
from cli import main
from pipeline.errors import ConfigError
from pipeline.models.devices.placement import computing_devices, parse_device_map
from pipeline.models.head import open_head
from pipeline.models.loading import load_model, weights_fingerprint
from pipeline.teacher import opening
from pipeline.teacher.capture import cache_teacher
from runs import command, settings

LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS: dict[str, dict[str, str]] = {
    "second half on disk": {n: "disk" if n in ("model.layers.1", "model.norm", "lm_head") else "cpu" for n in LAYERS},
    "embeddings on disk": {n: "disk" if n in ("model.embed_tokens", "lm_head") else "cpu" for n in LAYERS},
    "everything on disk": {"": "disk"},
    "everything here": {"": "cpu"},
}
ACCELERATE = tuple(map(int, importlib.metadata.version("accelerate").split(".")[:2]))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tied", "padded"])
@pytest.mark.parametrize("name", MAPS)
def test_spread_teacher_is_the_same_teacher(
    name: str, kind: str, teacher_dir: Path, padded_teacher_dir: Path, text_file: Path, tmp_path: Path
):
    if set(MAPS[name].values()) == {"disk"} and ACCELERATE < (1, 15):
        pytest.skip("accelerate before 1.15 refuses to leave a whole model on disk")
    teacher = teacher_dir if kind == "tied" else padded_teacher_dir
    if kind == "tied" and name == "second half on disk":
        (tmp_path / "map.json").write_text(json.dumps(MAPS[name]))
        with pytest.raises(ConfigError, match="embedding and head are one tensor"):
            load_model(str(teacher), device_map=str(tmp_path / "map.json"))
        return
    (tmp_path / "map.json").write_text(json.dumps(MAPS[name]))
    plain, spread = (load_model(str(teacher), device_map=m) for m in (None, str(tmp_path / "map.json")))
    on_disk = {n for n, tensor in spread.state_dict().items() if tensor.is_meta}
    assert bool(on_disk) == ("disk" in MAPS[name].values())
    assert weights_fingerprint(plain) == weights_fingerprint(spread)
    assert {n for n, tensor in spread.state_dict().items() if tensor.is_meta} == on_disk  # put back
    assert computing_devices(spread, torch.device("cpu")) == [torch.device("cpu")]
    head = open_head(spread, 400)
    assert head.linear == ("lm_head.weight" not in on_disk) and head.device == torch.device("cpu")

    cache_teacher(settings(teacher, text_file, tmp_path / "plain"))
    cache_teacher(settings(teacher, text_file, tmp_path / "spread", device_map=str(tmp_path / "map.json")))
    for row, other in zip(*(cf.open_cache(tmp_path / n).iter_rows() for n in ("plain", "spread")), strict=True):
        assert np.array_equal(row.targets.ids, other.targets.ids)
        assert np.array_equal(row.targets.logprobs, other.targets.logprobs)
    found = {n: contents(tmp_path / n, without="distill_config.json") for n in ("plain", "spread")}
    shards = [{n: data for n, data in files.items() if n.startswith("shards/")} for files in found.values()]
    assert shards[0] == shards[1]
    if head.linear:  # else the manifest says that the head is the model's own
        assert found["plain"] == found["spread"]


def test_device_maps_by_name_and_invalid_ones(tmp_path: Path, teacher_dir: Path, text_file: Path):
    assert parse_device_map("auto") == "auto"
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for text, words in (("nowhere", "expected auto"), ("bad.json", "expected an object"), ("broken.json", "not JSON")):
        with pytest.raises(ConfigError, match=words):
            parse_device_map(text if text == "nowhere" else str(tmp_path / text))
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", device_map="auto"))
    assert cf.verify_cache(tmp_path / "cache").rows > 0


def test_device_map_and_tensor_parallel_together_are_refused(
    tmp_path: Path, teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    with pytest.raises(ConfigError, match="give one of them"):
        cache_teacher(replace(config, device_map="auto", tensor_parallel=True))
    with pytest.raises(ConfigError, match="found one process, expected several"):
        cache_teacher(replace(config, tensor_parallel=True))
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="each of which would spread its teacher"):
        cache_teacher(replace(config, device_map="auto"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("heads, kv_heads, world, words", [
    (4, 1, 2, "1 key-value heads, found 2 processes, .* Use `device_map=auto`"),
    (4, 4, 3, "4 key-value heads, found 3 processes, .* Start 2 or 4 processes with torchrun, or use `device_map"),
    (6, 2, 4, "2 key-value heads, found 4 processes, .* Start 2 processes with torchrun, or"),
    (6, None, 4, "6 key-value heads, found 4 processes, .* 2 or 3 or 6"),
    (0, 0, 2, "no plan .tp_plan. for splitting"),
])  # fmt: skip
def test_teacher_that_cannot_be_split_evenly_is_refused_first(
    tmp_path: Path, teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
    heads: int, kv_heads: int | None, world: int, words: str,
):  # fmt: skip
    shutil.copytree(teacher_dir, tmp_path / "teacher")
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads, "head_dim": 8}
    config = LlamaConfig(**shape) if heads else GPT2Config()
    config.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(opening, "build_corpus", None)  # before the text is read
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", str(world))):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^`tensor_parallel`: .*{words}"):
        cache_teacher(settings(tmp_path / "teacher", text_file, tmp_path / "cache", tensor_parallel=True))
    with pytest.raises(ConfigError, match=f"^`tensor_parallel`: .*{words}"):
        load_model(str(tmp_path / "teacher"), tensor_parallel=True)


def test_a_spread_teacher_can_be_compared_with_its_cache(tmp_path: Path, padded_teacher_dir: Path, text_file: Path):
    cache_teacher(settings(padded_teacher_dir, text_file, tmp_path / "cache"))
    (tmp_path / "map.json").write_text(json.dumps(MAPS["second half on disk"]))
    words = ["verify", str(tmp_path / "cache"), "--device-map", str(tmp_path / "map.json"), "--device", "cpu", "--json"]
    assert CliRunner().invoke(main, words).exit_code == 2  # nothing to spread
    result = CliRunner().invoke(main, [*words, "--against-teacher", str(padded_teacher_dir)])
    found = json.loads(result.stdout)
    assert found["ok"] and found["teacher"]["same_weights"] and found["teacher"]["deviation"]["found"] <= 1e-5


def say(folder: Path, words: list[str]) -> None:
    result = command(*words)
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps([result.stdout, result.stderr]))


def on_two(folder: Path, words: list[str]) -> list[tuple[str, str]]:
    """stdout and stderr of `distill` in each of two processes that split a teacher."""
    on_processes(2, say, folder, words)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_teacher_split_over_two_processes_gives_the_same_targets(
    tmp_path: Path, teacher_dir: Path, text_file: Path, tokenizer
):
    """transformers' tensor parallelism over gloo: equal within rounding, and written once."""
    config = LlamaConfig.from_pretrained(teacher_dir)
    config.num_key_value_heads = 2  # one for each process
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    given = settings(tmp_path / "teacher", text_file, tmp_path / "plain")
    cache_teacher(given)
    words = [
        "cache-teacher",
        "--teacher",
        given.teacher,
        "--data",
        given.data.data,
        "--output",
        str(tmp_path / "cache"),
    ]
    words += ["--sample-by", "line", "--seq-len", "48", "--top-k", "8", "--batch-size", "4", "--device", "cpu"]
    words += ["--rows-per-shard", "16", "--tp", "--json"]
    (said, problem), (other_said, other_problem) = on_two(tmp_path, words)
    assert other_said == ""
    plain, split = cf.open_cache(tmp_path / "plain"), cf.open_cache(tmp_path / "cache")
    assert json.loads(said)["rows"] == len(split) == len(plain)
    assert split.metadata.capture["tensor_parallel"] == 2 and split.metadata.capture["head"] == "own"
    assert split.metadata.teacher == plain.metadata.teacher  # fingerprint of the weights included
    same, entries = 0, 0
    for row, other in zip(plain.iter_rows(), split.iter_rows(), strict=True):
        assert np.array_equal(row.input_ids, other.input_ids)
        same += int((row.targets.ids == other.targets.ids).sum())
        entries += len(row.targets.ids)
        assert np.abs(np.exp(row.targets.logprobs / 2) - np.exp(other.targets.logprobs / 2)).max() < 0.02  # a code
    assert same / entries > 0.999
    # Two processes verify it, too.
    words = ["verify", str(tmp_path / "cache"), "--against-teacher", given.teacher, "--device", "cpu", "--tp", "--json"]
    (said, problem), (other_said, other_problem) = on_two(tmp_path, words)
    assert other_said == "" and json.loads(said)["ok"], problem + other_problem
