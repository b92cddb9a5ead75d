"""How much rounding changes a teacher's predictions: one pass with random rounding errors in every module.

Two correct runs of one teacher on different devices, or in batches of different sizes, sum in another order and round
differently. What that does to the predictions depends on the network, and two runs on one machine do not show it: they
often agree to the last bit. So each module without submodules (projection, norm, embedding, activation) gets its output
multiplied by 1 + ε·u, with ε the spacing of its dtype at 1 and u uniform in [-1, 1]. A correct rounding is off by ε/2
at most, so this is about twice as much noise as a different device makes, whatever the depth of the network. Measured
on models of 2 to 30 layers: the divergence is 3 to 6 times that between the bfloat16 (or float16) and the float32 run.

Source: random rounding as in Monte Carlo arithmetic (D. S. Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Rounding:
    """Random rounding errors, the same ones in every run.

    Args:
        at_least: ε to use where the dtype has a smaller one: that of the cache, if it was computed in fewer bits.
    """

    def __init__(self, at_least: float = 0.0) -> None:
        self.at_least = at_least
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, values: Tensor) -> Tensor:
        """values·(1 + ε·u), in the same dtype."""
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        errors = torch.empty_like(wide).uniform_(-1.0, 1.0, generator=self._generators[device])
        errors *= max(torch.finfo(values.dtype).eps, self.at_least)
        return torch.addcmul(wide, wide, errors).to(values.dtype)

    @contextlib.contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Within the block, every module of `model` that has no submodules rounds like this."""

        def round_output(_: nn.Module, __: object, output: object) -> Tensor | None:
            if isinstance(output, DTensor) or not isinstance(output, Tensor) or not output.is_floating_point():
                return None  # unchanged
            return self(output)

        leaves = [module for module in model.modules() if next(module.children(), None) is None]
        hooks = [module.register_forward_hook(round_output) for module in leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
