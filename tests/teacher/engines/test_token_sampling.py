"""How a token is chosen, and what a text that grows by a token at a time says: against dense arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_heads import LINEAR, OWN, SHAPE, V, build
from torch import Tensor
from transformers import Gemma2Config, Gemma3TextConfig, PretrainedConfig

from generating import truncated_distribution
from pipeline.errors import ModelError
from pipeline.models.head import Head, open_head
from pipeline.teacher.engines.decoding import Decoding, check_decoding
from pipeline.teacher.engines.token_sampling import draw, truncated
from pipeline.teacher.targets.philox import uniforms

# -- one token --------------------------------------------------------------------------------------------------------


def teacher_logits(vocab: int, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_p, most", [(1.0, 0), (0.9, 0), (0.5, 0), (1.0, 7), (0.8, 7), (1e-6, 0), (1.0, 1)])
@pytest.mark.parametrize("vocab, scale", [(70, 2.0), (3000, 1.0)])
def test_a_grid_of_numbers_gives_every_token_its_share(
    vocab: int, scale: float, top_p: float, most: int, temperature: float
) -> None:
    """Of n evenly spaced numbers a token gets n·p, rounded up or down: no chance in it, so no tolerance either."""
    logits, n = teacher_logits(vocab, scale), 4096
    expected = n * truncated_distribution(logits.double().numpy(), temperature, top_p, most)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = torch.cat(
        [
            draw(logits.expand(len(part), -1), part, temperature=temperature, top_p=top_p, most=most)
            for part in grid.split(512)
        ]
    )
    found = np.bincount(tokens.numpy(), minlength=vocab)
    assert np.abs(found - expected).max() < 1 + n * 1e-5
    assert (found[expected == 0] == 0).all()


def test_a_flat_distribution_takes_more_than_the_first_candidates() -> None:
    logits = 0.01 * teacher_logits(3000, 1.0)
    values, _ = truncated(torch.softmax(logits, dim=0)[None], 0.9, 0)
    assert 2650 < (values > 0).sum() < 2720


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.stack([teacher_logits(300, 1.0, seed) for seed in range(20)])
    assert torch.equal(draw(logits, torch.rand(20, dtype=torch.float64), temperature=0.0), logits.argmax(dim=1))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"most": 3}])
def test_the_largest_and_smallest_numbers_find_tokens_that_may_be_drawn(options: dict[str, float]) -> None:
    logits = torch.full((2, 100), -torch.inf)
    logits[:, 40:44] = torch.tensor([3.0, 2.0, 1.0, 0.5])
    numbers = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert set(draw(logits, numbers, temperature=1.0, **options).tolist()) <= {40, 41, 42, 43}


def test_a_token_depends_on_its_own_row_alone() -> None:
    logits = torch.stack([teacher_logits(3000, scale, seed) for seed, scale in enumerate((0.01, 1.0, 3.0, 6.0))])
    numbers = torch.from_numpy(uniforms(3, np.arange(4), np.zeros(4, int), 1)[:, 0])
    together = draw(logits, numbers, temperature=1.0, top_p=0.95)
    alone = [
        int(draw(row[None], number[None], temperature=1.0, top_p=0.95))
        for row, number in zip(logits, numbers, strict=True)
    ]
    assert together.tolist() == alone


def test_draws_with_the_numbers_of_many_answers_have_the_right_frequencies() -> None:
    """χ² over 20,000 answers. False alarm: below 1e-9 over seeds (Laurent and Massart 2000, lemma 1); this is one."""
    logits, n, p_alarm = teacher_logits(70, 1.5), 20_000, 1e-9
    p = truncated_distribution(logits.double().numpy(), 0.8, 0.9, 0)
    numbers = torch.from_numpy(uniforms(11, np.arange(n), np.full(n, 5), 1, stream=2)[:, 0])
    found = np.bincount(draw(logits.expand(n, -1), numbers, temperature=0.8, top_p=0.9).numpy(), minlength=70)
    drawn = p > 0
    degrees = int(drawn.sum()) - 1
    assert degrees > 8 and (found[~drawn] == 0).all() and (n * p[drawn]).min() > 20
    statistic = float((np.square(found - n * p)[drawn] / (n * p)[drawn]).sum())
    x = -math.log(p_alarm)
    assert statistic < degrees + 2 * math.sqrt(degrees * x) + 2 * x


# -- growing texts ----------------------------------------------------------------------------------------------------

SLIDING: dict[str, PretrainedConfig] = {
    "gemma2, window of 6": Gemma2Config(**SHAPE, head_dim=16, sliding_window=6),
    "gemma3, window of 6": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=6),
}
ARCHITECTURES = {**LINEAR, **OWN, **SLIDING}
NEW_TOKENS = 9


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_states_are_those_of_one_pass_over_the_whole_text(name: str) -> None:
    """Prompts of different lengths in one batch, one taken twice, one that leaves on the way."""
    head = open_head(build(ARCHITECTURES[name]), V)
    check_decoding(head, padding=True)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, V, n) for n in (4, 13, 8)]
    active = [2, 0, 1, 0]  # prompt of each sequence
    endings = rng.integers(0, V, (len(active), NEW_TOKENS))
    growing = Decoding(head, prompts)
    growing.select(active)
    texts = [np.concatenate([prompts[prompt], ending]) for prompt, ending in zip(active, endings, strict=True)]
    there = list(range(len(texts)))
    for step in range(NEW_TOKENS + 1):
        for i, state in zip(there, growing.hidden, strict=True):
            length = len(texts[i]) - NEW_TOKENS + step
            ids = torch.from_numpy(texts[i][:length])[None]
            expected = head.hidden_states(ids, torch.arange(length)[None])[0, -1]
            torch.testing.assert_close(state, expected, rtol=0, atol=2e-4)
        if step == 4:
            there = [there[i] for i in (0, 1, 3)]
            growing.select([0, 1, 3])
        if step < NEW_TOKENS:
            growing.advance(torch.tensor([endings[i][step] for i in there]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capping", "gpt2"])
def test_other_dtypes_are_not_refused_for_their_rounding(name: str, dtype: torch.dtype) -> None:
    check_decoding(open_head(build(ARCHITECTURES[name], dtype), V), padding=True)


def broken(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Head:
    """A Llama whose decoder is given something else than it was told."""
    head = open_head(build(LINEAR["llama"]), V)
    forward = head.model.model.forward

    def changed(*args: object, **given: object) -> object:
        return forward(*args, **{name: changes.get(name, value) for name, value in given.items()})

    monkeypatch.setattr(head.model.model, "forward", changed)
    return head


def test_a_model_that_sees_padding_is_refused_unless_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    head = broken(monkeypatch, attention_mask=None)
    check_decoding(head, padding=False)
    with pytest.raises(ModelError, match="of a padded batch differ .* Use `batch_size` 1"):
        check_decoding(head, padding=True)


@pytest.mark.parametrize("padding", [False, True])
def test_a_model_that_forgets_what_came_before_is_refused(monkeypatch: pytest.MonkeyPatch, padding: bool) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM.*key-value cache"):
        check_decoding(broken(monkeypatch, past_key_values=None), padding=padding)


def test_a_model_without_a_key_value_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head = open_head(build(LINEAR["llama"]), V)

    def forward(input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        return (torch.zeros((*input_ids.shape, 32)),)

    monkeypatch.setattr(head.model.model, "forward", forward)
    with pytest.raises(ModelError, match="cannot be used with `generate`. Use another teacher"):
        check_decoding(head, padding=True)
