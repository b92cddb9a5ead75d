"""Options of loading a model that several commands have, each declared once; a configuration adds the heading.

    device: str = DEVICE(group=HARDWARE)

Not a base class: its fields would come first in every help and signature. Standard library only.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeAlias

from pipeline.options import option

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

DEVICE = partial(option, "auto", help="auto (CUDA, MPS, CPU), cpu, cuda, cuda:1 or mps.", common=True)
DTYPE = partial(option, "auto", help="auto: float32 on a CPU, the checkpoint's own dtype elsewhere.", common=True)
REVISION = partial(option, None, help="Branch, tag or commit of a hub model.")
TRUST_REMOTE_CODE = partial(option, False, help="Run code that comes with a hub model.")
PADDING_FREE = partial(
    option,
    None,
    help="Run documents end to end, without padding or attention masks (variable-length attention).",
    default_text="on for CUDA and CPUs if the model supports it",
)
COMPILE = partial(
    option,
    False,
    help="Compile the layers of the model with torch.compile: fewer kernels, after a minute or so of compiling.",
)
DEVICE_MAP = partial(
    option,
    None,
    help="Spread the teacher over GPUs, CPU and disk: auto (accelerate), or a JSON file of modules and devices.",
    metavar="auto|FILE",
)
TENSOR_PARALLEL = partial(
    option,
    False,
    flag="tp",
    help="Split every layer of the teacher across the torchrun processes (tensor parallelism of transformers).",
)
