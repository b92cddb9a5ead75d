"""How exact are the log-probabilities of `vllm serve` in float32? The same rows in transformers, and in float64.

    vllm serve      lists of `ServerEngine`
    transformers    lists of `TransformersEngine`
    float64         the model in transformers in float64, which both are compared with

Where the largest difference is, a second table follows the hidden state through the layers of transformers: how far it
is from float64 after each of them. If the error jumps at a layer, the model amplifies rounding errors there.

Needs vLLM in this environment (`make test-vllm` makes one): `.venv-vllm/bin/python -m benchmarks server_rounding`.

Bound: transformers, which computes the same products in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from benchmarks.servers import ARGUMENTS, ROW_TOKENS, TOP_K, rows_of, vllm_server
from benchmarks.teacher import describe, open_teacher
from pipeline.models.head import open_head
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.engines.server.server_opening import open_server
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule

SERVED, HERE = "`vllm serve`", "transformers"


def run(settings: Settings) -> Result:
    model, tokenizer = open_teacher(settings.teacher)
    requests = rows_of(tokenizer, 4 if settings.quick else 32)
    rule = TargetRule(top_k=TOP_K)
    with vllm_server(settings.teacher.resolve(), *ARGUMENTS) as (url, _):
        served = open_server(url, ServerConfig(), tokenizer, rule=rule, seq_len=ROW_TOKENS, all_positions=False)
        with contextlib.closing(served):
            found = {SERVED: served.run(requests, [rule]).rows()}
    here = TransformersEngine(open_head(model, served.vocab_size), device=torch.device("cpu"), batch_size=8)
    found[HERE] = here.run(requests, [rule]).rows()
    wide = in_float64(model)
    exact = [forward(wide, request)[0] for request in requests]
    far = {name: deviations(rows, exact) for name, rows in found.items()}
    row, position = max(far[SERVED], key=lambda at: far[SERVED][at])
    states = [forward(each, requests[row])[1][:, position] for each in (model, wide)]
    return Result(
        name="server_rounding",
        question="How far log-probabilities of a server and of transformers, both in float32, are from float64.",
        bound="transformers, which computes the same products in float32.",
        settings={
            "teacher": describe(model),
            "rows": len(requests),
            "row_tokens": ROW_TOKENS,
            "positions": len(far[SERVED]),
            "top_k": TOP_K,
        },
        tables=[
            Table(
                "Difference from float64, the largest at each position, nats",
                ["", "median", "99 %", "largest"],
                [[name, *np.quantile(list(each.values()), (0.5, 0.99, 1.0)).tolist()] for name, each in far.items()],
            ),
            Table(
                "The hidden state where the server's difference is largest, in transformers",
                ["layers", "length", "relative difference from float64"],
                layer_table(*states),
            ),
        ],
        summary={
            "position": f"row {row}, position {position}",
            "server_nats": far[SERVED][row, position],
            "transformers_nats": far[HERE][row, position],
        },
    )


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy. The norms of Llama round to float32 whatever the dtype, so torch's take their place."""
    wide = copy.deepcopy(model).double()
    for name, norm in list(wide.named_modules()):
        if isinstance(norm, LlamaRMSNorm):
            exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            exact.weight = norm.weight
            wide.set_submodule(name, exact)
    return wide


@torch.inference_mode()
def forward(model: PreTrainedModel, request: RowRequest) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, V], and the hidden states before the first layer and after each one [layers, T, D]."""
    ids = torch.from_numpy(request.row.input_ids.astype(np.int64))[None]
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.logits[0].log_softmax(dim=1), torch.cat(out.hidden_states[:-1]).double()  # the last one is normalised


def deviations(rows: Sequence[cf.CacheRow], exact: Sequence[Tensor]) -> Mapping[tuple[int, int], float]:
    """By row and position: the largest difference of an entry's log-probability, in nats."""
    found = {}
    for i, (row, logprobs) in enumerate(zip(rows, exact, strict=True)):
        for t in np.flatnonzero(row.loss_mask).tolist():
            ids, stored = row.targets.at(t)
            found[i, t] = float(np.abs(stored - logprobs[t].numpy()[ids]).max())
    return found


def layer_table(states: Tensor, exact: Tensor) -> list[list[int | float]]:
    """Number of layers passed, and of the hidden state [layers, D] after them its length and error."""
    lengths = exact.norm(dim=1)
    errors = (states - exact).norm(dim=1) / lengths
    return [[i, *pair] for i, pair in enumerate(zip(lengths.tolist(), errors.tolist(), strict=True))]
