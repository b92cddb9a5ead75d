"""Training on several caches: parsing of weights, checks of agreement, exact resume, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import GPT2Config, PreTrainedTokenizerFast

import cache_format as cf
from cli import main
from made_up import THRESHOLD, TOP_K, made_up
from pipeline.errors import ConfigError
from pipeline.student.cache_paths import parse_weight
from pipeline.student.data.cache_mix import mix_of, open_mix
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.model.hidden_state_matching import HiddenStateLoss
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import train_student
from pipeline.student.validation.mix_checks import loss_for_mix
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from runs import Stop, build_cache, distance, log_history, weights
from tiny import conversations, english, tiny_llama, tiny_tokenizer, write_jsonl

# -- weights of caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("caches/a:0.7", ("caches/a", 0.7)),
        ("caches/a", ("caches/a", None)),
        ("a:3", ("a", 3.0)),
        ("a:.5", ("a", 0.5)),
        ("a:1e-3", ("a", 1e-3)),
        ("s3://bucket/cache", ("s3://bucket/cache", None)),
        ("s3://bucket/cache:0.25", ("s3://bucket/cache", 0.25)),
        ("memory://x", ("memory://x", None)),
        ("memory://x:2", ("memory://x", 2.0)),
        (r"C:\caches\a", (r"C:\caches\a", None)),
        (r"C:\caches\a:0.5", (r"C:\caches\a", 0.5)),
        ("http://host:8080/cache", ("http://host:8080/cache", None)),
        ("run:3:1", ("run:3", 1.0)),
        ("a:0,5", ("a:0,5", None)),
        ("a:1_0", ("a:1_0", None)),
        ("a:", ("a:", None)),
    ],
)
def test_weight_is_the_number_after_the_last_colon(text: str, expected: tuple[str, float | None]):
    assert parse_weight(text) == expected


@pytest.mark.parametrize("number", ["0", "-1", "0.0", "nan", "NaN", "inf", "-inf", "1e999"])
def test_weight_must_be_positive_and_finite(number: str):
    with pytest.raises(ConfigError, match=rf"cache.? a:{number}: .*{number}, expected a positive number"):
        parse_weight(f"a:{number}")


def test_directory_name_that_ends_like_a_weight(tmp_path: Path):
    (tmp_path / "run:3").mkdir()
    assert parse_weight(f"{tmp_path}/run:3") == (f"{tmp_path}/run:3", None)
    assert parse_weight(f"{tmp_path}/run:3:0.5") == (f"{tmp_path}/run:3", 0.5)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="both .*run and .*run:3 .*run:3:1"):
        parse_weight(f"{tmp_path}/run:3")


def test_all_or_no_caches_have_a_weight(tmp_path: Path):
    with pytest.raises(ConfigError, match="b: .*weight.*b:1"):
        open_mix([f"{tmp_path}/a:1", f"{tmp_path}/b"])


def test_the_same_cache_twice_is_refused(tmp_path: Path):
    made_up(tmp_path / "a", 4)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="link: .*same shards as .*a"):
        open_mix([f"{tmp_path}/a:1", f"{tmp_path}/link:2"])


def test_impossible_shares_are_refused(tmp_path: Path):
    caches = [made_up(tmp_path / "a", 40), made_up(tmp_path / "b", 4, share=0.0)]
    with pytest.raises(ConfigError, match="b: .*share"):
        mix_of(caches, [1.0, 1.0])
    caches[1] = made_up(tmp_path / "c", 4)
    with pytest.raises(ConfigError, match=r"c: .*share of 1e-06"):
        mix_of(caches, [1.0, 1e-6])
    huge = mix_of(caches, [1e308, 1e308])
    assert [each.share for each in huge.portions] == [0.5, 0.5]


def test_planned_use_of_each_cache(tmp_path: Path):
    caches = [made_up(tmp_path / "a", 40, lengths=(10, 10)), made_up(tmp_path / "b", 10, lengths=(10, 10))]
    mix = mix_of(caches, [1.0, 1.0])
    assert [each.rows for each in mix.portions] == [25, 25] and mix.rows == 50
    assert (mix.tokens, mix.loss_tokens) == (500, 450)
    a, b = mix.seen(100)
    assert (a["passes"], b["passes"]) == (50 / 40, 50 / 10)
    assert (a["rows"], a["tokens"], a["loss_tokens"]) == (50, 500, 450)
    assert b == {**b, "cache": str(tmp_path / "b"), "weight": 1.0, "share": 0.5, "rows_per_epoch": 25}


# -- checks of agreement ----------------------------------------------------------------------------------------------

HIDDEN = {"layers": [1, 2], "teacher_layers": 2, "width": 8, "dtype": "float16", "every": 1}


def recipe(one: cf.Cache, other: cf.Cache, **options: Any) -> tuple[str, list[str]]:
    found, warnings = loss_for_mix(
        mix_of([one, other], [None, None]),
        **{"kd_weight": 0.9, "tail": None, "divergence": "forward-kl", **options},
    )
    return found.tail, warnings


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 900}, ["vocabulary size 1,000 against 900"]),
        ({"tokenizer": {"vocabulary": "c" * 64, "segmentation": "b" * 64}}, ["vocabulary aaaaaaaa… against cccccccc…"]),
        ({"alignment": "same"}, [r"alignment next \(causal\) against same \(masked\)"]),
        ({"targets": {**TOP_K, "temperature": 2.0}}, ["temperature 1.0 against 2.0"]),
        ({"targets": THRESHOLD}, ["tail policy bucket against sampled", "tail.bucket"]),
        (
            {"vocab_size": 900, "alignment": "same", "targets": {**THRESHOLD, "temperature": 2.0}},
            ["vocabulary size", "alignment", "temperature", "tail policy"],
        ),
    ],
)
def test_error_lists_all_differences_that_matter(tmp_path: Path, changes: dict[str, Any], words: list[str]):
    one, other = made_up(tmp_path / "a", 4), made_up(tmp_path / "b", 4, seed=1, **changes)
    for word in (*words, f"{one.path} and {other.path} differ in"):
        with pytest.raises(cf.MismatchError, match=word):
            recipe(one, other)


def test_targets_of_different_kinds_are_mixed_if_one_policy_supports_both(tmp_path: Path):
    one = made_up(tmp_path / "a", 4)
    other = made_up(tmp_path / "b", 4, seed=1, targets=THRESHOLD)
    tail, warnings = recipe(one, other, tail="bucket")
    assert tail == "bucket" and len(warnings) == 1
    assert "threshold, τ = 0.4, K = 1" in warnings[0] and "top-k, K = 2" in warnings[0]
    with pytest.raises(ConfigError, match="tail.? ?sampled.*a has top-k targets"):
        recipe(one, other, tail="sampled")
    finer = made_up(tmp_path / "c", 4, seed=2, targets={**THRESHOLD, "tail_threshold": 0.39})
    assert recipe(other, finer) == ("sampled", [])  # both unbiased
    random = made_up(tmp_path / "d", 4, seed=3, targets={**THRESHOLD, "kind": "random", "draws": 3})
    assert recipe(other, random) == ("sampled", [])
    with pytest.raises(cf.MismatchError, match="tail policy bucket against sampled"):
        recipe(one, random)


def test_caches_of_different_teachers_give_a_warning(tmp_path: Path):
    one = made_up(tmp_path / "a", 4)
    other = made_up(tmp_path / "b", 4, seed=1, teacher={"name": "another", "weights_fingerprint": "1"})
    (warning,) = recipe(one, other)[1]
    assert all(words in warning for words in (str(one.path), str(other.path), "a different teacher"))


def test_hidden_states_must_agree_if_they_are_used(tmp_path: Path):
    def cache(name: str, hidden: dict[str, Any] | None) -> cf.Cache:
        # Only the metadata is changed, as no row is read.
        made = made_up(tmp_path / name, 4, seed=len(name))
        made.metadata.__dict__["hidden"] = None if hidden is None else cf.HiddenSpec.from_json(hidden)
        return made

    one = cache("a", HIDDEN)
    features = HiddenStateLoss.for_cache(one, loss="mse", weight=None, layer_map="last")
    assert recipe(one, cache("ab", {**HIDDEN, "layers": [2]}), hidden=features)[1] == []
    changed = {"width": 4, "dtype": "int8", "every": 2, "layers": [1]}
    with pytest.raises(cf.MismatchError) as caught:
        recipe(one, cache("abc", {**HIDDEN, **changed}), hidden=features)
    for words in ("width 8 against 4", "dtype float16 against int8", "every 1 against 2", r"layers [2] against []"):
        assert f"hidden {words}" in str(caught.value)
    with pytest.raises(cf.MismatchError, match=r"hidden layers \[2\] against none"):
        recipe(one, cache("abcd", None), hidden=features)
    assert recipe(one, cache("abcde", None))[1] == []


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """chats: conversations with loss tokens in the answers; text: all tokens are loss tokens; gpt2.json has dropout."""
    folder = tmp_path_factory.mktemp("mixture")
    write_jsonl(folder / "chats.jsonl", conversations(12))
    (folder / "text.txt").write_text(english(16, seed=5))
    for name, data in (("chats", "chats.jsonl"), ("text", "text.txt")):
        build_cache(folder / name, teacher_dir, folder / data, rows_per_shard=8)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    config.to_json_file(folder / "gpt2.json")
    return folder


OPTIONS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": 2,
    "save_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


def mixture(folder: Path, chats: float = 0.7, text: float = 0.3) -> tuple[str, ...]:
    return f"{folder / 'chats'}:{chats}", f"{folder / 'text'}:{text}"


def run(output: Path, cache: str | tuple[str, ...], **options: Any) -> Any:
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    return train_student(TrainStudentConfig(cache=cache, output=str(output), device="cpu", **options), **callbacks)


@pytest.mark.slow
def test_resume_with_more_workers_is_exact(folder: Path, tmp_path: Path):
    options = {**OPTIONS, "student_config": str(folder / "gpt2.json")}
    logs: list[dict[str, Any]] = []
    whole = run(tmp_path / "whole", mixture(folder), on_log=logs.append, **options)
    assert whole.steps > 8
    for stop, resume, workers in ((4, False, 0), (7, True, 2)):  # step 6 is inside an epoch
        with pytest.raises(KeyboardInterrupt):
            stopping = {"on_step": Stop(stop), "resume": resume, "dataloader_num_workers": workers}
            run(tmp_path / "parts", mixture(folder), **stopping, **options)
    parts = run(tmp_path / "parts", mixture(folder), resume=True, dataloader_num_workers=1, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0
    assert [e["loss"] for e in log_history(tmp_path / "whole")[:-1]] == [
        e["loss"] for e in log_history(tmp_path / "parts")[:-1]
    ]

    # The plan is logged before the run and recorded; the record has the actual use afterwards.
    planned = logs[0]["mixture"]
    record = json.loads((tmp_path / "parts/distill_config.json").read_text())
    assert record["mixture"] == record["seen"] == parts.mixture == whole.mixture == planned
    assert [each["cache"] for each in planned] == [str(folder / "chats"), str(folder / "text")]
    assert [each["weight"] for each in planned] == [each["share"] for each in planned] == [0.7, 0.3]
    assert sum(each["rows"] for each in planned) == 2 * sum(each["rows_per_epoch"] for each in planned)
    assert planned[0]["passes"] > 2 > planned[1]["passes"]
    counted = [each["loss_tokens"] for each in planned]
    assert counted[0] / sum(counted) == pytest.approx(0.7, abs=0.02)

    (tmp_path / "parts/trainer_state.json").unlink()
    for change, words in (
        ({"cache": mixture(folder, 0.6, 0.4)}, r"rows per epoch .* were \[\d+, \d+\], are \[\d+, \d+\]"),
        ({"cache": mixture(folder)[::-1]}, "does not have the targets of"),
        ({"cache": str(folder / "chats")}, "does not have the targets of"),
        ({"gradient_accumulation_steps": 1}, "a step had 4 rows, has 2: `batch_size` times"),
    ):
        with pytest.raises(cf.MismatchError, match=words):
            run(tmp_path / "parts", resume=True, **{"cache": mixture(folder), **options, **change})
    # The same rows per step and the same weights, given in another way.
    changed = {**options, "batch_size": 4, "gradient_accumulation_steps": 1}
    run(tmp_path / "parts", mixture(folder, 7, 3), resume=True, **changed)


def test_mixture_of_one_cache_equals_the_cache(folder: Path, tmp_path: Path, student_dir: Path):
    options = {"student": str(student_dir), "max_steps": 4, "learning_rate": 1e-2}
    for name, cache in (("plain", f"{folder / 'text'}"), ("weighted", f"{folder / 'text'}:0.2")):
        summary = run(tmp_path / name, cache, **options)
        assert summary.mixture == []
    plain, weighted = (json.loads((tmp_path / n / "distill_config.json").read_text()) for n in ("plain", "weighted"))
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "weighted")) == 0.0
    assert plain["cache"] == weighted["cache"] and plain.keys() == weighted.keys() == {
        "arithmetic",
        "cache",
        "config",
        "eval_cache",
        "given",
        "resolved",
        "rows_per_step",
        "student_fingerprint",
    }


def test_mixture_without_weights_sees_each_row_once_per_epoch(
    folder: Path, tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, int]] = []
    getitem = CacheDataset.__getitem__
    monkeypatch.setattr(
        CacheDataset, "__getitem__", lambda self, i: seen.append((self.cache.path, i)) or getitem(self, i)
    )
    paths = tuple(str(folder / name) for name in ("chats", "text"))
    run(tmp_path / "student", paths, student=str(student_dir))
    assert sorted(seen) == [(path, row) for path in paths for row in range(len(cf.open_cache(path)))]
    sizes = [len(cf.open_cache(path)) for path in paths]
    batches = [[path for path, _ in seen[i : i + 8]] for i in range(0, sum(sizes) - 7, 8)]
    assert len(batches) > 2
    for batch in batches:
        assert abs(batch.count(paths[0]) - 8 * sizes[0] / sum(sizes)) < 1


def test_mixture_with_hidden_states_and_samples(folder: Path, tmp_path: Path, teacher_dir: Path, student_dir: Path):
    rule = TargetRule(kind="threshold", tail_threshold=0.1, samples=2)
    for name, data in (("a", "chats.jsonl"), ("b", "text.txt")):
        build_cache(tmp_path / name, teacher_dir, folder / data, targets=rule, hidden=HiddenRule(layers="1,2"))
    cache = (f"{tmp_path / 'a'}:1", f"{tmp_path / 'b'}:1")
    options = {"student": str(student_dir), "epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
    run(tmp_path / "s", cache, hidden_loss="mse", layer_map="last", resample=True, **options)
    logs = [entry for entry in log_history(tmp_path / "s") if "features" in entry]
    assert logs[-1]["features"] < logs[0]["features"] and logs[-1]["kl"] < logs[0]["kl"]
    with pytest.raises(ConfigError, match="chats has only one tail sample"):
        run(tmp_path / "t", (str(tmp_path / "a"), str(folder / "chats")), resample=True, tail="bucket", **options)


@pytest.mark.long
def test_mixture_with_another_tokenizer(folder: Path, tmp_path: Path):
    student = tiny_llama(tmp_path / "foreign", tiny_tokenizer(330, seed=7), layers=1, hidden=16, seed=3)
    stages: list[str] = []
    options = {"student": str(student), "epochs": 4, "learning_rate": 1e-2, "logging_steps": 1}
    run(tmp_path / "s", mixture(folder), cross_tokenizer="project", on_stage=stages.append, **options)
    assert sum(stage.startswith("re-tokenising the text of") for stage in stages) == 2
    losses = [entry["loss"] for entry in log_history(tmp_path / "s") if "loss" in entry]
    assert losses[-1] < losses[0]


def test_command_line_mixes_caches(folder: Path, tmp_path: Path, student_dir: Path):
    chats, text = mixture(folder, 3, 1)
    words = ["train-student", "--cache", chats, "--cache", text, "--student", str(student_dir), "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "s"), "--epochs", "1.5"])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{folder / 'chats'}: 75.0% ")]
    assert " rows an epoch · " in line and " passes, " in line
    assert f"trained on     75.0% {folder / 'chats'}, " in result.stdout
    # 9 steps with 6 per epoch, the last of which has 4 rows instead of 8
    assert ", 1.55 times, in float32 on cpu …" in result.stderr
    refused = CliRunner().invoke(main, [*words[:3], "--cache", f"{folder / 'text'}", *words[5:], "--output", "new"])
    assert refused.exit_code == 1 and "has no weight" in refused.stderr
