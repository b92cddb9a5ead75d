"""The precision of a training run: the fastest that does not hurt the result, unless the user chooses.

    GPU with bfloat16 (Ampere and later)   bfloat16 autocast, TF32 for products that stay float32
    any other device                       float32

Weights, their gradients, the optimizer and every sum over the vocabulary are float32 in both. float16 is not used where
bfloat16 is missing: the head computes its gradient during the forward pass, divided by the loss tokens of the step,
before a loss scaler could lift it out of the range where float16 underflows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available


def default_arithmetic() -> dict[str, bool]:
    """Training arguments for the current GPU."""
    return {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),  # emulated it is slower than float32
        **({"tf32": True} if is_torch_tf32_available() else {}),
    }


def used_arithmetic(arguments: TrainingArguments) -> dict[str, Any]:
    """The effective values, for the record of the run."""
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    return {"bf16": bool(arguments.bf16), "tf32": _tf32(arguments), "optim": str(optimizer)}


def describe_arithmetic(arguments: TrainingArguments) -> str:
    """Such as "in bfloat16 on NVIDIA H100"."""
    kind = "bfloat16" if arguments.bf16 else "float32 with TF32 products" if _tf32(arguments) else "float32"
    if arguments.device.type != "cuda":
        return f"in {kind} on {arguments.device.type}"
    why = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", which has no bfloat16"
    return f"in {kind} on {torch.cuda.get_device_name()}{why}"


def _tf32(arguments: TrainingArguments) -> bool:
    """Whether float32 products use TF32."""
    if arguments.device.type != "cuda":
        return False
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
