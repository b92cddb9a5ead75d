"""The pictures of docs/choosing.md: their numbers are those of the teacher and of a cache."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_format as cf
from benchmarks import position
from pages import ROOT, blocks
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.text.data_config import DataConfig

PAGE = "docs/choosing.md"
TEXT, LABEL = "Anna sold three baskets near the", " river"
NUMBER = r"<?\d*\.\d+|\d[\d,]*"


@pytest.fixture(scope="module")
def found(teacher_dir: Path) -> position.Position:
    return position.look(teacher_dir, TEXT, LABEL)


@pytest.fixture(scope="module")
def logits(teacher_dir: Path) -> np.ndarray:
    """[V] float64, by the model's own forward."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0, -1].numpy()


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def rows(picture: str) -> list[tuple[str, list[float]]]:
    """The name and the numbers of each row; names are not unique, a tiny model's tokens are pieces of characters."""
    found = []
    for line in picture.splitlines()[2:]:
        name, _, rest = line.partition("  ")
        numbers = re.findall(rf"(?<!\S)({NUMBER})(?!\S)", rest)
        found.append((name, [float(number.strip("<").replace(",", "")) for number in numbers]))
    return found


def test_probabilities_are_those_of_the_model(found: position.Position, logits: np.ndarray) -> None:
    for temperature in position.TEMPERATURES:
        np.testing.assert_allclose(found.probs(temperature), softmax(logits, temperature), atol=1e-6)


def test_the_loss_asks_for_the_weighted_mean_of_both_targets(found: position.Position, logits: np.ndarray) -> None:
    probs, shown = softmax(logits, 1.0), rows(position.hard_and_soft(found))
    best = np.argsort(-probs)[: position.SHOWN]
    assert [found.name(int(i)) for i in best] == [name for name, _ in shown[:-1]]
    for i, (_, (hard, soft, both)) in zip(best, shown[:-1], strict=True):
        assert hard == float(i == found.label)
        assert (soft, both) == pytest.approx((probs[i], 0.9 * probs[i] + 0.1 * hard), abs=0.00051)
    # And so does the gradient of (1 − α)·CE + α·KL: softmax(z) − target.
    z = torch.randn(len(probs), dtype=torch.float64, requires_grad=True)
    p, log_q = torch.from_numpy(probs), torch.log_softmax(z, 0)
    (0.1 * -log_q[found.label] + 0.9 * (p * (p.log() - log_q)).sum()).backward()
    target = 0.9 * p + 0.1 * torch.eye(len(probs))[found.label]
    torch.testing.assert_close(z.grad, z.detach().softmax(0) - target)


def test_temperatures_by_hand(found: position.Position, logits: np.ndarray) -> None:
    *_, rest, held, entropy, equal = (numbers for _, numbers in rows(position.temperatures(found)))
    most_likely = rows(position.temperatures(found))[0]
    tempered = [softmax(logits, t) for t in position.TEMPERATURES]
    assert held == pytest.approx([np.sort(p)[-64:].sum() for p in tempered], abs=0.00051)
    assert entropy == pytest.approx([-(p * np.log(p)).sum() for p in tempered], abs=0.0051)
    assert equal == [pytest.approx(math.log(len(logits)), abs=0.0051)]
    assert rest == pytest.approx([1 - p[np.argsort(-logits)[: position.SHOWN]].sum() for p in tempered], abs=0.00051)
    best = int(logits.argmax())
    assert most_likely == (found.name(best), pytest.approx([p[best] for p in tempered], abs=0.00051))


@pytest.mark.long
@pytest.mark.parametrize("name", position.RULES)
def test_what_is_stored_is_what_a_cache_stores(
    name: str, found: position.Position, teacher_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT + LABEL, encoding="utf-8")
    data = DataConfig(data=str(tmp_path / "text.txt"), seq_len=64)
    output = str(tmp_path / "cache")
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(teacher_dir), data=data, output=output, targets=position.RULES[name], device="cpu"
        )
    )
    targets = cf.open_cache(output)[0].targets
    ids, logprobs = targets.at(found.index)
    exact = int(targets.exact_counts[found.index])
    pairs = list(zip(ids.tolist(), np.exp(logprobs.astype(np.float64)), strict=True))
    stored = position.stored(found, position.RULES[name])
    assert stored.exact == pytest.approx(dict(pairs[:exact])) and stored.sampled == pytest.approx(dict(pairs[exact:]))
    assert stored.tail_mass == pytest.approx(math.exp(targets.residual_logprob[found.index]))
    column = 2 + list(position.RULES).index(name)
    counts = [(exact, "exact"), (len(ids) - exact, "sampled")]
    (line,) = [line for line in position.kinds(found).splitlines() if line.startswith("entries")]
    assert re.split(r"\s{2,}", line)[column] == " + ".join(f"{n} {what}" for n, what in counts if n)


def test_the_command_replaces_the_pictures_of_a_page(teacher_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    titles = [block.splitlines()[0] for block in blocks(PAGE, "text")[:3]]
    page.write_text(
        "".join(f"before\n\n```text\n{title}\nto be replaced\n```\n\nafter\n" for title in titles), encoding="utf-8"
    )
    words = ["--teacher", str(teacher_dir), "--text", TEXT, "--label", LABEL]
    printed = CliRunner().invoke(position.main, words, catch_exceptions=False).stdout
    assert CliRunner().invoke(position.main, [*words, "--page", str(page)], catch_exceptions=False).exit_code == 0
    written = page.read_text(encoding="utf-8")
    assert "to be replaced" not in written and written.count("before") == written.count("after") == 3
    assert "\n\n".join(re.findall(r"```text\n(.*?)\n```", written, flags=re.DOTALL)) == printed.rstrip("\n")
    with pytest.raises(click.ClickException, match="found 0 ```text blocks that begin with 'Temperature', expected 1"):
        position.replace_pictures("no pictures", ["Temperature\n…"])


def test_the_pages_own_numbers_agree_with_one_another() -> None:
    pictures = blocks(PAGE, "text")
    hard_soft, kinds, temperatures = (dict(rows(picture)) for picture in pictures[:3])
    for hard, soft, both in hard_soft.values():
        assert both == pytest.approx(0.9 * soft + 0.1 * hard, abs=0.00101)
    assert sum(soft for _, soft, _ in hard_soft.values()) == pytest.approx(1.0, abs=0.0035)
    prose = (ROOT / PAGE).read_text(encoding="utf-8")
    assert f"p = {kinds['beam'][0]:.3f}".replace("0.", ".") in prose
    assert f"other {list(hard_soft)[-1].removesuffix(' others')} tokens" in prose
    assert f"hold {temperatures['64 most likely'][2]:.0%}".replace("%", " %") in prose


@pytest.mark.real
def test_the_pictures_of_the_page_are_the_teachers() -> None:
    directory = os.environ.get("DISTILL_REAL_TEACHER", "demo-output/teacher")
    if not (Path(directory) / "config.json").is_file():
        pytest.skip(f"no teacher in {directory}: `make demo`, or set DISTILL_REAL_TEACHER")
    found = position.pictures(position.look(Path(directory)))
    page = blocks(PAGE, "text")
    for picture in found:
        (shown,) = [block for block in page if block.startswith(picture.splitlines()[0])]
        words, expected = shown.split(), picture.split()
        assert len(words) == len(expected)
        for word, other in zip(words, expected, strict=True):
            if re.fullmatch(r"\d*\.\d+", other):  # rounding on another machine
                assert float(word) == pytest.approx(float(other), abs=0.0011)
            elif not set(other) <= set("▏▎▍▌▋▊▉█▒"):
                assert word == other
