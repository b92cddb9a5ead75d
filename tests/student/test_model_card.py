"""The README.md of a student: metadata that the hub reads, metrics, and that an edited one is kept."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.evaluation.intervals import Metric
from pipeline.student.model_card import README, HeldOut, Origin, add_metrics, is_replaceable, write_card
from runs import build_cache, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    return build_cache(tmp_path_factory.mktemp("card") / "heldout", teacher_dir, text_file)


def held_out(cache: str, relation: str = "full", error: float | None = None, **metrics: float) -> HeldOut:
    found = {name: Metric(value=value, error=error, relation=relation) for name, value in metrics.items()}
    return HeldOut(cache=cache, metrics=found, tokens=1234, rows=5, all_rows=20)


def write(folder: Path, cache: Path, student: str | None, **metrics: float) -> ModelCard:
    origin = Origin(output=folder, student=student, caches=(cf.open_cache(cache),), steps=7)
    write_card(origin, held_out(str(cache), **metrics) if metrics else None)
    return ModelCard.load(folder / README)


def results(folder: Path) -> dict[str, float]:
    return {each.metric_type: each.metric_value for each in ModelCard.load(folder / README).data.eval_results}


def test_a_run_writes_a_card_and_an_evaluation_updates_it(cache: Path, student_dir: Path, tmp_path: Path):
    summary = train(tmp_path / "out", cache, student=student_dir, eval_cache=str(cache), max_steps=2, eval_steps=2)
    output = tmp_path / "out"
    card = ModelCard.load(output / README)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert 'distill.train_student(config="distill_config.json"' in card.text and str(student_dir) in card.text
    assert card.data.base_model is None  # a directory: the hub refuses its name
    assert results(output)["ce"] == pytest.approx(summary.eval["ce"])
    assert "kl" not in results(output) and f"| ≥ {summary.eval['kl']:.4f} |" in card.text
    found = evaluate(EvaluateConfig(cache=str(cache), student=str(output), device="cpu", card=True))
    assert results(output) == pytest.approx({k: m.value for k, m in found.metrics.items() if k in results(output)})
    # The cache has lists: KL and acceptance are bounds, which the hub would take for the metric.
    assert not {"kl", "acceptance"} & set(results(output)) and is_replaceable(output)
    text, kl, acceptance = (output / README).read_text(), found.metrics["kl"], found.metrics["acceptance"]
    assert f"| ≥ {kl.value:.4f} ± {kl.error:.4f} |" in text
    assert f"| {acceptance.value:.4f}–{found.metrics['acceptance_high'].value:.4f} |" in text
    rows = len(cf.open_cache(cache))
    assert f"{found.tokens:,} loss tokens in {rows:,} of {rows:,} rows" in text
    assert (output / README).read_text().count("## Held-out metrics") == 1
    assert "reliability.svg" in (output / README).read_text() and "held-out.svg" not in (output / README).read_text()


def picture(file: Path) -> list[str]:
    """Tags of a file that is drawn without the page of a report."""
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "--paper: #ffffff" in str(root[0].text)
    assert "class" not in root.attrib and root.get("aria-label")
    return [each.tag.rpartition("}")[2] for each in root.iter()]


def test_plots_are_beside_the_card_if_the_numbers_are_there(cache: Path, student_dir: Path, tmp_path: Path):
    output = tmp_path / "out"
    options = {"eval_cache": str(cache), "max_steps": 3, "eval_steps": 1}
    summary = train(output, cache, student=student_dir, **options)
    assert len(summary.evaluations) == 3 and picture(output / "held-out.svg").count("circle") == 0
    assert picture(output / "held-out.svg").count("rect") == 3  # a marker for each evaluation
    assert not (output / "reliability.svg").exists()
    evaluate(EvaluateConfig(cache=str(cache), student=str(output), device="cpu", card=True))
    evaluate(EvaluateConfig(cache=str(cache), student=str(output), device="cpu", card=True))
    assert "line" in picture(output / "reliability.svg")
    text = (output / README).read_text()
    assert text.count("](held-out.svg)") == text.count("](reliability.svg)") == 1 and is_replaceable(output)
    assert text.index("held-out.svg") < text.index("## Held-out metrics") < text.index("reliability.svg")


def test_names_of_the_hub_and_the_licence(cache: Path, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    (base / README).write_text("---\nlicense: mit\n---\nA model.\n")
    assert write(tmp_path, cache, str(base)).data.license == "mit"
    card = write(tmp_path, cache, "someone/model")
    assert card.data.base_model == "someone/model" and card.data.license is None and card.data.eval_results is None
    assert write(tmp_path, cache, None).data.base_model is None


@pytest.mark.parametrize(
    "metadata", ["license: other: custom", "- mit", "1: mit", "license: [mit", "license: {a: b}", "license: \udce9"]
)
def test_a_damaged_card_of_the_student_has_no_licence(metadata: str, cache: Path, tmp_path: Path):
    """It must not end a run that has been trained."""
    (tmp_path / "student").mkdir()
    text = f"---\n{metadata}\n---\n# Student\n"
    (tmp_path / "student" / README).write_text(text, encoding="utf-8", errors="surrogateescape")
    assert write(tmp_path, cache, str(tmp_path / "student")).data.license is None


def test_an_edited_card_is_kept(cache: Path, tmp_path: Path, student_dir: Path):
    write(tmp_path, cache, None, kl=1.0)
    assert is_replaceable(tmp_path) and add_metrics(tmp_path, held_out("heldout", kl=0.5))
    assert results(tmp_path) == {"kl": 0.5}
    file = tmp_path / README
    file.write_text(file.read_text().replace("# ", "# My ", 1))
    edited = file.read_text()
    assert not is_replaceable(tmp_path) and not add_metrics(tmp_path, held_out("heldout", kl=0.1))
    assert file.read_text() == edited
    file.write_text("by hand")
    assert not is_replaceable(tmp_path)


def test_the_card_says_of_each_number_what_it_is(cache: Path, tmp_path: Path):
    write(tmp_path, cache, None, kl=1.0)
    assert add_metrics(tmp_path, held_out("heldout", error=0.25, kl=0.5, perplexity=1.2e12))
    text = (tmp_path / README).read_text()
    assert "| 0.5000 ± 0.2500 |" in text and "| 1.2e+12 ± 0.25 |" in text and "≥" not in text
    assert "1,234 loss tokens in 5 of 20 rows" in text and "95 % confidence interval" in text
    assert add_metrics(tmp_path, held_out("heldout", "entries only", kl=0.5))
    assert "| cached entries only: 0.5000 |" in (tmp_path / README).read_text()
    assert ModelCard.load(tmp_path / README).data.eval_results is None
