"""The option `divergence`: parsing, errors for unusable specifications, and functions of the user."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cache_format as cf
from cli import main
from dense import random_targets
from head_sums import fused_sums
from pipeline.errors import ConfigError
from pipeline.losses import DIVERGENCES, TAIL_POLICIES, DistillLoss, DivergenceSum, sparse_kl
from pipeline.losses.divergence_sum import Term
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.student.validation.suitability import parse_divergence
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, log_history
from sampled import random, threshold
from textbook import randn

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs/divergences.md").read_text(encoding="utf-8")
N, V, K = 17, 41, 5


# ---- specifications


@pytest.mark.parametrize(
    "text, terms, printed",
    [
        ("forward-kl", [("forward-kl", (), 1.0)], "forward-kl"),
        ("js", [("js", (0.5,), 1.0)], "js(0.5)"),
        ("js(0.1):2", [("js", (0.1,), 2.0)], "js(0.1):2"),
        (" tvd:1 ", [("tvd", (), 1.0)], "tvd"),
        (
            "forward-kl:0.7, reverse-kl:.3",
            [("forward-kl", (), 0.7), ("reverse-kl", (), 0.3)],
            "forward-kl:0.7,reverse-kl:0.3",
        ),
        (
            "alpha-beta(0, 1.5):1e-3,pairwise",
            [("alpha-beta", (0.0, 1.5), 1e-3), ("pairwise", (), 1.0)],
            "alpha-beta(0,1.5):0.001,pairwise",
        ),
        ("alpha-beta", [("alpha-beta", (0.5, 0.5), 1.0)], "alpha-beta(0.5,0.5)"),
    ],
)
def test_a_specification_names_terms_and_prints_as_itself(text: str, terms: list[Any], printed: str) -> None:
    mixture = DivergenceSum.parse(text)
    assert mixture == DivergenceSum(tuple(Term(*term) for term in terms))
    assert str(mixture) == printed and DivergenceSum.parse(printed) == mixture == DivergenceSum.parse(mixture)


numbers = st.floats(1e-6, 1e6).filter(lambda x: x > 0)
names = st.sampled_from(sorted(DIVERGENCES))


@given(st.lists(st.tuples(names, st.floats(0.001, 0.999), st.floats(0.001, 0.999), numbers), min_size=1, max_size=4))
def test_every_mixture_prints_as_what_parses_to_it(terms: list[tuple[str, float, float, float]]) -> None:
    mixture = DivergenceSum(
        tuple(Term(name, (a, b)[: len(DIVERGENCES[name].parameters)], weight) for name, a, b, weight in terms)
    )
    assert DivergenceSum.parse(str(mixture)) == mixture


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", r"`divergence` : found '', expected NAME"),
        ("forward-kl,", r"`divergence` forward-kl,: found '', expected NAME, NAME\(NUMBER\), NAME:WEIGHT"),
        ("kl", r"unknown divergence kl, expected forward-kl, .*pairwise, or a function .* my_module.my_function"),
        ("reverse_kl", r"unknown divergence reverse_kl \(did you mean reverse-kl\?\), expected"),
        ("a..b", r"unknown divergence a..b"),
        ("js(", r"found 'js\(', expected NAME"),
        ("js(0.1)(0.2)", r"found .*, expected NAME"),
        ("js(0.1,0.2)", r"found js\(0.1,0.2\), expected js\(beta\)"),
        ("tvd(1)", r"found tvd\(1\), expected tvd"),
        ("alpha-beta(1)", r"expected alpha-beta\(alpha,beta\)"),
        ("js(0)", r"beta=0 for js, expected a number between 0 and 1\. At the ends use forward-kl or reverse-kl"),
        ("js(1)", r"beta=1 for js, expected"),
        ("js(nan)", r"beta=nan for js, expected"),
        ("skew-forward-kl(x)", r"skew=x for skew-forward-kl, expected"),
        ("alpha-beta(-1,2)", r"alpha=-1 for alpha-beta, expected a number, 0 or more"),
        ("alpha-beta(1,inf)", r"beta=inf for alpha-beta, expected a number, 0 or more"),
        ("tvd:0", r"weight 0 for tvd, expected a number above 0"),
        ("tvd:-1", r"weight -1 for tvd"),
        ("tvd:inf", r"weight inf for tvd"),
        ("tvd:much", r"weight much for tvd"),
        ("my_div:hellinger", r"weight hellinger for my_div, .*A function of your own is written my_div.hellinger"),
        ("tvd:nan", r"weight nan for tvd, expected a number above 0\.?$"),
        ("no_such_module.f", r"`divergence` no_such_module.f: no module no_such_module in the current directory"),
        ("json.no_such_name", r"found nothing with that name in json, expected a function of log p and log q"),
        ("math.pi", r"found a float in math, expected a function"),
        ("math.exp(1)", r"a function of your own takes no parameters. Use math.exp"),
    ],
)
def test_a_specification_that_cannot_be_used_is_one_line_that_says_why(text: str, expected: str) -> None:
    for refused, error in (
        (lambda: DivergenceSum.parse(text), ValueError),
        (lambda: DistillLoss(divergence=text), ValueError),
        (lambda: parse_divergence(text), ConfigError),
    ):
        with pytest.raises(error, match=expected) as found:
            refused()
        assert "\n" not in str(found.value)
    assert str(found.value).startswith("`divergence` ") and str(found.value).endswith(".")
    with pytest.raises(ValueError, match=expected):
        sparse_kl(randn(N, V), random_targets(N, V, K), divergence=text)


def test_a_mixture_is_the_weighted_sum_of_its_terms() -> None:
    hidden, weight = randn(N, 4).requires_grad_(), randn(V, 4, seed=1).requires_grad_()
    targets = random_targets(N, V, K)
    options = {"temperature": 2.0, "kd_weight": 0.6, "scale": 0.1, "chunk_size": 5}

    def loss_and_gradients(spec: str) -> list[Tensor]:
        loss = fused_sums(hidden, weight, None, targets, divergence=spec, **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    hard = fused_sums(hidden, weight, None, targets, **{**options, "kd_weight": 0.0}).loss
    hard = [0.4 * x for x in (hard.detach(), *torch.autograd.grad(hard, [hidden, weight]))]
    weights = {"forward-kl": 0.7, "js(0.1)": 0.3, "tvd": 2.0, "logit-mse": 0.05}
    parts = [loss_and_gradients(name) for name in weights]
    whole = loss_and_gradients(",".join(f"{name}:{w}" for name, w in weights.items()))
    for i, found in enumerate(whole):
        soft = sum(w * (part[i] - hard[i]) for w, part in zip(weights.values(), parts, strict=True))
        torch.testing.assert_close(found, hard[i] + soft, rtol=1e-11, atol=1e-13)
    assert all(
        torch.allclose(2 * (a - h), b - h)
        for a, b, h in zip(parts[0], loss_and_gradients("forward-kl:2"), hard)  # noqa: B905
    )


# ---- what a cache can serve


@pytest.fixture(scope="module")
def caches(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cf.Cache]:
    folder = tmp_path_factory.mktemp("mixture")
    rules = {
        "top-k": TargetRule(top_k=16),
        "threshold": threshold(0.1),
        "random": random(12),
        "tempered": TargetRule(top_k=16, temperature=2.0),
    }
    return {
        name: cf.open_cache(build_cache(folder / name, teacher_dir, text_file, targets=rule))
        for name, rule in rules.items()
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "name, divergence, tail",
    [
        ("top-k", "js", "bucket"),
        ("threshold", "forward-kl", "sampled"),
        ("threshold", "forward-kl:2", "sampled"),
        ("threshold", "forward-kl:0.5,js", "bucket"),
        ("threshold", "logit-mse", "bucket"),
        ("random", "forward-kl", "sampled"),
        ("tempered", "tvd", "bucket"),
    ],
)
def test_the_default_policy_is_one_that_the_divergence_can_use(
    caches: dict[str, cf.Cache], name: str, divergence: str, tail: str
) -> None:
    loss = loss_for_cache(caches[name], kd_weight=0.5, divergence=divergence)
    assert loss.tail == tail and loss.divergence == DivergenceSum.parse(divergence)
    held_out = loss_for_held_out(loss, caches["top-k"]) if name != "tempered" else loss
    assert held_out.divergence == loss.divergence


@pytest.mark.parametrize(
    "name, options, reason",
    [
        (
            "random",
            {"divergence": "js"},
            r"`divergence` js\(0.5\): .*random has random targets.*Use `divergence=forward",
        ),
        (
            "threshold",
            {"divergence": "js", "tail": "sampled"},
            r"`tail` sampled with `divergence=js\(0.5\)`: .*linear in",
        ),
        (
            "top-k",
            {"divergence": "pairwise", "tail": "realized"},
            "pairwise cannot use it, because it compares exact entr",
        ),
        (
            "top-k",
            {"divergence": "tvd,reverse-kl", "tail": "label"},
            "reverse-kl cannot use it, because .*which are then 0",
        ),
        ("tempered", {"divergence": "js", "temperature": 1.0}, "`temperature` 1.0: .*cannot be converted"),
    ],
)
def test_a_loss_that_targets_cannot_serve_is_refused(
    caches: dict[str, cf.Cache], name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as found:
        loss_for_cache(caches[name], kd_weight=0.9, **options)
    assert str(found.value).endswith(".")
    if name == "random":
        with pytest.raises(ConfigError, match=reason):
            loss_for_held_out(loss_for_cache(caches["top-k"], kd_weight=0.9, **options), caches[name])


# ---- a function of one's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, whose modules can be imported and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_function_gets_finite_numbers_of_both_sides(own: Path) -> None:
    """Entries of probability zero, a one-hot teacher and no class at all: naive formulas give what ours give."""
    (own / "plain_formulas.py").write_text(
        "seen = []\n"
        "def forward(log_p, log_q):\n"
        "    seen.append((log_p, log_q))\n"
        "    return (log_p.exp() * (log_p - log_q)).sum(dim=1)\n"
        "def reverse(log_p, log_q):\n"
        "    return (log_q.exp() * (log_q - log_p)).sum(dim=1)\n"
        "def variation(log_p, log_q):\n"
        "    return (log_p.exp() - log_q.exp()).abs().sum(dim=1) / 2\n"
    )
    targets = random_targets(N, V, K)
    targets.residual_logprob[:4] = -torch.inf
    n = int(targets.loss_mask.sum())
    targets = targets[targets.loss_mask]
    for tail in ("bucket", "renormalise", "label"):
        for name, ours in (("forward", "forward-kl"), ("reverse", "reverse-kl"), ("variation", "tvd")):
            if tail not in DivergenceSum.parse(ours).tails:
                continue
            logits = randn(n, V, seed=3).requires_grad_()
            found, expected = (
                sparse_kl(logits, targets, tail=tail, divergence=d) for d in (f"plain_formulas.{name}", ours)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the floor: a mass of 1.2e-7
            gradients = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    seen = sys.modules["plain_formulas"].seen[1:]  # the first call tries it out
    assert {tuple(log_p.shape) for log_p, _ in seen} == {(n, K + 4), (n, K + 5)}
    for log_p, log_q in seen:
        assert log_p.isfinite().all() and log_q.isfinite().all()
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(n).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(n).double(), rtol=0, atol=1e-6)


def test_a_function_that_returns_something_else_is_told_what_is_expected(own: Path) -> None:
    """Before a run, and in it if it depends on what it is given."""
    (own / "wrong_shapes.py").write_text(
        "def mean(log_p, log_q):\n    return (log_p.exp() * (log_p - log_q)).mean()\n"
        "def across(log_p, log_q):\n    return (log_p.exp() - log_q.exp()).abs().sum(dim=0)\n"
        "def number(log_p, log_q):\n    return 1.0\n"
        "def later(log_p, log_q):\n    return (log_p.exp() - log_q.exp()).abs().sum(dim=1)[:2]\n"
    )
    for name, found in (("mean", r"shape \[\]"), ("across", r"shape \[3\]"), ("number", "float")):
        reason = rf"`divergence` wrong_shapes.{name}: returned {found} .*expected \[2\]: one number per position"
        with pytest.raises(ValueError, match=f"^{reason}"):
            sparse_kl(randn(N, V), random_targets(N, V, K), divergence=f"wrong_shapes.{name}")
        with pytest.raises(ConfigError, match=f"^{reason}"):
            parse_divergence(f"wrong_shapes.{name}")
    with pytest.raises(ValueError, match=rf"wrong_shapes.later: returned shape \[2\] .*expected \[{N}\]"):
        sparse_kl(randn(N, V), random_targets(N, V, K), divergence="wrong_shapes.later")
    (own / "needs_more.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):  # theirs to mend: keeps its traceback
        DivergenceSum.parse("needs_more.f")


@pytest.mark.long
def test_the_documented_example_runs(own: Path, teacher_dir: Path, student_dir: Path, text_file: Path) -> None:
    (code,) = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS, re.DOTALL)
    (own / code[0]).write_text(code[1])
    (own / "models").mkdir()
    (own / "models/student").symlink_to(student_dir)
    for name in ("lists", "chats"):
        build_cache(own / "caches" / name, teacher_dir, text_file)
    commands = [shlex.split(line[2:]) for line in DOCS.splitlines() if line.startswith("$ distill")]
    assert len(commands) == 4
    for words in commands:
        main(words[1:] + ["--max-steps", "2", "--logging-steps", "1", "--device", "cpu"], standalone_mode=False)
    logs = [entry for entry in log_history(own / "students/hellinger") if "soft" in entry]
    assert len(logs) == 2 and all(0 < entry["soft"] < 1 for entry in logs)


# ---- documentation


def test_the_table_has_every_divergence_with_its_defaults_and_policies() -> None:
    rows = dict(re.findall(r"^\| `(\w[\w-]+)(?:\([^`]*\))?`[^|]*\|(.*)$", DOCS, re.MULTILINE))
    assert rows.keys() == DIVERGENCES.keys()
    defaults = {name: [float(x) for x in re.findall(r"0\.\d", line)] for name, line in _first_cells().items()}
    for name, kind in DIVERGENCES.items():
        assert defaults[name] == list(kind.parameters.values()), name
        cells = re.split(r"(?<!\\)\|", rows[name])
        tails = cells[3]
        if kind.of_entries:
            assert "not used" in tails
        else:
            named = set(re.findall(r"`(\w+)`", tails))
            assert (set(TAIL_POLICIES) if "all" in tails else named) == set(kind.tails), name
        assert "https://arxiv.org/abs/" in cells[4]


def _first_cells() -> dict[str, str]:
    return dict(re.findall(r"^\| (?=`)`([\w-]+)([^|]*)\|", DOCS, re.MULTILINE))
