"""`distill verify`: bytes, values that cannot be one distribution's, and rows computed again by the teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cache_format as cf
from cli import main
from pipeline.errors import ConfigError
from pipeline.teacher.engines import chunked_selection
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import sparse_targets
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import build_cache
from sampled import random, rule_name, threshold
from tiny import tiny_llama, tiny_tokenizer

RULES = [
    TargetRule(top_k=16),
    TargetRule(kind="top-p", top_p=0.6),
    threshold(0.05),
    threshold(0.2, head=4, samples=3),
    random(20),
    random(7, samples=2),
    TargetRule(top_k=400),  # all of the vocabulary
    TargetRule(top_k=8, temperature=3.0),
]


@pytest.fixture(scope="module", params=RULES, ids=rule_name)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path):
    return build_cache(tmp_path_factory.mktemp("verify") / "cache", teacher_dir, text_file, targets=request.param)


def verify(*words: Any, status: int = 0) -> str:
    """What it says; with --json, to stdout alone."""
    result = CliRunner().invoke(main, ["verify", *map(str, words)])
    assert result.exit_code == status, result.output
    return result.stdout if "--json" in words else result.output


@pytest.mark.long
def test_what_capture_writes_is_plausible_and_is_what_the_teacher_says(cache: Path, teacher_dir: Path):
    assert "every checksum holds, and every rule." in verify(cache, "--deep")
    found = verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=str(teacher_dir), rows=5, device="cpu"))
    assert found.agrees and found.same_weights
    assert found.rows == 5 and found.positions > 100
    assert found.deviation.found <= 1e-6 and 0.9 < found.same_entries <= 1
    assert found.entries > 0 or cf.open_cache(cache).metadata.targets["kind"] == "random"


# -- wrong targets that no checksum can find --------------------------------------------------------------------------


def log2(targets: Any) -> Any:
    return targets._replace(logprobs=targets.logprobs / np.log(2))


def shifted(targets: Any) -> Any:
    """Residual and entropy one position late, the entries where they belong."""
    return targets._replace(
        residual_logprob=targets.residual_logprob.roll(1), entropy=targets.entropy.roll(1), ids=targets.ids
    )


def unnormalised(targets: Any) -> Any:
    return targets._replace(logprobs=(targets.logprobs - 0.4))


def no_residual(targets: Any) -> Any:
    return targets._replace(residual_logprob=torch.full_like(targets.residual_logprob, -torch.inf))


def entropy_in_bits(targets: Any) -> Any:
    return targets._replace(entropy=(targets.entropy / np.log(2)).clamp(max=np.log(400)))


def entropy_of_the_kept_ones(targets: Any) -> Any:
    """As if what is kept were all there is."""
    p = torch.where(targets.ids >= 0, targets.logprobs.double().exp(), 0.0)
    p = p / p.sum(dim=1, keepdim=True)
    return targets._replace(entropy=-torch.xlogy(p, p).sum(dim=1).float())


def half_the_weights(targets: Any) -> Any:
    sampled = torch.arange(targets.ids.shape[1]) >= targets.exact_counts[:, None]
    return targets._replace(logprobs=torch.where(sampled, targets.logprobs - np.log(2), targets.logprobs).float())


WRONG = [
    (log2, TargetRule(top_k=16), "sum to"),
    (unnormalised, TargetRule(top_k=16), "sum to"),
    (no_residual, TargetRule(top_k=16), "sum to"),
    (shifted, TargetRule(top_k=16), "sum to"),
    (entropy_in_bits, TargetRule(top_k=200), "entropy"),
    (entropy_of_the_kept_ones, TargetRule(top_k=16), "entropy"),
    (half_the_weights, threshold(0.05), "sampled weights sum to"),
    (half_the_weights, random(20), "sampled weights sum to"),
]


@pytest.mark.long
@pytest.mark.parametrize(("bug", "rule", "says"), WRONG, ids=lambda part: getattr(part, "__name__", None))
def test_a_wrong_distribution_is_found_by_its_numbers_alone(
    tmp_path: Path, teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, bug: Any, rule: Any, says: str
):
    monkeypatch.setattr(chunked_selection, "sparse_targets", lambda *given: bug(sparse_targets(*given)))
    path = build_cache(tmp_path / "cache", teacher_dir, text_file, targets=rule)
    assert "every checksum holds." in verify(path)
    output = verify(path, "--deep", status=1)
    assert says in output and ": row " in output and ", position " in output and output.count("\n") == 1


def test_another_temperature_shows_only_to_the_teacher(
    tmp_path: Path, teacher_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    hot = TargetRule(top_k=16, temperature=1.3)
    monkeypatch.setattr(
        chunked_selection, "sparse_targets", lambda logits, rule, *given: sparse_targets(logits, hot, *given)
    )
    path = build_cache(tmp_path / "cache", teacher_dir, text_file, top_k=16)
    verify(path, "--deep")
    output = verify(path, "--against-teacher", teacher_dir, status=1)
    assert "does not match" in output and "nats, worst in row" in output


# -- against a teacher ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def top16(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    return build_cache(tmp_path_factory.mktemp("against") / "cache", teacher_dir, text_file)


def test_other_weights_are_told_apart(top16: Path, tmp_path: Path):
    other = tmp_path / "other"
    tiny_llama(other, tiny_tokenizer(), seed=5)
    output = verify(top16, "--against-teacher", other, "--rows", 2, status=1)
    assert "a different fingerprint" in output and "does not match" in output
    found = json.loads(verify(top16, "--against-teacher", other, "--json", status=1))
    assert found["ok"] is False and found["teacher"]["divergence"]["found"] > 0.1


def test_a_small_change_of_the_weights_is_more_than_noise(top16: Path, teacher_dir: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] *= 1.2
    model.save_pretrained(tmp_path / "touched")
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(tmp_path / "touched")
    config = TeacherCheckConfig(cache=str(top16), teacher=str(tmp_path / "touched"), device="cpu")
    found = verify_against_teacher(config)
    assert not found.agrees and not found.same_weights
    assert found.deviation.rounding < 1e-5 < found.deviation.found


def test_a_row_of_other_tokens_is_found(top16: Path, teacher_dir: Path, tmp_path: Path):
    """Targets paired with the wrong row: plausible by themselves, and every checksum is right."""
    cache = cf.open_cache(top16)
    rows = list(cache.iter_rows())
    lengths = [len(row.input_ids) for row in rows]
    pair = next((lengths.index(n), i) for i, n in enumerate(lengths) if lengths.index(n) != i)
    first, second = (rows[i] for i in pair)
    mask = first.loss_mask & second.loss_mask
    rows[pair[0]] = replace(first, targets=second.targets, loss_mask=mask)
    with cf.CacheWriter(tmp_path / "swapped", cache.metadata, tokenizer_files=cache.tokenizer_files()) as writer:
        writer.write(rows)
    verify(tmp_path / "swapped", "--deep")
    output = verify(tmp_path / "swapped", "--against-teacher", teacher_dir, "--rows", len(rows), status=1)
    assert f"row {pair[0]}," in output


def test_the_sample_itself_is_drawn_again(tmp_path: Path, teacher_dir: Path, text_file: Path):
    """A cache of another seed has the right probabilities and other tokens."""
    path = build_cache(tmp_path / "cache", teacher_dir, text_file, targets=random(20, seed=1))
    cache = cf.open_cache(path)
    metadata = replace(cache.metadata, targets={**cache.metadata.targets, "seed": 2})
    with cf.CacheWriter(tmp_path / "relabelled", metadata, tokenizer_files=cache.tokenizer_files()) as writer:
        writer.write(list(cache.iter_rows()))
    words = [tmp_path / "relabelled", "--against-teacher", teacher_dir]
    assert "from where the seed draws" in verify(*words, status=1)
    found = json.loads(verify(*words, "--json", status=1))["teacher"]
    assert found["same_entries"] < 0.5 and not found["draws"]["agrees"] and found["deviation"]["agrees"]


def test_what_cannot_be_compared_is_refused(top16: Path, teacher_dir: Path, tmp_path: Path):
    for _ in cf.convert_cache(top16, tmp_path / "fewer", cf.Conversion(top_k=4)):
        pass
    verify(tmp_path / "fewer", "--deep")
    with pytest.raises(ConfigError, match="rounded a second time"):
        verify_against_teacher(TeacherCheckConfig(cache=str(tmp_path / "fewer"), teacher=str(teacher_dir)))
    stranger = tmp_path / "stranger"
    tiny_llama(stranger, tiny_tokenizer(vocab_size=350))
    assert "its vocabulary is not that of" in verify(top16, "--against-teacher", stranger, status=1)
    assert "Name the teacher" in verify(top16, "--rows", 3, status=2)
    assert "no such directory" in verify(top16, "--against-teacher", "./nowhere", status=1)


def test_bytes_are_compared_without_decoding(top16: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from cache_format.read import shard_reader

    monkeypatch.setattr(shard_reader.ShardReader, "record_batch", lambda *_: 1 / 0)
    summary = cf.verify_cache(top16)
    assert summary.entries == cf.open_cache(top16).manifest.num_entries
    shard, damaged = (top16 / "shards/shard-00000.arrow").read_bytes(), tmp_path / "damaged"
    for place in (12, len(shard) // 3, len(shard) // 2, len(shard) - 9):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(top16, damaged)
        flipped = shard[:place] + bytes([shard[place] ^ 4]) + shard[place + 1 :]
        (damaged / "shards/shard-00000.arrow").write_bytes(flipped)
        assert "shard-00000.arrow" in verify(damaged, status=1)


def test_the_teacher_may_be_named_in_a_file(top16: Path, teacher_dir: Path, tmp_path: Path):
    file = tmp_path / "check.toml"
    file.write_text(f'against_teacher = "{teacher_dir}"\nrows = 2\ndevice = "cpu"\n')
    assert f"Against {teacher_dir}" in " ".join(verify(top16, "--config", file).split())
    other = tmp_path / "other"
    tiny_llama(other, tiny_tokenizer(), seed=5)
    file.write_text(f'against_teacher = "{other}"\nrows = 2\ndevice = "cpu"\n')
    assert f"does not match {other}" in verify(top16, "--config", file, status=1)


@pytest.mark.parametrize(
    "words, said",
    [
        (("--config", "none.toml"), "none.toml: No such file"),
        (("--against-teacher", "./nowhere"), "nowhere: no such directory"),
    ],
)
def test_options_are_checked_before_the_cache_is_read(
    words: tuple[str, ...], said: str, top16: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cf, "verify_cache", lambda *_, **__: pytest.fail("read the cache"))
    assert said in verify(top16, *words, status=1)
