"""A vocabulary head as it is stored in a cache: a matrix, a bias, a scale and a soft cap.

    logits = c·tanh(s·(W·x + b) / c)      s: scale of the logits, 1 in most models; c: soft cap, if the model has one

x is the input of the output matrix: for a causal model the last hidden state, for a BERT the output of the head's
transform. It is recorded where the model's own forward pass multiplies, so it is right whatever comes before.

Nothing is decided by class name. s and c are read from the configuration and used only if the model's own head, with
its matrix product replaced by known numbers, applies them as the formula does. Then the whole formula is compared with
the model's logits, small and large. A head that does anything else is refused.

Shapes: n positions, D width of x, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import cache_format as cf
from pipeline.errors import ModelError
from pipeline.models.devices.placement import values_of
from pipeline.models.head import LOUD_LOGIT, PROBE_TOKENS, Head, deviation, probing, tolerance

# Names of s, 1/s and c in configurations.
MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED = ("logits_scaling",)
CAPPED = ("final_logit_softcapping",)

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class HeadExport:
    """A head together with what a cache stores of it.

    Attributes:
        transforms: x is not the state that the head is applied to, but what the head's transform makes of it.
        width: D.
    """

    head: Head
    logit_scale: float
    softcap: float | None
    transforms: bool
    width: int

    @cached_property
    def layer(self) -> int:
        """The number under which x is stored: that of the last layer, or one more for the output of a transform."""
        last, _ = self.head.layers()
        return last + 1 if self.transforms else last

    @property
    def spec(self) -> cf.HeadSpec:
        """The head's entry in the manifest."""
        return self._file[0]

    @property
    def contents(self) -> bytes:
        """The file that holds its weights."""
        return self._file[1]

    @cached_property
    def _file(self) -> tuple[cf.HeadSpec, bytes]:
        return self.file(self.layer)  # on first use: verification needs no copy of the weights

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States [n, D'] that the head is applied to → logits [n, V], as `Head.logits`, and x [n, D]."""
        if not self.transforms:
            return self.head.logits(hidden, out=out), hidden
        with _inputs_of(self.head) as found:
            logits = self.head.own_logits(hidden)
        return logits, found[0]

    def file(self, layer: int) -> tuple[cf.HeadSpec, bytes]:
        """`spec` and `contents` for an x that is stored as the states of `layer`."""
        return head_file(*_numbers(self.head), layer=layer, logit_scale=self.logit_scale, softcap=self.softcap)


def head_file(
    weight: Tensor, bias: Tensor | None, *, layer: int, logit_scale: float, softcap: float | None
) -> tuple[cf.HeadSpec, bytes]:
    """A head's entry in the manifest and the file that holds its weights.

    Args:
        weight: [V, D] on the CPU.
        bias: [V] likewise.
    """
    weight, bias, dtype = narrowest(weight, bias)
    contents = cf.head_contents(_array(weight), None if bias is None else _array(bias), dtype)
    spec = cf.HeadSpec(
        layer=layer,
        dtype=dtype,
        bias=bias is not None,
        logit_scale=logit_scale,
        softcap=softcap,
        bytes=len(contents),
        sha256=cf.sha256(contents),
    )
    return spec, contents


def export_head(head: Head) -> HeadExport:
    """Find the form of a head and check it against the model's own logits.

    Raises:
        ModelError: the head is not a matrix, or does more to its product than scaling and soft-capping.
    """
    name, device = type(head.model).__name__, head.device
    if not isinstance(head.model.get_output_embeddings(), nn.Linear):
        raise _refused(name, "its output embeddings are not a matrix")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(head.vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    with probing(head.model):
        hidden = head.hidden_states(ids, torch.arange(PROBE_TOKENS, device=device)[None])[0]
        with _inputs_of(head) as found:
            quiet = head.own_logits(hidden)
        same = found[0].shape == hidden.shape and torch.equal(found[0], hidden)
        scale, softcap = _scale_and_cap(head, hidden, name)
        export = HeadExport(
            head=head, logit_scale=scale, softcap=softcap, transforms=not same, width=found[0].shape[-1]
        )
        weight, bias = (None if each is None else each.float() for each in _numbers(head))
        for factor in (1.0, LOUD_LOGIT / max(quiet.abs().max().item(), 1e-3)):
            expected, states = export.logits(hidden * factor)
            products = nn.functional.linear(states.float().cpu(), weight, bias)
            ratio = deviation(scaled_and_capped(products, scale, softcap), expected.cpu())
            ratio /= tolerance(expected, roundings=8)
            if not ratio <= 1.0:
                raise _refused(name, f"its logits differ from this by {ratio:.2g} times what rounding explains")
    return export


def scaled_and_capped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """c·tanh(s·products / c), in place."""
    if scale != 1.0:
        products.mul_(scale)
    return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


def _scale_and_cap(head: Head, hidden: Tensor, name: str) -> tuple[float, float | None]:
    """s and c: the pair from the configuration that reproduces what the head makes of a known product."""
    output, config = head.model.get_output_embeddings(), head.model.config.get_text_config(decoder=True)
    rows = output.weight.shape[0]

    def given(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, each, None) for each in names]
        return [float(each) for each in values if isinstance(each, int | float) and each > 0]

    scales = [1.0, *given(MULTIPLIED), *(1.0 / each for each in given(DIVIDED))]
    known = torch.linspace(-60.0, 60.0, rows, device=head.device).expand(1, len(hidden), rows)
    hook = output.register_forward_hook(lambda *_: known)
    try:
        found = head.own_logits(hidden).float().cpu()
    finally:
        hook.remove()
    for scale, softcap in itertools.product(scales, [None, *given(CAPPED)]):
        expected = scaled_and_capped(known[0, :, : head.vocab_size].cpu().clone(), scale, softcap)
        if deviation(found, expected) <= 1e-4 * max(1.0, expected.abs().max().item()):
            return scale, softcap
    raise _refused(name, "it does more to them than scale and soft-cap")


@contextlib.contextmanager
def _inputs_of(head: Head) -> Iterator[list[Tensor]]:
    """A list that collects the inputs of the output matrix inside the block, [n, D] each."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        states = arguments[0]
        states = states.full_tensor() if isinstance(states, DTensor) else states
        found.append(states[0].detach())

    hook = head.model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _numbers(head: Head) -> tuple[Tensor, Tensor | None]:
    """W [V, D] and b [V] on the CPU."""
    output = head.model.get_output_embeddings()
    weight = values_of(output, "weight")
    assert weight is not None
    bias = values_of(output, "bias")
    return weight[: head.vocab_size].cpu(), None if bias is None else bias[: head.vocab_size].cpu()


def narrowest(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, str]:
    """Both in the narrowest dtype that holds them exactly, and the name of that dtype."""
    both = [weight] if bias is None else [weight, bias]
    wide = torch.promote_types(both[0].dtype, both[-1].dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == wide or all(torch.equal(each.to(dtype).to(wide), each.to(wide)) for each in both):
            break
    narrow = [each.to(dtype) for each in both]
    return narrow[0], None if bias is None else narrow[1], DTYPES[dtype]


def _array(tensor: Tensor) -> np.ndarray:
    """The array that `cf.head_contents` takes: numpy has no bfloat16, so its bits as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _refused(name: str, why: str) -> ModelError:
    return ModelError(
        f"`targets=hidden`: {name}'s logits are not a matrix times a hidden state, scaled and soft-capped: {why}. Use "
        "`targets=threshold`, which takes any head."
    )
