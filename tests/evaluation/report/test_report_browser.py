"""The report in a real browser: no errors, pointing, keyboard, without JavaScript, every width, both colour schemes.

Skipped where playwright or Chromium is missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distill
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.report.figures import difference_figures, training_figures
from pipeline.evaluation.report.group_table import GroupTable
from pipeline.evaluation.report.page import Contents, render
from pipeline.evaluation.report.passages import choose, cut, details
from pipeline.evaluation.report.report_sources import Run, Student
from pipeline.evaluation.report.student_positions import StudentPositions
from pipeline.evaluation.report.teacher_positions import TeacherPositions, TextPositions
from runs import build_cache, train

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

Browser, Page = Any, Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def file(teacher_dir: Path, student_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with two students, one of them with curves of its training."""
    folder = tmp_path_factory.mktemp("browser")
    build_cache(folder / "cache", teacher_dir, chat_file)
    options = {"eval_cache": str(folder / "cache"), "eval_steps": 1, "logging_steps": 1, "max_steps": 2}
    train(folder / "run", folder / "cache", student=student_dir, **options)
    distill.report([folder / "cache", folder / "run"], folder / "report.html", student=student_dir, device="cpu")
    return folder / "report.html"


LONG_NAMES = [
    "SmolLM2-135M-Instruct-distilled-from-360M-threshold-tail-0.05",
    "runs/2026-11-30/a_run_with_a_long_name_and_no_place_to_break_it",
    *(f"kd-{weight}" for weight in range(4)),
]


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of six students, some with long names, with a table of groups and curves of long trainings."""
    path = tmp_path_factory.mktemp("wide") / "wide.html"
    history = [
        {"step": float(s), "learning_rate": 2.5e-5 * (1 - s / 12_000), "kl": 3 * 0.9**s} for s in range(0, 1300, 100)
    ]
    run = Run(path="run", record={}, history=tuple(history), max_steps=12_000)
    contents = made_up_contents(2000, LONG_NAMES)
    students = [replace(each, run=run) for each in contents.students]
    columns = ["domain", "loss tokens", "rows", *LONG_NAMES]
    by = GroupTable(
        by="domain", note="", columns=columns, rows=[["mathematics", "1,000", "20", *["1.2345 ± 0.0123"] * 6]]
    )
    facts = {"Text": [("generation stop reasons stop-string", "0"), ("weights fingerprint", "0123456789abcdef" * 4)]}
    training = training_figures(students)
    path.write_bytes(render(replace(contents, students=students, by=by, training=training, cache_facts=facts)))
    return path


def opened(browser: Browser, file: Path, **options: Any) -> Page:
    """A page that fails the test if it logs anything or asks for anything but itself."""
    page = browser.new_page(**options)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: request.url == file.as_uri() or page.problems.append(request.url))
    page.goto(file.as_uri())
    return page


@pytest.mark.long
def test_pointing_at_a_token_shows_both_distributions(browser: Browser, file: Path):
    page = opened(browser, file)
    assert not page.locator("#tip").is_visible()
    token = page.locator(".tokens b").nth(5)
    token.hover()
    shown = page.locator("#tip").inner_text()
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    passage = page.locator(".tokens").first
    n = int(passage.locator("xpath=..").get_attribute("data-first")) + 5
    assert f"teacher entropy {data['entropy'][n] / 1000:.3f} nats" in shown
    assert f"tail mass {data['tail'][n] / 100:.1f}%" in shown
    for student in data["students"]:
        assert f"{student['name']}: KL {student['kl'][n] / 1000:.3f}" in shown
    name, _, *true = page.locator("#tip tr.true").locator("th, td").all_inner_texts()
    assert name.endswith("◀ true") and "all other tokens" in shown
    expected = [student["labelProbs"][n] / 100 for student in data["students"]]
    assert [float(each.strip().removesuffix("%")) for each in true] == pytest.approx(expected, abs=0.051)
    teacher = page.locator("#tip tbody tr:not(.rest) td:nth-child(2)").all_inner_texts()
    known = sorted((float(each.strip().removesuffix("%")) for each in teacher if each[0].isdigit()), reverse=True)
    assert known[:5] == pytest.approx([each / 100 for each in data["topProbs"][n * 5 : n * 5 + 5]], abs=0.051)
    box, tip = token.bounding_box(), page.locator("#tip").bounding_box()
    assert tip["y"] >= box["y"] + box["height"] or tip["y"] + tip["height"] <= box["y"]  # not over the token
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()
    assert page.problems == []


@pytest.mark.long
def test_keyboard_reaches_every_token(browser: Browser, file: Path):
    page = opened(browser, file)
    active = "[...document.querySelector('.tokens').querySelectorAll('b')].findIndex(b => b.matches('.active'))"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.tokens')"):
            break
    assert page.evaluate(active) == 0 and page.locator("#tip").is_visible()
    first = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(active) == 1 and page.locator("#tip").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(active) == 0 and page.locator("#tip").inner_text() == first
    page.keyboard.press("End")
    last = page.locator(".tokens").first.locator("b").count() - 1
    assert page.evaluate(active) == last
    page.keyboard.press("ArrowRight")
    assert page.evaluate(active) == last
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press("Home")
    assert page.evaluate(active) == 0 and page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelectorAll('.active').length") == 1  # in the next passage
    assert page.evaluate(active) == -1 and page.problems == []


@pytest.mark.long
def test_views_and_text_work_without_javascript(browser: Browser, file: Path):
    page = opened(browser, file, java_script_enabled=False)
    assert page.locator(".tokens").first.is_visible() and not page.locator(".hint").is_visible()
    assert "KL run" in page.locator("h4").first.text_content()
    token = page.locator(".tokens b[class*='k0-']").first
    color = "element => getComputedStyle(element).backgroundColor"
    assert token.evaluate(color) != "rgba(0, 0, 0, 0)"
    page.get_by_label("student disagrees").check()
    assert page.locator(".tokens b:not(.d1)").first.evaluate(color) == "rgba(0, 0, 0, 0)"
    assert page.locator(".tokens b.d1").first.evaluate(color) != "rgba(0, 0, 0, 0)"
    assert page.problems == []


CONTRASTS = """() => {
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const all = "h1,h2,h3,h4,p,li,a,td,th,dt,dd,small,label,summary,legend,figcaption,.scale span,b,i,svg text";
  for (const element of document.querySelectorAll(all)) {
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element.tagName === "text" ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push([element.tagName, element.className, ratio]);
  }
  return found;
}"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_fits_and_every_text_has_contrast(browser: Browser, file: Path, scheme: str):
    for width in (400, 1000, 1600):
        page = opened(browser, file, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("figure > svg").first.bounding_box()["width"] > 300
        page.locator(".tokens b").nth(3).hover()
        tip = page.locator("#tip").bounding_box()
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= width and tip["y"] + tip["height"] <= 900
        assert page.evaluate(CONTRASTS) == [] and page.problems == []
        page.close()


WIDER_THAN_THE_WINDOW = """() => [...document.querySelectorAll("body *")].filter(element => {
  const box = element.getBoundingClientRect();
  return (box.left < -1 || box.right > innerWidth + 1) && !element.closest(".scroll table, #tip table");
}).map(element => [element.tagName, element.className, element.textContent.slice(0, 40)])"""


@pytest.mark.long
def test_only_boxes_that_scroll_are_wider_than_a_small_window(browser: Browser, wide_file: Path):
    page = opened(browser, wide_file, viewport={"width": 400, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate(WIDER_THAN_THE_WINDOW) == []
    boxes = [box for box in page.locator(".scroll").all() if box.evaluate("box => box.scrollWidth > box.clientWidth")]
    assert len(boxes) >= 4
    for box in boxes:
        assert box.get_attribute("tabindex") == "0" and box.get_attribute("aria-label")
    boxes[0].focus()
    page.keyboard.press("ArrowRight")
    deadline = time.monotonic() + 20  # the page's policy forbids what wait_for_function would evaluate
    while page.evaluate("document.activeElement.scrollLeft") == 0:
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)
    first = boxes[0].locator("tbody th").first.bounding_box()
    assert first["x"] >= boxes[0].bounding_box()["x"] - 1  # the names of the rows stay


@pytest.mark.long
@pytest.mark.parametrize("width", [400, 1000])
def test_distributions_never_cover_their_token(browser: Browser, wide_file: Path, width: int):
    page = opened(browser, wide_file, viewport={"width": width, "height": 900})
    for y in (10, 450, 880):  # where the token is in the window
        token = page.locator(".tokens b").nth(5)
        token.evaluate("(token, y) => scrollBy(0, token.getBoundingClientRect().top - y)", y)
        token.hover()
        box, tip = token.bounding_box(), page.locator("#tip").bounding_box()
        assert tip["y"] >= box["y"] + box["height"] or tip["y"] + tip["height"] <= box["y"]
        assert 0 <= tip["y"] and tip["y"] + tip["height"] <= 900 and tip["x"] >= 0 and tip["x"] + tip["width"] <= width
    assert page.problems == []


@pytest.mark.long
def test_texts_of_a_chart_stay_inside_it_and_apart(browser: Browser, file: Path, wide_file: Path):
    outside = """() => [...document.querySelectorAll("figure > svg text")].filter(text => {
      const [a, b] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent)"""
    overlapping = """() => [...document.querySelectorAll("figure > svg")].flatMap(svg => {
      const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
      return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => [one, other]));
    })"""
    for each in (file, wide_file):
        page = opened(browser, each)
        assert page.evaluate(outside) == [] and page.evaluate(overlapping) == []


@pytest.mark.slow
def test_a_hundred_thousand_tokens_open_faster_than_a_bare_page_of_them(browser: Browser, tmp_path: Path):
    """Half of them loss tokens, with one student. Takes 0.5 s, and the bare page 1 s, on a quiet core."""
    large, bare = tmp_path / "large.html", tmp_path / "bare.html"
    large.write_bytes(render(made_up_contents(100_000, ["student"])))
    bare.write_text("<!doctype html>" + f"<p>{'<b>token</b>' * 200}</p>" * 500, encoding="utf-8")
    seconds: dict[Path, list[float]] = {large: [], bare: []}
    for file in [large, bare] * 3:
        page, taken = measured(browser, file)
        seconds[file].append(taken)
        if file == large:
            page.locator(".tokens b").first.hover()
            assert page.locator("#tip").is_visible()
            assert page.locator(".tokens b").count() == 50_000
        page.close()
    print(f"{seconds}, {large.stat().st_size / 1e6:.1f} MB")
    assert min(seconds[large]) < 0.9 * min(seconds[bare])


def measured(browser: Browser, file: Path) -> tuple[Page, float]:
    """A page that is drawn, and the CPU seconds of its thread until then, since others may be busy too."""
    page = browser.new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    return page, metrics["TaskDuration"]


def made_up_contents(tokens: int, students: Sequence[str]) -> Contents:
    """Random numbers for documents of 200 tokens, of which the second half is in the loss."""
    rng = np.random.default_rng(0)
    documents = np.arange(0, tokens + 1, 200)
    ids = rng.zipf(1.3, tokens) % 20_000
    predicted = np.arange(tokens) % 200 >= 100
    text = TextPositions(
        input_ids=ids,
        documents=documents,
        rows=np.arange(len(documents) - 1),
        predictions=np.where(predicted, np.cumsum(predicted) - 1, -1),
    )
    ids = ids[predicted]
    tokens_in_cache, tokens = tokens, len(ids)

    def probabilities(width: int) -> Any:
        return np.sort(rng.dirichlet(np.ones(width + 1), tokens)[:, :width].astype(np.float32))[:, ::-1]

    def some() -> Any:
        return rng.exponential(1.0, tokens).astype(np.float32)

    teacher = TeacherPositions(
        labels=ids,
        entropy=some(),
        tail=np.full(tokens, 0.1, np.float32),
        top_ids=rng.zipf(1.3, (tokens, 5)) % 20_000,
        top_probs=probabilities(5),
        sampled=np.zeros((tokens, 5), bool),
        label_probs=probabilities(1)[:, 0],
    )
    positions = {
        name: StudentPositions(
            kl=some(),
            ce=some(),
            agrees=(rng.random(tokens) < 0.5).astype(np.float32),
            confidence=probabilities(1)[:, 0],
            right=rng.random(tokens) < 0.5,
            top_ids=rng.zipf(1.3, (tokens, 3)) % 20_000,
            top_probs=probabilities(3),
            at_teacher=probabilities(5),
            label_probs=probabilities(1)[:, 0],
            evaluation=Evaluation.from_sums(1.0, 1.0, 1.0, 1.0, "full"),
        )
        for name in students
    }
    passages = cut(text)
    chosen = choose(passages, teacher.entropy, len(passages))
    names = [f" {i}" for i in range(20_000)]
    return Contents(
        title="Made up",
        facts=[],
        students=[Student(name=label, label=label, model=None, run=None) for label in positions],
        positions=positions,
        text=text,
        teacher=teacher,
        chosen=chosen,
        token_text=names.__getitem__,
        details=details(chosen.all, teacher, positions, names.__getitem__),
        differences=difference_figures(teacher, positions, calibrates=True),
        training=[],
        sizes=[("column", 1)],
        tokens_in_cache=tokens_in_cache,
        cache_facts={},
        run_facts={},
        version="0",
    )
