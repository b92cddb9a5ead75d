"""The fused head against its definition, `sparse_kl` on full logits in fp64; and what it must not cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dense import captured_for, random_targets
from head_sums import fused_sums, general_sums
from pipeline.losses import (
    IGNORE_INDEX,
    TAIL_POLICIES,
    HeadOutput,
    SparseTargetBatch,
    fused_head_loss,
    sparse_kl,
)
from textbook import relative_errors

N, V, D, K, PADDING = 29, 211, 16, 9, 5

every_tail = pytest.mark.parametrize("tail", TAIL_POLICIES)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])


class Problem:
    """Hidden states, head and targets in fp64; `leaves` gives them in another dtype as leaves of a graph."""

    def __init__(self, *, n: int = N, bias: bool = True, padding: int = 0, seed: int = 0, **targets: Any) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = randn(n, D)
        self.weight = 0.5 * randn(V + padding, D)
        self.bias = randn(V + padding) if bias else None
        if padding:  # loud, so that whoever lets them in is heard
            self.weight[V:] *= 5
        self.targets = random_targets(n, V, K, seed=seed, **targets)

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        def leaf(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        return leaf(self.hidden), leaf(self.weight), leaf(self.bias)

    def targets_for(self, *, tail: str = "bucket", temperature: float = 1.0, **_: Any) -> SparseTargetBatch:
        return captured_for(self.targets, tail, temperature)

    def rounded(self, dtype: torch.dtype) -> Problem:
        """The same with values that `dtype` can hold, so that only the computation differs."""
        rounded = object.__new__(Problem)
        rounded.hidden, rounded.weight = (x.to(dtype).double() for x in (self.hidden, self.weight))
        rounded.bias = None if self.bias is None else self.bias.to(dtype).double()
        rounded.targets = self.targets
        return rounded


def reference(problem: Problem, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    """Loss and gradients of `sparse_kl` on the logits of the real vocabulary."""
    hidden, weight, bias = problem.leaves(dtype)
    targets = problem.targets_for(**options)
    logits = hidden @ weight[:V].T
    if bias is not None:
        logits = logits + bias[:V]
    return gradients(sparse_kl(logits, targets, **options), hidden, weight, bias)


def by_fused(problem: Problem, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    hidden, weight, bias = problem.leaves(dtype)
    targets = problem.targets_for(**options)
    count = max(1, int(targets.loss_mask.sum()))
    loss = fused_sums(hidden, weight, bias, targets, scale=1 / count, vocab_size=V, **options).loss
    return gradients(loss, hidden, weight, bias)


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """[loss, d_hidden, d_weight, d_bias]"""
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


# ---- equal to the reference


@every_tail
@every_temperature
@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradients(tail: str, temperature: float, kd_weight: float) -> None:
    options = {"tail": tail, "temperature": temperature, "kd_weight": kd_weight}
    for bias, padding in ((True, PADDING), (False, 0)):
        problem = Problem(bias=bias, padding=padding, quantised=bias)
        expected = reference(problem, **options)
        for dtype, bound, chunk_sizes in ((torch.float64, 1e-12, (1, 7, N, 64)), (torch.float32, 1e-5, (7, 64))):
            for chunk_size in chunk_sizes:
                found = by_fused(problem, dtype, chunk_size=chunk_size, **options)
                assert max(relative_errors(found, expected)) < bound
                assert [x.dtype for x in found] == [dtype] * len(found)
                if padding:
                    assert all((gradient[V:] == 0).all() for gradient in found[2:])


def test_loss_and_gradients_far_from_zero() -> None:
    """Logits to ±60: most of the vocabulary underflows, the label too, and fp32 must not lose the gradient."""
    problem = Problem(masked=0.0)
    problem.weight *= 10
    for tail, temperature in itertools.product(TAIL_POLICIES, (0.5, 1.0, 4.0)):
        options = {"tail": tail, "temperature": temperature, "kd_weight": 0.5}
        expected = reference(problem, **options)
        assert max(relative_errors(by_fused(problem, **options), expected)) < 1e-12
        assert max(relative_errors(by_fused(problem, torch.float32, **options), expected)) < 2e-5


@every_tail
def test_sums_are_those_of_the_reference(tail: str) -> None:
    problem = Problem()
    for temperature, kd_weight in ((1.0, 1.0), (2.0, 0.4)):
        options = {"tail": tail, "temperature": temperature}
        targets = problem.targets_for(**options)
        found = fused_sums(*problem.leaves(torch.float64), targets, kd_weight=kd_weight, **options)
        logits = problem.hidden @ problem.weight.T + problem.bias
        kl = sparse_kl(logits, targets, reduction="sum", **options) / temperature**2
        ce = F.cross_entropy(logits, targets.labels, reduction="sum")
        counted = targets.loss_mask
        likeliest = targets.ids.gather(1, targets.exact.logprobs.argmax(1, keepdim=True)).squeeze(1)
        assert (targets.logprobs.argmax(1) != targets.exact.logprobs.argmax(1)).any()  # a weight may be the largest
        agreement = (logits.argmax(1) == likeliest)[counted].sum()
        expected = HeadOutput(
            loss=(1 - kd_weight) * ce + kd_weight * temperature**2 * kl,
            kl=kl,
            ce=ce,
            agreement=agreement.double(),
            count=counted.sum().double(),
        )
        for name in HeadOutput._fields:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)
            assert getattr(found, name).requires_grad == (name == "loss")


@pytest.mark.long
@every_tail
@every_temperature
def test_gradient_by_finite_differences(tail: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((5, 3), (8, 3), (8,))
    ]
    targets = captured_for(random_targets(5, 8, 3, seed=1), tail, temperature)
    assert torch.autograd.gradcheck(
        lambda *x: fused_head_loss(*x, targets, tail=tail, temperature=temperature, kd_weight=0.6, chunk_size=2),
        leaves,
    )


@every_tail
def test_absent_entries_and_all_tokens(tail: str) -> None:
    """No entry at all; residual -inf; label inside, outside; K = V: what `test_losses` holds the reference to."""
    inf = torch.inf
    sparse = SparseTargetBatch(
        ids=torch.tensor([[2, 0, 0], [1, 3, 4], [0, 0, 0], [0, 1, 2]]),
        logprobs=torch.tensor([[0.0, -inf, -inf], [-0.36, -inf, -1.2], [-inf] * 3, [-1.6, -1.2, -0.92]]).double(),
        exact_counts=torch.tensor([3, 3, 3, 2]),
        residual_logprob=torch.tensor([-inf, -inf, 0.0, -2.3]).double(),
        entropy=torch.tensor([0.0, 0.6, 1.9, 1.5]).double(),
        labels=torch.tensor([2, 3, 0, 5]),
    )
    for targets, vocab in ((sparse, 7), (random_targets(6, 7, 7, ragged=False), 7), (random_targets(6, 2, 2), 2)):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(len(targets), 3, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(vocab, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for temperature, kd_weight in ((1.0, 1.0), (2.0, 0.5)):
            options = {"tail": tail, "temperature": temperature, "kd_weight": kd_weight}
            captured = captured_for(targets, tail, temperature)
            expected = gradients(sparse_kl(hidden @ weight.T, captured, **options), hidden, weight)
            found = gradients(fused_head_loss(hidden, weight, None, captured, **options), hidden, weight)
            assert all(x.isfinite().all() for x in found)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@every_tail
def test_masked_positions_contribute_nothing_at_all(tail: str) -> None:
    problem = Problem()
    masked = ~problem.targets.loss_mask
    options = {"tail": tail, "temperature": 2.0, "kd_weight": 0.5, "chunk_size": 4}
    before = by_fused(problem, torch.float32, **options)
    problem.hidden[masked] = torch.nan
    problem.targets.ids[masked] = 1
    problem.targets.logprobs[masked] = -3.0
    problem.targets.residual_logprob[masked] = -torch.inf
    problem.targets.exact_counts[masked] = 1
    problem.targets.entropy[masked] = torch.nan
    for a, b in zip(by_fused(problem, torch.float32, **options), before, strict=True):
        assert torch.equal(a, b)
    assert (before[1][masked] == 0).all()


@every_tail
def test_all_masked_is_zero_and_has_a_backward(tail: str) -> None:
    problem = Problem(masked=1.0)
    assert not problem.targets.loss_mask.any()
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias = problem.leaves(dtype)
        heads: list[HeadOutput] = [
            fused_sums(hidden, weight, bias, problem.targets, tail=tail, kd_weight=0.5),
            general_sums(hidden, lambda h: F.linear(h, weight, bias), problem.targets, tail=tail, kd_weight=0.5),  # noqa: B023
        ]
        for output in heads:
            assert [value.item() for value in output] == [0.0] * 5
            # Of the head's parameters too: a data-parallel process without one would keep the others waiting.
            for gradient in torch.autograd.grad(output.loss, [hidden, weight, bias]):
                assert (gradient == 0).all()


def test_batched_hidden_states() -> None:
    problem = Problem(n=12)
    flat = by_fused(problem)
    problem.hidden = problem.hidden.view(3, 4, D)
    batched = by_fused(problem)
    assert torch.equal(flat[0], batched[0]) and torch.equal(flat[1].view(3, 4, D), batched[1])


# ---- scale and the backward pass


def test_scale_multiplies_loss_and_gradients_and_nothing_else() -> None:
    problem = Problem()
    hidden, weight, bias = problem.leaves(torch.float64)
    options = {"kd_weight": 0.5, "temperature": 2.0}
    plain = fused_sums(hidden, weight, bias, problem.targets, **options)
    expected = gradients(plain.loss, hidden, weight, bias)
    linear = lambda h: F.linear(h, weight, bias)  # noqa: E731
    for scale in (0.125, torch.tensor(0.125), torch.tensor(0.125, dtype=torch.float64)):
        for output in (
            fused_sums(hidden, weight, bias, problem.targets, scale=scale, **options),
            general_sums(hidden, linear, problem.targets, scale=scale, **options),
        ):
            for a, b in zip(gradients(output.loss, hidden, weight, bias), expected, strict=True):
                torch.testing.assert_close(a, b / 8, rtol=1e-12, atol=1e-15)
            for a, b in zip(output[1:], plain[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_gradient_of_the_loss_other_than_one() -> None:
    problem = Problem()
    hidden, weight, bias = problem.leaves(torch.float64)
    loss = fused_head_loss(hidden, weight, bias, problem.targets)
    once = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    thrice = torch.autograd.grad((3 * loss).exp().log() - 1, [hidden, weight, bias], retain_graph=True)
    for a, b in zip(thrice, once, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-12, atol=0)
    again = torch.autograd.grad(loss, [hidden, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


def test_backward_twice_on_a_retained_graph_adds_up() -> None:
    problem = Problem()
    leaves = problem.leaves(torch.float64)
    loss = fused_head_loss(*leaves, problem.targets)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in expected]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=1e-14, atol=0)


def test_tied_weights_used_twice() -> None:
    """The head's weight is also the embedding: both contributions arrive."""
    problem = Problem(bias=False)
    ids = torch.arange(N) % V

    def loss_of(weight: Tensor, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return head(weight[ids].tanh(), weight)

    (_, weight, _) = problem.leaves(torch.float64)
    found = gradients(loss_of(weight, lambda h, w: fused_head_loss(h, w, None, problem.targets)), weight)
    expected = gradients(loss_of(weight, lambda h, w: sparse_kl(h @ w.T, problem.targets)), weight)
    assert max(relative_errors(found, expected)) < 1e-12


@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight", "bias"}, {"bias"}])
def test_only_the_gradients_asked_for_are_computed(frozen: set[str]) -> None:
    problem = Problem()
    leaves = dict(zip(("hidden", "weight", "bias"), problem.leaves(torch.float64), strict=True))
    expected = dict(zip(leaves, reference(problem)[1:], strict=True))
    for name in frozen:
        leaves[name].requires_grad_(False)
    fused_head_loss(*leaves.values(), problem.targets).backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradient(no_grad: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    inner = SparseTargetBatch.loss_and_dlogits

    def watched(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        result = inner(*arguments)
        computed.append(result[1] is not None)
        return result

    monkeypatch.setattr(SparseTargetBatch, "loss_and_dlogits", watched)
    problem = Problem()
    hidden, weight, bias = problem.leaves(torch.float64)
    for head in (
        lambda: fused_sums(hidden, weight, bias, problem.targets, kd_weight=0.5),
        lambda: general_sums(hidden, lambda h: F.linear(h, weight, bias), problem.targets, kd_weight=0.5),
    ):
        with_gradient = head()
        assert computed and all(computed)
        computed.clear()
        with no_grad():
            without = head()
        assert computed and not any(computed)
        computed.clear()
        assert not without.loss.requires_grad
        assert all(torch.equal(a.detach(), b) for a, b in zip(with_gradient, without, strict=True))


def test_deterministic() -> None:
    problem = Problem()
    first, second = (by_fused(problem, torch.float32, temperature=2.0, kd_weight=0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- low precision


@every_tail
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_no_worse_than_the_reference_in_16_bits(tail: str, low: torch.dtype, autocast: bool) -> None:
    problem = Problem(n=96, padding=PADDING).rounded(low)
    dtype = torch.float32 if autocast else low
    for temperature, kd_weight in ((1.0, 1.0), (2.0, 0.5)):
        options = {"tail": tail, "temperature": temperature, "kd_weight": kd_weight}
        truth = reference(problem, **options)
        with torch.autocast("cpu", low, enabled=autocast):
            plain = reference(problem, dtype, **options)
            found = by_fused(problem, dtype, chunk_size=40, **options)
        assert found[0].dtype == torch.float32 and all(x.dtype == dtype for x in found[1:])
        # In float16 the product of a chunk is rounded to few bits before it is added to the others (not on CUDA).
        times = 2 if low == torch.bfloat16 else 3
        for error, allowed in zip(relative_errors(found, truth), relative_errors(plain, truth), strict=True):
            # The loss is one number, and may be right by luck; its error is then bounded by the dtype alone.
            assert error <= max(times * allowed, torch.finfo(low).eps / 4)


# ---- agreement


@pytest.mark.parametrize("general", [False, True])
def test_agreement_is_with_one_of_the_equal_tokens(general: bool) -> None:
    # V = 4 and an identity for a weight: hidden states are logits.
    cases = [
        ([9.0, 0, 0, 0], [0, 1], [0.6, 0.3], 1),
        ([0, 9.0, 0, 0], [0, 1], [0.6, 0.3], 0),
        ([0, 0, 9.0, 0], [0, 1], [0.6, 0.3], 0),  # the student's choice is not in the list
        ([0, 9.0, 0, 0], [0, 1], [0.4, 0.4], 0.5),  # codes of one byte do not tell which is the teacher's choice
        ([5.0, 5.0, 0, 0], [0, 1], [0.6, 0.3], 1),  # the student's choice is one of the largest logits
        ([5.0, 5.0, 0, 0], [0, 1], [0.3, 0.6], 0),
        ([5.0, 5.0, 0, 0], [0, 2], [0.3, 0.6], 0),
        ([0, 0, 0, 9.0], [3, 0], [0.5, 0.0], 1),
        ([9.0, 0, 0, 0], [3, 0], [0.5, 0.0], 0),  # id 0 is only padding of the list
    ]
    states, ids, probs, agrees = zip(*cases, strict=True)
    targets = SparseTargetBatch(
        ids=torch.tensor(ids),
        logprobs=torch.tensor(probs).log(),
        residual_logprob=torch.full((len(cases),), -2.0),
        labels=torch.zeros(len(cases), dtype=torch.int64),
    )
    eye = torch.eye(4)
    for t, expected in enumerate(agrees):
        here = slice(t, t + 1)
        one, hidden = targets[here], torch.tensor(states)[here]
        with torch.no_grad():
            output = general_sums(hidden, lambda h: h @ eye, one) if general else fused_sums(hidden, eye, None, one)
        assert output.agreement.item() == expected, cases[t]
    targets.labels[0] = IGNORE_INDEX
    total = fused_sums(torch.tensor(states), eye, None, targets, temperature=2.0, chunk_size=3)
    assert (total.agreement.item(), total.count.item()) == (sum(agrees) - 1, len(cases) - 1)


# ---- cost


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors: Iterator[Tensor] = (x for x in tree_leaves(result) if isinstance(x, Tensor))
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("general", [False, True])
def test_nothing_of_size_positions_times_vocabulary_exists(dtype: torch.dtype, general: bool) -> None:
    n, chunk_size = 600, 20
    problem = Problem(n=n, bias=False)
    hidden, weight, _ = problem.leaves(dtype)
    allowed = max(chunk_size * V, V * D, n * D, n * K)
    assert allowed < n * V / 10

    def plain() -> Tensor:
        return sparse_kl(hidden @ weight.T, problem.targets, kd_weight=0.5, temperature=2.0)

    def chunked() -> Tensor:
        options = {"kd_weight": 0.5, "temperature": 2.0, "chunk_size": chunk_size}
        if general:
            return general_sums(hidden, lambda h: F.linear(h, weight), problem.targets, **options).loss
        return fused_sums(hidden, weight, None, problem.targets, **options).loss

    largest = []
    for loss_of in (chunked, plain):
        with LargestTensor() as mode:
            loss_of().backward()
        largest.append(mode.elements)
    assert largest[0] <= allowed
    assert largest[1] == n * V  # the measurement sees what it should see
