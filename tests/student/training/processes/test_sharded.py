"""Training on four processes, and with weights sharded over processes (FSDP2), gives the weights of one process.

Over gloo on a CPU. accelerate shards on GPUs only, so each rank makes it believe that there are GPUs; everything after
that is the same as on GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
from accelerate.utils import DistributedType
from ranks import on_processes
from safetensors.torch import load_file

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.student.training import forward
from runs import SGD, build_cache, distance, log_history, train, weights
from tiny import LONGROPE, conversations, english, tiny_llama, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def shard_on_a_cpu() -> None:
    begin = accelerate.state.PartialState.__init__

    def as_if_on_gpus(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = as_if_on_gpus


def watch_the_head(seen: list[Any]) -> None:
    fused_head = forward.fused_head

    def watched(hidden: Any, weight: Any, *args: Any, **options: Any) -> Any:
        seen.append([type(weight).__name__, list(weight.shape)])
        return fused_head(hidden, weight, *args, **options)

    forward.fused_head = watched


def rank(output: Path, cache: Path, *, sharded: bool, **options: Any) -> None:
    seen: list[Any] = []
    watch_the_head(seen)
    if sharded:
        shard_on_a_cpu()
    train(output, cache, **options)
    output.with_name(f"{output.name}-rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


PROCESSES = {"four": 4, "sharded": 2, "sharded-untied": 2, "sharded-lora": 2, "sharded-lora-head": 2}
PROCESSES |= {"sharded-checkpoints": 2}  # each process saves its shard
ADAPTERS = {
    "sharded-lora": {"lora_rank": 4, "merge_adapter": True},
    "sharded-lora-head": {"lora_rank": 4, "lora_head": True},  # uses the model's own head; saved as an adapter
}


@pytest.fixture(scope="module")
def runs(teacher_dir: Path, student_dir: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process (`one-…`) and the same steps on several processes, with 4 rows per batch in total."""
    folder = tmp_path_factory.mktemp("sharded")
    cache = build_cache(folder / "cache", teacher_dir, write_jsonl(folder / "chat.jsonl", conversations(18)))
    (folder / "text.txt").write_text(english(16, seed=5))
    held_out = build_cache(folder / "held-out", teacher_dir, folder / "text.txt")
    assert len(cf.open_cache(held_out)) % 4 != 0
    # Its rotary embeddings switch at 32 tokens: batches have documents on both sides, or on one.
    factors = {name: LONGROPE[name][:4] for name in ("short_factor", "long_factor")}
    switching = {"rope_parameters": {**LONGROPE, **factors}}
    untied = tiny_llama(folder / "untied", tokenizer, layers=2, hidden=16, tie=False, seed=5, **switching)
    options: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 1, "kd_weight": 0.7}
    options |= {"eval_cache": str(held_out), "eval_steps": 2, "save_steps": 2}
    plain = {**SGD, "learning_rate": 0.5}
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    for name, processes in PROCESSES.items():
        student = untied if "untied" in name else student_dir
        adapter = ADAPTERS.get(name, {})
        if not one(folder, name).exists():
            train(one(folder, name), cache, student=student, batch_size=4,
                  arguments=plain, **adapter, **options)  # fmt: skip
        file = folder / f"{name}.json"
        own = fsdp if "sharded" in name else {}
        if name == "sharded-checkpoints":
            own = {**fsdp, "fsdp_config": {**fsdp["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}}
        file.write_text(json.dumps({**plain, **own}))
        given = {**options, **adapter, "training_args": str(file), "batch_size": 4 // processes}
        given |= {"student": student, "sharded": "sharded" in name}
        on_processes(processes, rank, folder / name, cache, **given)
    return folder


def one(runs: Path, name: str) -> Path:
    """The run of one process with the same options."""
    return runs / f"one-{name.removeprefix('sharded').removeprefix('four').removesuffix('checkpoints').strip('-')}"


def all_weights(directory: Path) -> dict:
    """The weights, with a tied head under its own name too, as a sharded student is saved."""
    if (directory / "adapter_model.safetensors").exists():
        return load_file(directory / "adapter_model.safetensors")
    found = weights(directory)
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


@pytest.mark.parametrize("name", PROCESSES)
def test_several_processes_give_the_weights_of_one(name: str, runs: Path, student_dir: Path):
    expected = all_weights(one(runs, name))
    if name == "sharded-lora-head":  # B is initialised to 0
        assert max(float(tensor.abs().max()) for key, tensor in expected.items() if "lora_B" in key) > 0.02
    else:
        assert distance(expected, all_weights(runs / "untied" if "untied" in name else student_dir)) > 0.02
    assert distance(expected, all_weights(runs / name)) < 2e-6


@pytest.mark.parametrize("name", PROCESSES)
def test_several_processes_log_the_metrics_of_one(name: str, runs: Path):
    compared = 0
    for entry, other in zip(log_history(one(runs, name)), log_history(runs / name), strict=True):
        for number in {"kl", "ce", "agreement", "loss", "eval_kl", "eval_ce", "eval_loss"} & entry.keys():
            assert other[number] == pytest.approx(entry[number], rel=2e-6), (entry["step"], number)
            compared += 1
    assert compared >= 15


@pytest.mark.parametrize("name", ["sharded", "sharded-untied", "sharded-lora"])
def test_loss_gets_the_full_head_weight_of_a_sharded_student(name: str, runs: Path):
    for rank in range(PROCESSES[name]):
        seen = json.loads((runs / f"{name}-rank-{rank}.json").read_text())
        assert len(seen) >= 6
        assert {(kind, *shape) for kind, shape in seen} == {("Parameter", 400, 16)}  # not a DTensor, not a shard


def test_sharded_student_is_saved_complete(runs: Path):
    result = evaluate(EvaluateConfig(cache=str(runs / "held-out"), student=str(runs / "sharded"), device="cpu"))
    last = [entry for entry in log_history(one(runs, "sharded")) if "eval_kl" in entry]
    assert min(abs(result.kl - entry["eval_kl"]) for entry in last) < 1e-5


def test_checkpoints_in_shards_are_resumed(runs: Path, student_dir: Path):
    saved, resumed = runs / "sharded-checkpoints", runs / "resumed"
    shutil.copytree(saved / "checkpoint-2", resumed / "checkpoint-2")
    assert not (resumed / "checkpoint-2/model.safetensors").exists()
    record = json.loads(Path(shutil.copy(saved / "distill_config.json", resumed)).read_text())
    given = {name: record["config"][name] for name in record["given"]}
    given |= {
        "sharded": True,
        "student": student_dir,
        "resume": True,
        "training_args": str(runs / f"{saved.name}.json"),
    }
    for name in ("cache", "output", "device"):
        del given[name]
    on_processes(2, rank, resumed, runs / "cache", **given)
    assert distance(all_weights(saved), all_weights(resumed)) < 2e-6
