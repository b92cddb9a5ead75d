"""`dtype` auto on a CPU that multiplies bfloat16, made up: when it measures, what it takes, what it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cache_format as cf
from pipeline.models.devices import cpu_dtype
from pipeline.models.devices.cpu_dtype import DtypeSpeeds
from pipeline.teacher import opening
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.writing.workers import WorkerConfig
from runs import settings


@pytest.fixture(scope="module")
def saved_in_bfloat16(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "bfloat16"
    AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).save_pretrained(folder)
    for file in teacher_dir.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class Processor:
    """One with bfloat16 products, and a clock by which a pass in that dtype is `gain` times as fast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gain: float, supported: bool = True) -> None:
        self.gain, self.now, self.measured = gain, 0.0, list[torch.dtype]()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
        monkeypatch.setattr(cpu_dtype, "_speed", self.speed)

    def speed(self, model: PreTrainedModel, rows: int, tokens: int) -> float:
        self.measured.append(model.dtype)
        return 1000.0 * (self.gain if model.dtype == torch.bfloat16 else 1.0)


def dtype_of(path: Path) -> str:
    return cf.open_cache(path).metadata.teacher["dtype"]


@pytest.mark.parametrize("gain, expected", [(2.6, "bfloat16"), (1.05, "float32"), (0.5, "float32")])
def test_the_faster_dtype_is_taken_recorded_and_kept(
    gain: float,
    expected: str,
    saved_in_bfloat16: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor, said = Processor(monkeypatch, gain), list[str]()
    config = settings(saved_in_bfloat16, text_file, tmp_path / "cache")
    cache_teacher(config, on_stage=said.append)
    assert processor.measured == [torch.float32, torch.bfloat16] and dtype_of(tmp_path / "cache") == expected
    speeds = f"{1000 * gain:,.0f} tokens/s in bfloat16, 1,000 in float32"
    assert f"`dtype` {expected}: {speeds}" in said

    # Continued where the other dtype would be measured to be faster.
    last = max((tmp_path / "cache" / "shards").glob("*.json"))
    last.unlink()
    (tmp_path / "cache" / "manifest.json").rename(tmp_path / "cache" / "manifest.partial.json")
    other = Processor(monkeypatch, 1 / gain)
    cache_teacher(config)
    assert not other.measured and dtype_of(tmp_path / "cache") == expected


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"workers": WorkerConfig(num_workers=2, worker_index=0)},
        {"supported": False},
        {"in_float32": True},
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    options: dict[str, Any],
    teacher_dir: Path,
    saved_in_bfloat16: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = Processor(monkeypatch, 2.6, options.pop("supported", True))
    teacher = teacher_dir if options.pop("in_float32", False) else saved_in_bfloat16
    cache_teacher(settings(teacher, text_file, tmp_path / "cache", **options))
    assert not processor.measured and dtype_of(tmp_path / "cache") == options.get("dtype", "float32")


def test_a_loaded_teacher_keeps_its_dtype(
    saved_in_bfloat16: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Processor(monkeypatch, 0.5)
    config = settings(saved_in_bfloat16, text_file, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(saved_in_bfloat16, dtype=torch.bfloat16)
    tokenizer = opening.load_tokenizer(saved_in_bfloat16)
    cache_teacher(CacheTeacherConfig(**{**vars(config), "teacher": model, "tokenizer": tokenizer}))
    assert not processor.measured and dtype_of(tmp_path / "cache") == "bfloat16"


def test_a_plan_is_made_in_the_dtype_of_the_run(
    saved_in_bfloat16: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, used = Processor(monkeypatch, 2.6), list[torch.dtype]()
    open_engine = opening.open_engine

    def opened(*given: Any, **named: Any) -> Any:
        engine = open_engine(*given, **named)
        used.append(engine.head.model.dtype)
        return engine

    monkeypatch.setattr("pipeline.teacher.plan.open_engine", opened)
    plan_cache(settings(saved_in_bfloat16, text_file, tmp_path / "cache"), sample_rows=2)
    assert len(processor.measured) == 2 and used == [torch.bfloat16]


def test_a_speed_is_that_of_the_fastest_pass_but_the_first(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take 9, 4, 2 and 3 seconds."""
    times = iter([0, 9, 10, 14, 20, 22, 30, 33])
    monkeypatch.setattr(cpu_dtype.time, "perf_counter", lambda: float(next(times)))
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    assert cpu_dtype._speed(model, 2, 5) == 2 * 5 / 2
    assert DtypeSpeeds(float32=100, bfloat16=111).faster == "bfloat16"
