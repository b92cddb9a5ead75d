"""Stage one on a simulated GPU: nothing inside a record batch makes the host wait; the numbers are those of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    masking_utils,
)

import cache_format as cf
from benchmarks.simulated_gpu import DEVICE, SimulatedGpu, simulated_gpu
from pipeline.models.devices.transfer import download, recorded_event, upload
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import export_head
from pipeline.models.isolation.mask_shortcuts import document_numbers, holds_packed
from pipeline.models.padding import pad_rows
from pipeline.teacher.engines import forward_pass
from pipeline.teacher.engines.chunked_selection import chunk_positions
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.packing import TokenRow
from tiny_masked import masked_config

V, D = 700, 16
RULES = {
    "top-k": TargetRule(top_k=8),
    "top-p": TargetRule(kind="top-p", top_p=0.5, max_entries=20),
    "threshold": TargetRule(kind="threshold", tail_threshold=0.05, samples=2),
    "random": TargetRule(kind="random", draws=9),
    "hidden": TargetRule(kind="hidden"),
}
STATES = cf.HiddenSpec(layers=(0, 1, 2), teacher_layers=2, width=D, dtype="int8", every=2)
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_implementation": "eager",  # the kernels of SDPA differ between devices
}


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).to(dtype).eval()


def gemma() -> PreTrainedModel:
    """Soft-capped logits, so a head that is not linear; a layer with a sliding window."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, sliding_window=8, final_logit_softcapping=3.0)
    return Gemma2ForCausalLM(config).eval()


def row_requests(*, packed: bool = True, with_states: bool = False) -> list[RowRequest]:
    rng = np.random.default_rng(4)
    requests = []
    for i, length in enumerate((17, 30, 12, 30, 21)):
        stored = np.arange(length) % 3 != 0
        documents = np.array([5, length - 5] if packed else [length], np.int32)
        row = TokenRow(rng.integers(3, V, length, dtype=np.int32), stored, documents)
        states = np.where(np.arange(length) % 2, stored, False) if with_states else None
        requests.append(RowRequest(index=i, row=row, place=i, stored=stored, with_states=states))
    return requests


def engine(model: PreTrainedModel, head: Head, device: torch.device, **options: Any) -> TransformersEngine:
    found = Head(model=model, linear=head.linear, vocab_size=V)
    return TransformersEngine(found, device=device, batch_size=2, **options)


def on_both(
    make: Callable[[], PreTrainedModel], rule: TargetRule, requests: Sequence[RowRequest], **options: Any
) -> tuple[list[cf.CacheRow], list[cf.CacheRow], SimulatedGpu]:
    """The rows by the CPU and by the simulated GPU; counted is what happens until the record batch has been queued."""
    model = make()
    head = open_head(model, V)
    cpu = engine(model, head, torch.device("cpu"), **options).run(requests, [rule]).rows()
    with simulated_gpu() as gpu:
        there = engine(gpu.to_device(model), head, DEVICE, **options)
        gpu.reset()
        running = there.run(requests, [rule])
        assert gpu.event_waits == 0
        rows = running.rows()
    return cpu, rows, gpu


def check_same(found: Sequence[cf.CacheRow], expected: Sequence[cf.CacheRow]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.targets.counts, other.targets.counts)
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)
        for name in ("logprobs", "entropy", "residual_logprob"):
            np.testing.assert_allclose(getattr(one.targets, name), getattr(other.targets, name), atol=1e-4)
        if other.hidden is not None:
            for layer, states in other.hidden.states.items():
                np.testing.assert_allclose(one.hidden.states[layer].astype(float), states.astype(float), atol=1.0)


@pytest.mark.long
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("kind", ["top-k", "top-p", "threshold", "random"])
def test_a_record_batch_is_queued_without_waiting(kind: str, packed: bool) -> None:
    cpu, rows, gpu = on_both(llama, RULES[kind], row_requests(packed=packed))
    assert gpu.synchronisations == []
    assert gpu.uploads == 3  # one for each of its batches
    assert gpu.event_waits == 1
    check_same(rows, cpu)


def test_hidden_states_are_queued_too() -> None:
    cpu, rows, gpu = on_both(llama, RULES["threshold"], row_requests(with_states=True), hidden=STATES)
    assert gpu.synchronisations == [] and gpu.uploads == 3 and gpu.event_waits == 1
    assert all(row.hidden is not None and row.hidden.scales for row in rows)
    check_same(rows, cpu)


def test_hidden_targets_are_queued_too() -> None:
    states = cf.HiddenSpec(layers=(2,), teacher_layers=2, width=D, dtype="float16")
    requests = [
        RowRequest(index=r.index, row=r.row, place=r.place, stored=r.stored, with_states=r.stored)
        for r in row_requests()
    ]
    export = export_head(open_head(llama(), V))
    cpu, rows, gpu = on_both(llama, RULES["hidden"], requests, hidden=states, export=export)
    assert gpu.synchronisations == [] and gpu.uploads == 3
    check_same(rows, cpu)


def test_the_models_own_head_is_queued_too() -> None:
    cpu, rows, gpu = on_both(gemma, RULES["threshold"], row_requests())
    assert gpu.synchronisations == [] and gpu.uploads == 3
    check_same(rows, cpu)


def test_several_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_pass, "chunk_positions", lambda vocab_size: 7)
    cpu, rows, gpu = on_both(llama, RULES["threshold"], row_requests())
    assert gpu.synchronisations == [] and gpu.uploads == 3
    check_same(rows, cpu)


@pytest.mark.long
@pytest.mark.parametrize("wait", ["item", "mask", "upload", "download"])
def test_a_wait_put_in_by_hand_is_counted(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = Head.hidden_states

    def waiting(head: Head, *inputs: Tensor, **options: object) -> Tensor:
        hidden = states(head, *inputs, **options)
        if wait == "item":
            hidden.sum().item()
        elif wait == "mask":
            hidden[hidden > 0]
        elif wait == "upload":
            torch.zeros(3).to(hidden.device)
        else:
            hidden.cpu()
        return hidden

    monkeypatch.setattr(Head, "hidden_states", waiting)
    _, _, gpu = on_both(llama, RULES["top-k"], row_requests())
    assert len(gpu.synchronisations) == 3
    assert all("(pipeline/teacher/engines/" in each for each in gpu.synchronisations), gpu.synchronisations


def test_memory_of_copies_on_their_way_is_neither_read_nor_changed() -> None:
    with simulated_gpu() as gpu:
        values = torch.arange(6.0)
        (there,) = upload([values], DEVICE)
        host = download(there + 1)
        assert not torch.equal(host, values + 1)
        event = recorded_event(DEVICE)
        assert event is not None
        event.synchronize()
        assert torch.equal(host, values + 1) and gpu.synchronisations == []
        pinned = torch.zeros(4, pin_memory=True)
        pinned.to(DEVICE, non_blocking=True)
        pinned += 1
        with pytest.raises(AssertionError, match="overwritten"):
            gpu.arrive()
        gpu._flying.clear()


def test_one_upload_carries_several_dtypes_and_shapes() -> None:
    given = [torch.arange(5), torch.rand(3, 2, dtype=torch.float64), torch.zeros(7, 0), torch.ones(3, dtype=torch.int8)]
    assert all(one is other for one, other in zip(upload(given, torch.device("cpu")), given, strict=True))
    with simulated_gpu() as gpu:
        found = upload(given, DEVICE)
        assert gpu.uploads == 1
        for there, here in zip(found, given, strict=True):
            assert there.device == DEVICE and there.dtype == here.dtype and torch.equal(there.cpu(), here)


@pytest.mark.parametrize("bias", [False, True])
def test_fp32_logits_are_the_sums_that_the_plain_product_rounds(bias: bool) -> None:
    model = llama(torch.bfloat16)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(V, dtype=torch.bfloat16))
    head = Head(model=model, linear=True, vocab_size=V)
    hidden = torch.randn(9, D, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = head.logits(hidden)
        exact = hidden.double() @ model.lm_head.weight.double().T + (model.lm_head.bias.double() if bias else 0.0)
        with simulated_gpu() as gpu:
            gpu.to_device(model)
            assert head.logits_dtype == torch.float32
            buffer = torch.empty(20, V, device=DEVICE)
            in_buffer, fresh = (head.logits(hidden.to(DEVICE), out=out).cpu() for out in (buffer, None))
    assert plain.dtype == torch.bfloat16 and fresh.dtype == torch.float32 and torch.equal(in_buffer, fresh)
    np.testing.assert_allclose(plain.double(), exact, atol=0.02, rtol=2**-7)
    np.testing.assert_allclose(fresh.double(), exact, atol=1e-5, rtol=1e-5)


def test_only_16_bit_products_without_gradients_are_fp32() -> None:
    model = llama()
    head = Head(model=model, linear=True, vocab_size=V)
    assert head.logits_dtype == torch.float32 and not head.sums_in_fp32
    model.to(torch.bfloat16)
    assert head.logits_dtype == torch.bfloat16 and not head.sums_in_fp32  # on a CPU
    assert "logits" not in engine(model, head, torch.device("cpu")).describe()
    with simulated_gpu() as gpu:
        gpu.to_device(model)
        assert head.sums_in_fp32
        facts = engine(model, head, DEVICE).describe()
        assert facts["logits"] == "float32" and facts["chunk_positions"] == 4096
        assert not Head(model=model, linear=False, vocab_size=V).sums_in_fp32


def test_chunks_have_a_size_in_bytes() -> None:
    assert [chunk_positions(vocab_size) for vocab_size in (400, 32_000, 128_256, 262_144)] == [4096, 2048, 512, 256]
    assert chunk_positions(10**7) == 128


def test_packed_rows_are_found_as_transformers_finds_them() -> None:
    rows = [request.row for request in row_requests(packed=False)]
    empty = TokenRow(rows[0].input_ids, rows[0].loss_mask, np.array([0, len(rows[0].input_ids)], np.int32))
    packed = [request.row for request in row_requests()]
    for given, expected in ((rows, False), ([empty], False), (packed, True), ([*rows, packed[0]], True)):
        _, positions = pad_rows(given)
        found = masking_utils.find_packed_sequence_indices(positions)
        assert holds_packed(given) == expected == (found is not None)
        if found is not None:
            assert torch.equal(document_numbers(positions), found)


@pytest.mark.parametrize("padded", [True, False])
def test_masked_teachers_are_queued_too(padded: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(masked_config("bert", vocab_size=V, attn_implementation="sdpa")).eval()
    requests = [
        RowRequest(index=r.index, row=r.row, place=r.index, stored=r.stored)
        for r in row_requests(packed=False)
        if padded or len(r.row.input_ids) == 30
    ]
    cpu_head = open_head(model, V, masked=True)
    options = {"batch_size": 5}
    cpu = TransformersEngine(cpu_head, device=torch.device("cpu"), **options).run(requests, [RULES["top-k"]]).rows()
    with simulated_gpu() as gpu:
        head = Head(model=gpu.to_device(model), linear=cpu_head.linear, vocab_size=V, masked=True)
        there = TransformersEngine(head, device=DEVICE, **options)
        gpu.reset()
        rows = there.run(requests, [RULES["top-k"]]).rows()
        assert gpu.synchronisations == [] and gpu.uploads == 1
    check_same(rows, cpu)
