"""`sparse_kl`, the definition of the loss, against dense fp64 arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dense import captured_for, dense_kl, dense_losses, extremes, random_targets
from pipeline.losses import (
    IGNORE_INDEX,
    TAIL_POLICIES,
    UNBIASED,
    SparseTargetBatch,
    sparse_kl,
)
from pipeline.losses.tails import teacher_classes, tempered_tail

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
KD_WEIGHTS = (0.0, 0.3, 1.0)
N, V, K = 23, 31, 6

CLASS_POLICIES = [tail for tail in TAIL_POLICIES if tail not in UNBIASED]

every_tail = pytest.mark.parametrize("tail", TAIL_POLICIES)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
every_kd_weight = pytest.mark.parametrize("kd_weight", KD_WEIGHTS)


def random_logits(n: int = N, vocab: int = V, *, seed: int = 1, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)


def full_targets(n: int = N, vocab: int = V, **options: object) -> SparseTargetBatch:
    return random_targets(n, vocab, vocab, ragged=False, **options)  # type: ignore[arg-type]


def teacher_logprobs(targets: SparseTargetBatch, vocab: int) -> Tensor:
    """[N, V] where the targets hold every token."""
    return torch.full((len(targets), vocab), -torch.inf, dtype=torch.float64).scatter(1, targets.ids, targets.logprobs)


# ---- against dense fp64


def test_all_tokens_is_torch_kl_div() -> None:
    targets, logits = full_targets(masked=0.0), random_logits()
    expected = F.kl_div(logits.log_softmax(1), teacher_logprobs(targets, V), log_target=True, reduction="batchmean")
    torch.testing.assert_close(sparse_kl(logits, targets), expected, rtol=1e-13, atol=0)


@every_temperature
@every_tail
def test_all_tokens_at_a_temperature_is_torch_kl_div(tail: str, temperature: float) -> None:
    targets, logits = captured_for(full_targets(masked=0.0), tail, temperature), random_logits()
    tempered = (teacher_logprobs(targets, V) * targets.temperature / temperature).log_softmax(1)
    student = (logits / temperature).log_softmax(1)
    expected = temperature**2 * F.kl_div(student, tempered, log_target=True, reduction="batchmean")
    found = sparse_kl(logits, targets, temperature=temperature, tail=tail)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@every_kd_weight
@every_temperature
@every_tail
@pytest.mark.parametrize("quantised", [False, True])
def test_equals_the_dense_computation(tail: str, temperature: float, kd_weight: float, quantised: bool) -> None:
    targets = captured_for(random_targets(N, V, K, quantised=quantised), tail, temperature)
    logits = random_logits()
    options = {"temperature": temperature, "kd_weight": kd_weight, "tail": tail}
    expected = torch.from_numpy(dense_losses(logits, targets, **options))  # type: ignore[arg-type]
    for reduction, value in (
        ("none", expected),
        ("sum", expected.sum()),
        ("mean", expected.sum() / targets.loss_mask.sum()),
    ):
        found = sparse_kl(logits, targets, reduction=reduction, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-13)


def test_the_tail_of_the_bucket_at_a_temperature_by_hand() -> None:
    # V = 6, entries .5 and .3, m = .2 over n = 4 tokens, T = 2. The tail's mean −log p is between log 5 = 1.6094379
    # (one token; .3 would allow less) and log(4/.2) = 2.9957323, at three tenths of that: 2.0253262. So at s = 1/2
    # log M = −1.6094379 + ½·(2.0253262 + ½·(2.9957323 − 2.0253262)) = −0.3541733, M = 0.7017534.
    # sqrt(.5) = 0.7071068, sqrt(.3) = 0.5477226, together with M 1.9565827.
    # Student uniform: q = 1/6, 1/6, 4/6. KL = Σ P·log(P/q) = 0.3613989·log(2.1683932) + 0.2799384·log(1.6796302)
    # + 0.3586628·log(0.5379941) = 0.2797178 + 0.1451687 − 0.2223378 = 0.2025487, times T² = 4: 0.8101949.
    targets = SparseTargetBatch(
        ids=torch.tensor([[1, 4]]),
        logprobs=torch.tensor([[0.5, 0.3]], dtype=torch.float64).log(),
        residual_logprob=torch.tensor([0.2], dtype=torch.float64).log(),
        labels=torch.tensor([0]),
    )
    found = sparse_kl(torch.zeros(1, 6, dtype=torch.float64), targets, temperature=2.0)
    assert found.item() == pytest.approx(0.8101949, abs=1e-7)


@pytest.mark.parametrize("temperature", [0.25, 0.8, 1.5, 2.0, 8.0])
def test_the_tempered_tail_stays_within_what_is_possible(temperature: float) -> None:
    """Between one token, or as many as the smallest entry allows, and an even spread; no tail stays none."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = np.sort(generator.dirichlet(np.full(20, 0.1)))[::-1]
        entries, tail = p[:4], p[4:]
        tokens, m = torch.tensor([16.0]).double(), torch.tensor([tail.sum()]).double()
        found = tempered_tail(m.log(), torch.tensor([entries.min()]).log(), tokens, temperature).exp().item()
        even = 16 * (tail.sum() / 16) ** (1 / temperature)
        full, part = divmod(tail.sum(), entries.min())  # the most uneven tail with no token above the smallest entry
        uneven = full * entries.min() ** (1 / temperature) + part ** (1 / temperature)
        low, high = sorted([even, uneven])
        slack = entries.min() ** (1 / temperature)  # the bound is of a fraction of a token more
        assert low - slack <= found <= high + slack
    none = tempered_tail(torch.tensor([-torch.inf]), torch.zeros(1), torch.ones(1), temperature)
    assert none.item() == -torch.inf


def test_the_tempered_tail_is_near_that_of_a_power_law() -> None:
    """1/rank² over 50,000 tokens, 64 of them entries: log M to .3 nats at T = 2, where an even spread is 1.4 off."""
    p = 1.0 / np.arange(1, 50_001) ** 2
    p /= p.sum()
    tail = torch.tensor(p[64:])
    found = tempered_tail(tail.sum().log()[None], torch.tensor(p[63:64]).log(), torch.tensor([49_936.0]), 2.0)
    assert abs(found.item() - tail.sqrt().sum().log().item()) < 0.3


def test_a_listed_label_does_not_bound_the_tail() -> None:
    """A server lists the token of the text whatever its rank; the tail then holds likelier ones."""
    p = 1.0 / np.arange(1, 50_001) ** 1.6
    p /= p.sum()
    taught = []
    for label in (2, 9_000):
        ids = np.unique([*range(20), label])
        targets = SparseTargetBatch(
            ids=torch.tensor(ids)[None],
            logprobs=torch.tensor(p[ids]).log()[None],
            residual_logprob=torch.tensor([1.0 - p[ids].sum()]).log(),
            labels=torch.tensor([label]),
        )
        taught.append(teacher_classes(targets, "bucket", 2.0, 50_000)[0, -1].exp().item())
    true = 1.0 - np.sqrt(p[:20]).sum() / np.sqrt(p).sum()
    assert abs(taught[0] - true) < 0.01 and abs(taught[1] - true) < 0.01  # 0.88; bounded by the label, 0.96


def test_renormalise_at_a_temperature_is_exact() -> None:
    """The entries are all it looks at, so the full distribution, tempered and then cut to them, gives the same."""
    everything = full_targets(masked=0.0)
    full = teacher_logprobs(everything, V)
    top = full.topk(K).indices.sort(dim=1).values
    targets = SparseTargetBatch(
        ids=top,
        logprobs=full.gather(1, top),
        residual_logprob=torch.log1p(-full.gather(1, top).exp().sum(1)),
        labels=everything.labels,
    )
    logits = random_logits()
    for temperature in TEMPERATURES:
        p = (full / temperature).log_softmax(1).gather(1, top).log_softmax(1)
        q = (logits / temperature).log_softmax(1).gather(1, top).log_softmax(1)
        expected = temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")
        found = sparse_kl(logits, targets, temperature=temperature, tail="renormalise")
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


def test_bucket_is_a_lower_bound_and_the_label_policy_is_the_kl_to_entries_plus_label() -> None:
    targets, logits = random_targets(N, V, K, masked=0.0), random_logits()
    everything = full_targets(masked=0.0)  # the same teachers: same seed
    whole = sparse_kl(logits, everything, reduction="none")
    assert (sparse_kl(logits, targets, reduction="none") <= whole + 1e-12).all()


@pytest.mark.long
@every_temperature
@every_tail
def test_gradient(tail: str, temperature: float) -> None:
    targets = captured_for(random_targets(5, 9, 4, seed=3), tail, temperature)
    logits = random_logits(5, 9).requires_grad_()
    for kd_weight in KD_WEIGHTS:
        assert torch.autograd.gradcheck(
            lambda z, a=kd_weight: sparse_kl(z, targets, temperature=temperature, kd_weight=a, tail=tail), logits
        )


@every_tail
def test_gradient_wherever_the_label_is(tail: str) -> None:
    """Label in the exact entries, sampled, outside all of them, or the only token outside them."""
    sampled, alone = (random_targets(3, vocab, 4, ragged=False, masked=0.0, sampled=vocab - 5) for vocab in (6, 5))
    assert (sampled.valid.sum(dim=1) == 5).all() and (alone.valid.sum(dim=1) == 4).all()
    cases = [(sampled, sampled.ids[:, place]) for place in (0, 3, 4)]
    for base, vocab in ((sampled, 6), (alone, 5)):
        rows = base.ids[:, : vocab - 1].tolist()
        cases.append((base, torch.tensor([next(i for i in range(vocab) if i not in row) for row in rows])))
    for base, labels in cases:
        logits = random_logits(3, 6 if base is sampled else 5).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, base=base, y=labels: sparse_kl(z, base, labels=y, kd_weight=0.5, tail=tail), logits
        )


# ---- zero and never negative


@every_temperature
@every_tail
def test_zero_where_student_and_teacher_are_equal(tail: str, temperature: float) -> None:
    targets = captured_for(full_targets(), tail, temperature)
    # A constant per row changes nothing.
    student = targets.temperature * teacher_logprobs(targets, V) + torch.arange(N)[:, None]
    student.requires_grad_()
    loss = sparse_kl(student, targets, temperature=temperature, tail=tail, reduction="none")
    assert loss.abs().max() < 1e-12
    loss.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-12


@extremes(TEMPERATURES)
def test_never_negative_if_not_an_estimate_and_always_finite(
    seed: int, vocab: int, share: float, scale: float, temperature: float, quantised: bool, dtype: torch.dtype
) -> None:
    targets = random_targets(4, vocab, max(1, int(share * vocab)), seed=seed, masked=0.0, quantised=quantised)
    logits = random_logits(4, vocab, seed=seed, scale=scale).to(dtype).requires_grad_()
    for tail in TAIL_POLICIES:
        captured = captured_for(targets, tail, temperature)
        loss = sparse_kl(logits, captured, temperature=temperature, tail=tail, reduction="none")
        # Rounding of the teacher's sum, against log-ratios as large as the logits (at most 69 in the tail).
        bound = 4 * temperature**2 * torch.finfo(dtype).eps * (10 + scale / temperature)
        assert tail in UNBIASED or (loss >= -bound).all()
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()


# ---- entries that are not there


def hostile_targets(dtype: torch.dtype = torch.float64) -> SparseTargetBatch:
    """One-hot teacher; zero-probability entries beside real ones; no entry; residual -inf and m = 1; one sampled."""
    inf = torch.inf
    return SparseTargetBatch(
        ids=torch.tensor([[2, 0, 0], [1, 3, 4], [0, 0, 0], [0, 1, 2], [5, 0, 0]]),
        logprobs=torch.tensor(
            [
                [0.0, -inf, -inf],
                [np.log(0.7), -inf, np.log(0.3)],
                [-inf, -inf, -inf],
                [np.log(0.2), np.log(0.3), np.log(0.4)],
                [np.log(1e-30), -inf, -inf],
            ],
            dtype=dtype,
        ),
        exact_counts=torch.tensor([3, 3, 3, 2, 3]),
        residual_logprob=torch.tensor([-inf, -inf, 0.0, np.log(0.1), 0.0], dtype=dtype),
        entropy=torch.tensor([0.0, 0.611, 1.9, 1.7, 1.8], dtype=dtype),
        labels=torch.tensor([2, 3, 0, 5, 1]),
    )


@every_kd_weight
@every_temperature
@every_tail
def test_absent_entries(tail: str, temperature: float, kd_weight: float) -> None:
    targets = captured_for(hostile_targets(), tail, temperature)
    options = {"temperature": temperature, "kd_weight": kd_weight, "tail": tail}
    logits = random_logits(5, 7).requires_grad_()
    found = sparse_kl(logits, targets, reduction="none", **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and gradient.isfinite().all()
    keep = [0, 1, 3, 4] if tail == "renormalise" else [0, 1, 2, 3, 4]  # without entries there is nothing to renormalise
    expected = dense_losses(logits[keep], targets[torch.tensor(keep)], **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[keep].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@every_tail
def test_padding_of_the_entry_list_changes_nothing(tail: str) -> None:
    targets, logits = captured_for(random_targets(N, V, K), tail, 2.0), random_logits()
    wider = replace(
        targets,
        ids=torch.cat([torch.randint(V, (N, 3)), targets.ids, torch.randint(V, (N, 2))], dim=1),
        logprobs=F.pad(targets.logprobs, (3, 2), value=-torch.inf),
        exact_counts=targets.exact_counts + 3,
    )
    options = {"temperature": 2.0, "kd_weight": 0.4, "tail": tail}
    torch.testing.assert_close(
        sparse_kl(logits, wider, **options), sparse_kl(logits, targets, **options), rtol=1e-13, atol=0
    )


@every_tail
def test_a_student_sure_of_itself_keeps_its_gradient(tail: str) -> None:
    """q_rest = 1e-26 is far below what 1 − Σq can resolve in fp32; the pull on the tail must still be there."""
    targets = SparseTargetBatch(
        ids=torch.tensor([[0]]),
        logprobs=torch.tensor([[0.5]]).log(),
        residual_logprob=torch.tensor([0.5]).log(),
        entropy=torch.tensor([1.2]),
        labels=torch.tensor([1]),
    )
    logits = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    sparse_kl(logits, targets, tail=tail).backward()
    assert logits.grad is not None
    # d/dz of −½·log q_rest: ½ of softmax over the rest; of the label alone under "label"; nothing under "renormalise".
    # q − w for an estimate: a sample without the tail pulls at nothing there, a label that is no entry has weight 1.
    expected = {"bucket": [0.5, -1 / 6, -1 / 6, -1 / 6], "label": [0.5, -0.5, 0, 0], "renormalise": [0, 0, 0, 0]}
    expected |= {"sampled": [0.5, 0, 0, 0], "realized": [0.5, -1, 0, 0]}
    torch.testing.assert_close(logits.grad, torch.tensor([expected[tail]], dtype=torch.float32), rtol=1e-5, atol=1e-6)


# ---- masks, labels, shapes


@every_tail
def test_masked_positions_contribute_nothing_at_all(tail: str) -> None:
    targets = captured_for(random_targets(N, V, K, dtype=torch.float32), tail, 2.0)
    masked = ~targets.loss_mask
    assert masked.any() and targets.loss_mask.any()

    def loss_and_gradient(z: Tensor, batch: SparseTargetBatch) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        loss = sparse_kl(z, batch, temperature=2.0, kd_weight=0.6, tail=tail)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    logits = random_logits().float()
    loss, gradient = loss_and_gradient(logits, targets)
    other = random_targets(N, V, K, seed=99, dtype=torch.float32)
    changed = replace(
        targets,
        ids=torch.where(masked[:, None], other.ids, targets.ids),
        logprobs=torch.where(masked[:, None], other.logprobs, targets.logprobs),
        exact_counts=torch.where(masked, other.exact_counts, targets.exact_counts),
        residual_logprob=torch.where(masked, -torch.inf, targets.residual_logprob),
        entropy=torch.where(masked, torch.nan, targets.entropy),
    )
    loss_2, gradient_2 = loss_and_gradient(torch.where(masked[:, None], 1e4 * logits.flip(0), logits), changed)
    assert torch.equal(loss, loss_2)
    assert torch.equal(gradient, gradient_2)
    assert (gradient[masked] == 0).all() and (gradient[~masked].abs().amax(dim=1) > 0).all()


@every_tail
def test_all_masked_is_zero_and_has_a_backward(tail: str) -> None:
    targets = random_targets(4, V, K)
    logits = random_logits(4).requires_grad_()
    nothing = torch.full((4,), IGNORE_INDEX)
    for options in ({"labels": nothing}, {"loss_mask": torch.zeros(4, dtype=torch.bool)}):
        loss = sparse_kl(logits, targets, kd_weight=0.5, tail=tail, **options)
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient == 0).all()


def test_batched_shapes_and_masks() -> None:
    targets, logits = random_targets(12, V, K), random_logits(12)
    batched = logits.view(3, 4, V)
    assert torch.equal(sparse_kl(batched, targets), sparse_kl(logits, targets))
    mask = torch.tensor([True, False] * 6)
    found = sparse_kl(batched, targets, loss_mask=mask.view(3, 4))
    assert found == sparse_kl(logits, targets, labels=targets.labels.masked_fill(~mask, IGNORE_INDEX).view(3, 4))
    with pytest.raises(ValueError, match="11 positions in the logits and 12 in the targets"):
        sparse_kl(logits[:11], targets)
    with pytest.raises(ValueError, match="`reduction` batchmean: expected mean, sum, none"):
        sparse_kl(logits, targets, reduction="batchmean")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    vocab = 70_000  # ids that neither type can represent
    targets, logits = random_targets(6, vocab, 5, dtype=torch.float32), random_logits(6, vocab).to(dtype)
    for tail in TAIL_POLICIES:
        found = sparse_kl(logits, targets, tail=tail, kd_weight=0.5)
        assert found.dtype == torch.float32
        assert torch.equal(found, sparse_kl(logits.float(), targets, tail=tail, kd_weight=0.5))


def test_ids_survive_a_change_of_dtype() -> None:
    """bfloat16 has eight bits: by way of it, token 517 would become 516."""
    targets = SparseTargetBatch(
        ids=torch.tensor([[517, 2**24 + 1]]),
        logprobs=torch.tensor([[-0.5, -1.0]]),
        residual_logprob=torch.tensor([-4.0]),
        labels=torch.tensor([2**24 + 1]),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        moved = targets.to(dtype=dtype, device=torch.device("cpu"))
        assert torch.equal(moved.ids, targets.ids) and torch.equal(moved.labels, targets.labels)
        assert moved.logprobs.dtype == moved.residual_logprob.dtype == dtype


def test_the_dense_computation_itself_by_hand() -> None:
    # Student uniform over 4, teacher .5/.25 and m = .25. Bucket: .5·log(.5/.25) + .25·log 1 + .25·log(.25/.5)
    # = .25·log 2. Renormalised (2/3, 1/3) against (1/2, 1/2): log 2 − H(1/3) = .0566330. Label 3 gets m:
    # .5·log 2 + 2·.25·log 1 = .5·log 2. At T = 2, z = (4, 2, 0, 0) and the weights .5, .25: lse(z/2) = log(e² + e + 2)
    # = 2.4938117, w·z/2 = .5·2 + .25·1 = 1.25, less an entropy of 1. Label 3 adds z₃ = 0; label 1 is an entry, adds
    # nothing; among logits shifted by 6 it would add 3.
    z, ids, p = np.zeros(4), np.array([0, 1]), np.array([0.5, 0.25])
    assert dense_kl(z, ids, p, 0.25, 3, 1.0, "bucket") == pytest.approx(0.25 * np.log(2))
    assert dense_kl(z, ids, p, 0.25, 3, 1.0, "renormalise") == pytest.approx(0.0566330, abs=1e-7)
    assert dense_kl(z, ids, p, 0.25, 3, 1.0, "label") == pytest.approx(0.5 * np.log(2))
    z = np.array([4.0, 2, 0, 0])
    for tail, label in (("sampled", 3), ("realized", 3), ("realized", 1)):
        found = dense_kl(z, ids, p, 0.25, label, 2.0, tail, entropy=1.0, captured=2.0)
        assert found == pytest.approx(0.2438117, abs=1e-7)
    found = [dense_kl(z + 6, ids, p, 0.25, 3, 2.0, tail, entropy=1.0, captured=2.0) for tail in UNBIASED]
    assert found[0] - found[1] == pytest.approx(3.0)
