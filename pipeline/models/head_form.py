"""A vocabulary head as numbers that can be stored: the matrix, and what is done to its product.

    logits = c·tanh(s·(W·x + b) / c)      s: a scale of the logits, 1 in most models; c: soft-capping, if there is any

x is what the output matrix is multiplied with: of a causal model the last hidden state, of a BERT what the head's
transform makes of it. It is read off where the model's own forward multiplies, so it is right whatever comes before.

Nothing is guessed from class names: s and c are the numbers of those names in the configuration if the model's own
head, its matrix product replaced by known numbers, does with them what the formula does; and the whole formula is held
against the model's logits, small and large. A head that does anything else is refused.

Shapes: n positions, D width of x, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import cache_format as cf
from pipeline.errors import ModelError
from pipeline.models.head import LOUD_LOGIT, PROBE_TOKENS, Head, deviation, evaluating, tolerance
from pipeline.models.placement import values_of

# What configurations call s, 1/s and c.
MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED = ("logits_scaling",)
CAPPED = ("final_logit_softcapping",)

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """What is known of a head.

    Attributes:
        transforms: whether x is something else than the states that the head is applied to.
        width: D.
    """

    head: Head
    logit_scale: float
    softcap: float | None
    transforms: bool
    width: int

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States that the head is applied to → logits [n, V], as `Head.logits`, and x [n, D]."""
        if not self.transforms:
            return self.head.logits(hidden, out=out), hidden
        with _inputs_of(self.head) as found:
            logits = self.head.own_logits(hidden)
        return logits, found[0]

    def file(self, layer: int) -> tuple[cf.HeadSpec, bytes]:
        """What a cache says of this head, and the file that holds its numbers.

        Args:
            layer: the number under which x is stored.
        """
        weight, bias, dtype = _numbers(self.head)
        contents = cf.head_contents(_array(weight), None if bias is None else _array(bias), dtype)
        spec = cf.HeadSpec(
            layer=layer,
            dtype=dtype,
            bias=bias is not None,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            bytes=len(contents),
            sha256=cf.sha256(contents),
        )
        return spec, contents


@torch.no_grad()
def head_form(head: Head) -> HeadForm:
    """Raises: ModelError if the head is no matrix, or does more to its product than scale and cap it."""
    name, device = type(head.model).__name__, head.device
    if not isinstance(head.model.get_output_embeddings(), nn.Linear):
        raise _refused(name, "its output embeddings are no matrix")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(head.vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    with evaluating(head.model):
        hidden = head.hidden_states(ids, torch.arange(PROBE_TOKENS, device=device)[None])[0]
        with _inputs_of(head) as found:
            quiet = head.own_logits(hidden)
        same = found[0].shape == hidden.shape and torch.equal(found[0], hidden)
        scale, softcap = _scale_and_cap(head, hidden, name)
        form = HeadForm(head=head, logit_scale=scale, softcap=softcap, transforms=not same, width=found[0].shape[-1])
        weight, bias = (None if each is None else each.float() for each in _numbers(head)[:2])
        for factor in (1.0, LOUD_LOGIT / max(quiet.abs().max().item(), 1e-3)):
            expected, states = form.logits(hidden * factor)
            products = nn.functional.linear(states.float().cpu(), weight, bias)
            ratio = deviation(finished(products, scale, softcap), expected.cpu()) / tolerance(expected, roundings=8)
            if not ratio <= 1.0:
                raise _refused(name, f"its logits differ from those by {ratio:.2g} times what rounding explains")
    return form


def finished(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """logits of W·x + b, in place."""
    if scale != 1.0:
        products.mul_(scale)
    return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


def _scale_and_cap(head: Head, hidden: Tensor, name: str) -> tuple[float, float | None]:
    """Those with which the formula is what the head does to a product of known numbers."""
    output, config = head.model.get_output_embeddings(), head.model.config.get_text_config()
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
        expected = finished(known[0, :, : head.vocab_size].cpu().clone(), scale, softcap)
        if deviation(found, expected) <= 1e-4 * max(1.0, expected.abs().max().item()):
            return scale, softcap
    raise _refused(name, "it does more to them than scale and soft-cap")


@contextlib.contextmanager
def _inputs_of(head: Head) -> Iterator[list[Tensor]]:
    """A list of what the output matrix is multiplied with inside the block, [n, D] each."""
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


def _numbers(head: Head) -> tuple[Tensor, Tensor | None, str]:
    """W [V, D] and b [V] on the CPU, in the narrowest dtype that holds exactly these numbers; its name."""
    output = head.model.get_output_embeddings()
    weight = values_of(output, "weight")
    assert weight is not None
    weight, bias = weight[: head.vocab_size].cpu(), values_of(output, "bias")
    both = [weight] if bias is None else [weight, bias[: head.vocab_size].cpu()]
    wide = torch.promote_types(both[0].dtype, both[-1].dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == wide or all(torch.equal(each.to(dtype).to(wide), each.to(wide)) for each in both):
            break
    narrow = [each.to(dtype) for each in both]
    return narrow[0], None if bias is None else narrow[1], DTYPES[dtype]


def _array(tensor: Tensor) -> np.ndarray:
    """As `cf.head_contents` takes it: of bfloat16, which numpy does not know, the bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _refused(name: str, why: str) -> ModelError:
    return ModelError(
        f"--targets hidden: {name}'s logits are not a matrix times a hidden state, scaled and soft-capped: {why}. Use "
        "--targets threshold, which takes any head."
    )
