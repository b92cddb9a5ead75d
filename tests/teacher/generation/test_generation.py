"""What `cache-teacher --generate` caches is what the teacher says of what it wrote, however it was written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

import cache_format as cf
from dense import check_row
from generating import answers_of, generate, load, logprobs_of, token_ids, truncated_distribution
from pipeline.errors import DataError, ModelError
from pipeline.models.head import Head
from pipeline.teacher.engines.answer_writer import AnswerWriter
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.chat.turns import end_of_turn
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from sampled import threshold
from tiny import CHAT_TEMPLATE, EOS, IM_END, tiny_llama, write_jsonl

QUESTIONS = [
    "Go on: the miller",
    "Why?",
    "The old captain counted nine apples near the river, because my sister",
    "A",
    "",
]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts of very different lengths, and an empty one."""
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])


# -- equal to the teacher ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("sampling", [{}, SAMPLED, {"temperature": 0.0}], ids=["raw", "truncated", "greedy"])
def test_logprobs_and_targets_equal_a_second_plain_forward(
    sampling: dict[str, float], padded_teacher_dir: Path, prompts: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    """To 1e-4 in fp32: of the raw distribution, however the tokens were drawn; V without padded rows."""
    number = 1 if sampling.get("temperature") == 0.0 else 5
    generate(padded_teacher_dir, prompts, tmp_path / "cache", answers_per_prompt=number, **sampling)
    cache, model = cf.open_cache(tmp_path / "cache"), load(padded_teacher_dir)
    assert cache.metadata.vocab_size == 400 < model.lm_head.weight.shape[0]
    lines = answers_of(tmp_path / "cache")
    assert len(lines) == len(raw_rows) == len(cache) == number * (len(QUESTIONS) - 1)
    for line, raw, row in zip(lines, raw_rows, cache.iter_rows(), strict=True):
        expected = logprobs_of(model, row.input_ids, 400)
        check_row(row, expected, cache.metadata)
        positions = np.flatnonzero(row.loss_mask)
        of_tokens = expected[positions, row.input_ids[positions + 1]]
        np.testing.assert_allclose(line["token_logprobs"], of_tokens, rtol=0, atol=1e-4)
        assert line["mean_logprob"] == pytest.approx(of_tokens.mean(), abs=1e-4)
        for t in positions:
            ids, logprobs = raw.targets.at(int(t))
            np.testing.assert_allclose(logprobs, expected[t, ids], rtol=0, atol=1e-4)
            rest = np.delete(np.exp(expected[t]), ids).sum()
            assert raw.targets.residual_logprob[t] == pytest.approx(math.log(rest), abs=1e-4)


def test_targets_have_a_temperature_of_their_own(
    teacher_dir: Path, prompts: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    generate(teacher_dir, prompts, tmp_path / "cache", targets=TargetRule(top_k=8, temperature=2.0), temperature=0.5)
    model = load(teacher_dir)
    for line, row in zip(answers_of(tmp_path / "cache"), raw_rows, strict=True):
        plain, tempered = (logprobs_of(model, row.input_ids, 400, temperature) for temperature in (1.0, 2.0))
        for t, written in zip(np.flatnonzero(row.loss_mask), line["token_logprobs"], strict=True):
            ids, logprobs = row.targets.at(int(t))
            np.testing.assert_allclose(logprobs, tempered[t, ids], rtol=0, atol=1e-4)
            assert written == pytest.approx(plain[t, row.input_ids[t + 1]], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("rule", [threshold(0.05, samples=2), TargetRule(kind="random"), TargetRule(kind="top-p")])
def test_other_targets_agree_with_the_teacher_when_it_is_asked_again(
    rule: TargetRule, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    """Rows were left out, so a row's draws are those of its prompt and answer, not those of its number."""
    predicate = tmp_path / "keep.py"
    predicate.write_text("def odd(example, answer):\n    return answer.index % 2 == 1\n")
    generate(teacher_dir, prompts, tmp_path / "cache", targets=rule, answers_per_prompt=4, keep_if=f"{predicate}:odd")
    cf.verify_cache(tmp_path / "cache", deep=True)
    found = verify_against_teacher(
        TeacherCheckConfig(cache=str(tmp_path / "cache"), teacher=str(teacher_dir), device="cpu")
    )
    assert found.agrees and found.same_entries >= 0.98 and found.positions > 100


def test_the_loss_is_on_the_answer_and_on_nothing_else(
    teacher_dir: Path, prompts: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Hot, so that EOS is not rarer than other tokens.
    summary = generate(
        teacher_dir, prompts, tmp_path / "cache", answers_per_prompt=6, max_new_tokens=60, temperature=5.0
    )
    cache = cf.open_cache(tmp_path / "cache")
    ended = set()
    for line, row in zip(answers_of(tmp_path / "cache"), cache.iter_rows(), strict=True):
        prompt = tokenizer(QUESTIONS[line["document"]], add_special_tokens=False)["input_ids"]
        first, length = len(prompt), len(row.input_ids)
        assert row.input_ids[:first].tolist() == prompt and line["prompt_tokens"] == first
        # The prediction made from the last token of the prompt is the first that counts.
        assert row.loss_mask.tolist() == [first - 1 <= t < length - 1 for t in range(length)]
        assert row.label_ids[row.loss_mask].tolist() == row.input_ids[first:].tolist()
        assert row.segment_lengths.tolist() == [length] and len(line["token_logprobs"]) == length - first
        assert (line["stop_reason"] == "eos") == (row.input_ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in row.input_ids[first:-1]
        ended.add(line["stop_reason"])
    assert ended == {"eos", "length"} == {reason for reason, count in summary.stop_reasons.items() if count}
    assert summary.loss_tokens == cache.num_loss_tokens and summary.tokens == cache.num_tokens
    assert summary.corpus_report["empty_prompts"] == 1 and summary.rows == 24


# -- whatever the batch -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_answers_depend_neither_on_the_batch_nor_on_their_number(
    teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    found = []
    for i, options in enumerate(
        ({"batch_size": 20}, {"batch_size": 1}, {"batch_size": 3}, {"batch_size": 3, "answers_per_prompt": 2})
    ):
        generate(teacher_dir, prompts, tmp_path / str(i), **{"answers_per_prompt": 5, **SAMPLED, **options})
        found.append(token_ids(tmp_path / str(i)))
    assert len(found[0]) == 20 and len({tuple(answer) for answer in found[0].values()}) > 15
    assert found[0] == found[1] == found[2]
    assert found[3] == {place: answer for place, answer in found[0].items() if place[1] < 2}


def test_another_seed_gives_other_answers(teacher_dir: Path, prompts: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        generate(teacher_dir, prompts, tmp_path / str(seed), seed=seed)
    first, second = (token_ids(tmp_path / str(seed)) for seed in (0, 1))
    assert all(first[place] != second[place] for place in first)


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_answers_are_those_of_transformers(
    batch_size: int, teacher_dir: Path, chat_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    generate(
        teacher_dir,
        chat_file,
        tmp_path / "cache",
        temperature=0.0,
        batch_size=batch_size,
        max_new_tokens=30,
        seq_len=512,
    )
    model, cache = load(teacher_dir), cf.open_cache(tmp_path / "cache")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=stops, pad_token_id=0)
    for line, row in zip(answers_of(tmp_path / "cache"), cache.iter_rows(), strict=True):
        prompt = torch.from_numpy(row.input_ids[: line["prompt_tokens"]].astype(np.int64))[None]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        assert row.input_ids.tolist() == expected[0].tolist()


@pytest.mark.long
def test_first_tokens_have_the_truncated_frequencies_and_the_raw_targets(
    teacher_dir: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    """χ² over 1,500 answers. False alarm: below 1e-9 over seeds, and this seed is fixed."""
    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": QUESTIONS[0]}])
    n, options = 1500, {"temperature": 0.7, "top_p": 0.8}
    generate(teacher_dir, data, tmp_path / "cache", **options, answers_per_prompt=n, max_new_tokens=1, batch_size=500)
    expected = logprobs_of(load(teacher_dir), raw_rows[0].input_ids[:-1], 400)[-1]
    p = truncated_distribution(expected, 0.7, 0.8, 0)
    found = np.bincount([row.input_ids[-1] for row in raw_rows], minlength=400)
    drawn = p * n >= 5
    assert drawn.sum() > 10 and found.sum() == n
    assert (found[~drawn] == 0).all() and p[~drawn].sum() == 0
    p, found = p[drawn], found[drawn]
    x, degrees = -math.log(1e-9), len(p) - 1
    assert (np.square(found - n * p) / (n * p)).sum() < degrees + 2 * math.sqrt(degrees * x) + 2 * x
    for row in (raw_rows[0], raw_rows[-1]):
        ids, logprobs = row.targets.at(len(row.input_ids) - 2)
        np.testing.assert_allclose(logprobs, expected[ids], rtol=0, atol=1e-4)


# -- where an answer ends ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_stop_string_ends_an_answer_and_stays_in_its_tokens(
    teacher_dir: Path, prompts: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    generate(teacher_dir, prompts, tmp_path / "free", answers_per_prompt=8, max_new_tokens=40)
    free = {(line["document"], line["answer"]): line for line in answers_of(tmp_path / "free")}
    # Two strings that are written now and then; the first across several tokens.
    text = free[0, 0]["text"]
    across = next(text[i : i + 12] for i in range(5, len(text)) if text[i : i + 12].isascii())
    assert len(across) == 12 and not any(across in token for token in tokenizer.batch_decode([[i] for i in range(400)]))
    stops = (across, "he")
    whole = {
        place: tokenizer.decode(ids, skip_special_tokens=False) for place, ids in token_ids(tmp_path / "free").items()
    }
    generate(teacher_dir, prompts, tmp_path / "cut", answers_per_prompt=8, max_new_tokens=40, stop=stops)
    tokens, reasons = token_ids(tmp_path / "cut"), set()
    for line in answers_of(tmp_path / "cut"):
        place = line["document"], line["answer"]
        ids = tokens[place]
        reasons.add(line["stop_reason"])
        assert not any(stop in line["text"] for stop in stops)
        if line["stop_reason"] == "stop-string":
            assert whole[place].startswith(line["text"])
            rest = tokenizer.decode(ids, skip_special_tokens=False)[len(line["text"]) :]
            assert rest.startswith(stops)
            assert not any(stop in tokenizer.decode(ids[:-1], skip_special_tokens=False) for stop in stops)
        assert token_ids(tmp_path / "free")[place][: len(ids)] == ids
    assert reasons == {"stop-string", "length"}
    assert len(tokens[0, 0]) < len(token_ids(tmp_path / "free")[0, 0])


@pytest.mark.long
def test_the_end_of_a_turn_ends_an_answer_in_a_chat_only(
    teacher_dir: Path, prompts: Path, chat_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert end_of_turn(tokenizer) == IM_END
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)
    for data, expected in ((prompts, [eos]), (chat_file, [eos, turn])):
        output = tmp_path / data.stem
        options = {
            "answers_per_prompt": 8,
            "max_new_tokens": 60,
            "temperature": 5.0,
            "max_documents": 5,
            "seq_len": 512,
        }
        generate(teacher_dir, data, output, **options)
        assert cf.open_cache(output).metadata.corpus["generation"]["stop_tokens"] == expected
        last = {ids[-1] for ids in token_ids(output).values()}
        assert set(expected) <= last
        for ids in token_ids(output).values():
            assert not set(expected) & set(ids[:-1])
    assert any(turn in ids for ids in token_ids(tmp_path / prompts.stem).values())


def test_tokens_that_the_model_calls_an_end(tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "teacher", tokenizer, seed=1)
    ends = [tokenizer.eos_token_id, 40, 41, 42, 43, 44]
    settings = GenerationConfig(
        eos_token_id=ends, repetition_penalty=1.7, suppress_tokens=[50], do_sample=True, temperature=0.3
    )
    settings.save_pretrained(tmp_path / "teacher")
    generate(tmp_path / "teacher", prompts, tmp_path / "cache", answers_per_prompt=10)
    assert cf.open_cache(tmp_path / "cache").metadata.corpus["generation"]["stop_tokens"] == ends
    model = load(tmp_path / "teacher")
    for line, row in zip(answers_of(tmp_path / "cache"), cf.open_cache(tmp_path / "cache").iter_rows(), strict=True):
        assert (line["stop_reason"] == "eos") == (row.input_ids[-1] in ends)
        # The rest of a model's own generation settings changes nothing.
        expected = logprobs_of(model, row.input_ids, 400)
        positions = np.flatnonzero(row.loss_mask)
        of_tokens = expected[positions, row.input_ids[positions + 1]]
        np.testing.assert_allclose(line["token_logprobs"], of_tokens, rtol=0, atol=1e-4)


def test_prompt_and_answer_fit_into_a_row_and_long_prompts_are_counted(
    teacher_dir: Path, prompts: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [len(tokenizer(text)["input_ids"]) for text in QUESTIONS]
    summary = generate(teacher_dir, prompts, tmp_path / "cache", seq_len=max(lengths), answers_per_prompt=3)
    cache = cf.open_cache(tmp_path / "cache")
    assert summary.corpus_report["long_prompts"] == 1 and summary.answers == 9
    assert {line["document"] for line in answers_of(tmp_path / "cache")} == {0, 1, 3}
    assert max(len(row.input_ids) for row in cache.iter_rows()) <= max(lengths)
    with pytest.raises(DataError, match="no prompt to answer: 1 are empty, 4 have 2 tokens or more"):
        generate(
            teacher_dir,
            write_jsonl(
                tmp_path / "long.jsonl", [{"prompt": text + " a"} for text in QUESTIONS[:4]] + [{"prompt": ""}]
            ),
            tmp_path / "none",
            seq_len=2,
        )
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.answers").exists()


# -- what the teacher is asked ----------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who carried snow?"},
    {"role": "assistant", "content": "SECRET"},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho carried snow?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"messages": CONVERSATION}, RENDERED),
        ({"messages": CONVERSATION[:2]}, RENDERED),
        ({"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}, RENDERED),
        ({"prompt": "Who carried", "completion": " SECRET"}, "Who carried"),
        ({"prompt": "Who carried", "answer": "SECRET"}, "Who carried"),
        ({"text": "Who carried", "note": "SECRET"}, "Who carried"),
    ],
)
def test_the_teacher_is_shown_the_question_alone(
    record: dict[str, object],
    expected: str,
    teacher_dir: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [record, record])
    keep = tmp_path / "keep.py"
    keep.write_text(
        "def told(example, answer):\n"
        "    assert 'SECRET' in str(example) or len(example['messages']) == 2, example\n"
        "    return True\n"
    )
    generate(teacher_dir, data, tmp_path / "cache", keep_if=f"{keep}:told")
    row, line = cf.open_cache(tmp_path / "cache")[0], answers_of(tmp_path / "cache")[0]
    assert tokenizer.decode(row.input_ids[: line["prompt_tokens"]]) == expected


def test_bos_stands_before_a_prompt_and_eos_not_behind_it(tmp_path: Path, prompts: Path) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(add_bos=True)
    tiny_llama(tmp_path / "teacher", tokenizer, seed=1)
    generate(tmp_path / "teacher", prompts, tmp_path / "cache")
    for row, line in zip(cf.open_cache(tmp_path / "cache").iter_rows(), answers_of(tmp_path / "cache"), strict=True):
        shown = row.input_ids[: line["prompt_tokens"]].tolist()
        assert shown == tokenizer(QUESTIONS[line["document"]])["input_ids"] and shown[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHAT_TEMPLATE, IM_END),
        (CHAT_TEMPLATE.replace("message['content'] +", "message['content'] | trim +"), IM_END),
        ("{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }}{% else %}A {% generation %}"
         "{{ m['content'] + '<|eos|>' }}{% endgeneration %}{% endif %}{% endfor %}", EOS),
        ("{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }}{% else %}A {% generation %}"
         "{{ m['content'] + '<|eos|>\n' }}{% endgeneration %}{% endif %}{% endfor %}", EOS),
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", ""),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", ""),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_read_off_the_template(
    template: str, expected: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert end_of_turn(tokenizer) == expected


def test_a_malformed_row_is_found_out_before_the_first_answer(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnswerWriter, "write", None)
    records = [{"messages": CONVERSATION}] * 200 + [{"messages": [{"role": "user", "content": None}]}]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(DataError, match="row 200, column 'messages', message 0"):
        generate(teacher_dir, data, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_logits_that_are_no_numbers_stop_the_run(
    teacher_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    logits = Head.logits

    def spoiled(self: Head, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        result = logits(self, hidden, out)
        if out is not None:
            calls += 1
            if calls == 3:
                result[1, 7] = torch.nan
        return result

    monkeypatch.setattr(Head, "logits", spoiled)
    with pytest.raises(ModelError, match="answer 0, after 2 tokens: the teacher's logits hold NaN"):
        generate(teacher_dir, prompts, tmp_path / "cache")
