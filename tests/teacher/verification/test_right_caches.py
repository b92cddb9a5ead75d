"""Right caches, however they were computed and stored: `verify` against the teacher flags none of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from full_runs import build_full
from generating import generate
from masked_runs import settings
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import Comparison, TeacherCheck, verify_against_teacher
from pipeline.teacher.verification.criterion import CAPS
from pipeline.teacher.verification.rounding import Rounding
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import build_cache, command
from sampled import random, threshold
from tiny import english, write_jsonl
from wrong_caches import Source


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of 40 tokens or so."""
    path = tmp_path_factory.mktemp("text") / "few.txt"
    path.write_text(english(8), encoding="utf-8")
    return path


RULES = [threshold(0.05), TargetRule(top_k=16), TargetRule(kind="top-p", top_p=0.6), random(20)]


def check(cache: Path, teacher: Path, **options: object) -> TeacherCheck:
    config = {"rows": 6, "device": "cpu", **options}
    return verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=str(teacher), **config))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["threshold", "top-p", "random", "hidden"])
def test_in_every_dtype_and_batch_size(kind: str, teacher_dir: Path, few: Path, tmp_path: Path):
    """The dtype is the recorded one, whatever the check runs in; in float32 the cache alone is rounded."""
    rule = {"threshold": threshold(0.05), "top-p": TargetRule(kind="top-p", top_p=0.6), "random": random(20)}.get(kind)
    if rule is None:
        source = Source(teacher_dir, build_full(teacher_dir, few, tmp_path / "cache", layers="1"))
    else:
        right = build_cache(tmp_path / "cache", teacher_dir, few, targets=rule, hidden=HiddenRule(layers="1"))
        source = Source(teacher_dir, right)
    for dtype, batch_size in (("float32", 1), ("bfloat16", 7), ("float16", 3)):
        path = tmp_path / f"{dtype}-{batch_size}"
        source.in_dtype(dtype, path, batch_size=batch_size)
        found = check(path, teacher_dir)
        assert found.agrees and found.dtype == found.cache_dtype == dtype and found.repeatable
        assert found.states is not None and found.states.agrees
        if dtype != "float32":
            in_float32 = check(path, teacher_dir, dtype="float32")
            assert in_float32.agrees and in_float32.states is not None and in_float32.states.found > 1e-4


def test_a_cache_that_the_command_wrote_in_bfloat16(teacher_dir: Path, few: Path, tmp_path: Path):
    words = ["--data", few, "--seq-len", 32, "--dtype", "bfloat16", "--device", "cpu"]
    command("cache-teacher", "--teacher", teacher_dir, "--output", tmp_path / "cache", *words)
    found = check(tmp_path / "cache", teacher_dir)
    assert found.agrees and found.same_weights and found.dtype == "bfloat16"


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["columns", "packed"])
def test_in_both_encodings_and_with_two_threads(encoding: str, teacher_dir: Path, few: Path, tmp_path: Path):
    path = build_cache(tmp_path / "cache", teacher_dir, few, targets=threshold(0.05), encoding=encoding)
    torch.set_num_threads(2)
    assert check(path, teacher_dir).agrees


@pytest.mark.long
@pytest.mark.parametrize("kind, rule", [("bert", threshold(0.05)), ("roberta", random(20))])
def test_of_masked_models(kind: str, rule: TargetRule, masked_dir: Path, tmp_path: Path):
    cache_teacher(settings(masked_dir, kind, tmp_path / "cache", targets=rule))
    assert check(tmp_path / "cache", masked_dir / kind).agrees
    source = Source(masked_dir / kind, tmp_path / "cache")
    source.in_dtype("bfloat16", tmp_path / "bfloat16")
    assert check(tmp_path / "bfloat16", masked_dir / kind).agrees


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_of_generated_answers_in_bfloat16(rule: TargetRule, teacher_dir: Path, tmp_path: Path):
    """Their targets come from passes of one token with a key-value cache."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text[:30]} for text in english(8).splitlines()])
    generate(teacher_dir, prompts, tmp_path / "cache", targets=rule, dtype="bfloat16", max_new_tokens=12)
    found = check(tmp_path / "cache", teacher_dir)
    assert found.agrees and found.dtype == "bfloat16"


# ---- the criterion itself


def test_noise_allows_no_more_than_the_cap():
    far = {name: Comparison(name=name, found=5.6, at="", rounding=5.7, batch=0.0) for name in CAPS}
    assert all(each.allowed == CAPS[name] and not each.agrees for name, each in far.items())
    assert not Comparison(name="divergence", found=math.nan, at="", rounding=0.0, batch=0.0).agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_errors_are_within_the_spacing_of_the_dtype(dtype: torch.dtype):
    values = torch.linspace(1.0, 2.0, 5001).to(dtype)
    off = (Rounding()(values).double() - values.double()).abs() / values.double()
    eps = torch.finfo(dtype).eps
    assert 0 < off.mean() and off.max() <= 1.5 * eps and 0.2 * eps < off.mean() < 0.8 * eps
    assert torch.equal(Rounding()(values), Rounding()(values))
    if dtype == torch.float32:  # a cache of a coarser dtype
        coarse = (Rounding(at_least=2.0**-7)(values) - values).abs() / values
        assert 2.0**-9 < coarse.mean() < 2.0**-7


def test_rounding_leaves_the_model_as_it_was(teacher_dir: Path):
    from generating import load, logprobs_of

    model, ids = load(teacher_dir), np.arange(20)
    before = logprobs_of(model, ids, 400)
    with Rounding().inside(model):
        during = logprobs_of(model, ids, 400)
    assert 0 < np.abs(during - before).max() < 1e-3
    assert np.array_equal(logprobs_of(model, ids, 400), before)
