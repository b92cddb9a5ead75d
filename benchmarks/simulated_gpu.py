"""A CUDA device that computes on the CPU: counts what the host waits for, and keeps asynchronous copies honest.

    with simulated_gpu() as gpu:
        model = gpu.to_device(model)          # parameters and buffers now say that they are on cuda:0
        ...                                   # any code of the project, with `device="cuda"`
    gpu.synchronisations                      # where the host waited for the device
    gpu.kernels, gpu.bytes_read, gpu.bytes_written

A tensor on the device is a `DeviceTensor`: a shell without storage around a tensor on the CPU, on which a dispatch mode
runs every operation. What differs from a CPU is simulated in the way that hurts most: a copy that is asked for with
`non_blocking` into pinned memory arrives when the host waits for an event recorded after it, and until then the memory
holds garbage; pinned memory that is being uploaded must not change before that. So code that reads too early, or that
overwrites an upload, computes wrong numbers here, as it would on a GPU.

What makes the host wait, by the sources of torch (ATen/native/cuda/Copy.cu, Indexing.cu, Nonzero.cu, TensorShape.cpp):
a value or a size that depends on values (`.item()`, `.tolist()`, `bool(tensor)`, `nonzero`, indexing by a mask,
`unique`, `masked_select`, `equal`, …), and copies between host and device that are blocking or use pageable memory.

With `shapes_only` nothing is computed: models and logits of any size, at no cost, with the same counts.

Counts of bytes follow the eager kernels: every operation reads its inputs and writes its outputs once; what selects by
an index reads what it selects. Views are free.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from pipeline.models.devices import kernels

DEVICE = torch.device("cuda", 0)
ON_DEVICE = ("cuda", "meta")  # C++ takes a `DeviceTensor` for one of device meta
ROOT = str(Path(__file__).resolve().parents[1])

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
WAITS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.multinomial,
    aten.repeat_interleave,
    aten._assert_async,
}
"""Operations whose result or size the host needs at once."""
SELECTS = {aten.gather: 2, aten.index: None, aten.index_select: 2, aten.embedding: 1, aten.scatter: 2, aten.scatter_: 2}
"""Operation -> place of the index among its arguments: they touch as many numbers as the index has."""
MAKES_NOTHING = {
    aten.empty,
    aten.empty_strided,
    aten.new_empty,
    aten.empty_like,
    aten.detach,
    aten.alias,
    aten.lift_fresh,
}


class DeviceTensor(Tensor):
    """Looks like a tensor on `DEVICE`; its numbers are in `values`, on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        with torch.inference_mode(False):  # views of parameters are no inference tensors either
            shell = torch.Tensor._make_wrapper_subclass(
                cls, values.size(), strides=values.stride(), dtype=values.dtype, device="meta"
            )
        shell.values = values
        return shell

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside `simulated_gpu`")


@dataclass
class _Copy:
    """A copy on its way."""

    source: Tensor
    target: Tensor | None  # None: an upload, whose source must stay as it was
    contents: Tensor


@dataclass
class Operation:
    """One kernel: its name, and the numbers of its tensors."""

    name: str
    read: int
    written: int
    largest: int  # elements of its largest tensor


class _Event:
    """Stands in for `torch.cuda.Event`: everything that was asked for before `record` has happened after waiting."""

    gpu: SimulatedGpu

    def __init__(self, **_: bool) -> None:
        self.reaches: int | None = None

    def record(self, stream: object = None) -> None:
        self.reaches = self.gpu.queued

    def synchronize(self) -> None:
        if self.reaches is not None and self.gpu.flying(self.reaches):
            self.gpu.event_waits += 1
            self.gpu.arrive(self.reaches)


class SimulatedGpu(TorchDispatchMode):
    """See the module; made by `simulated_gpu`.

    Attributes:
        synchronisations: what made the host wait, and from which line of the project.
        operations: kernels in their order.
        uploads, downloads: number of copies from and to the host.
        event_waits: number of times that the host waited for an event that had not happened yet.
    """

    def __init__(self, *, shapes_only: bool) -> None:
        super().__init__()
        self._place = torch.device("meta" if shapes_only else "cpu")  # of the values
        self._pinned: dict[int, Tensor] = {}  # storage address -> the tensor that keeps it alive
        self._flying: list[tuple[int, _Copy]] = []
        self.queued = 0
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.synchronisations: list[str] = []
        self.operations: list[Operation] = []
        self.uploads = self.downloads = self.event_waits = 0

    @property
    def kernels(self) -> int:
        return len(self.operations)

    def bytes_of(self, at_least: int = 0) -> int:
        """Bytes read and written by kernels on tensors of at least so many elements."""
        return sum(each.read + each.written for each in self.operations if each.largest >= at_least)

    def to_device(self, module: nn.Module) -> nn.Module:
        """Moves parameters and buffers; returns the module."""
        with self:
            for each in module.modules():
                for name, parameter in each._parameters.items():
                    if parameter is not None:
                        each._parameters[name] = nn.Parameter(DeviceTensor(parameter.detach()), requires_grad=False)
                for name, buffer in each._buffers.items():
                    if buffer is not None:
                        each._buffers[name] = DeviceTensor(buffer)
        getattr(module, "tie_weights", lambda: None)()
        return module

    def flying(self, reaches: int) -> bool:
        """Whether a copy before number `reaches` has not arrived."""
        return any(number < reaches for number, _ in self._flying)

    @torch.inference_mode()
    def arrive(self, reaches: int | None = None) -> None:
        """What the host sees after it has waited for everything up to number `reaches`, by default all."""
        staying = []
        for number, copy in self._flying:
            if reaches is not None and number >= reaches:
                staying.append((number, copy))
            elif self._place.type == "meta":
                continue
            elif copy.target is not None:
                copy.target.copy_(copy.contents)
            elif not torch.equal(copy.source, copy.contents):
                raise AssertionError("pinned memory was overwritten before its upload had happened")
        self._flying = staying

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if func is torch.ops.prim.device.default:
            return DEVICE
        if packet is aten.is_pinned:
            return self._is_pinned(args[0])
        if packet is aten.pin_memory or packet is aten._pin_memory:
            return self._pin(args[0].clone())
        if func.has_kernel_for_dispatch_key(COMPOSITE):  # inference mode hands them over whole
            with self:
                return func.decompose(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        wanted = kwargs.get("device")
        here = wanted is not None and torch.device(wanted).type in ON_DEVICE
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        on_device = any(isinstance(each, DeviceTensor) for each in tensors)
        if packet is aten._to_copy:
            return self._to_copy(args[0], kwargs, here)
        if packet is aten.copy_ and len({type(each) is DeviceTensor for each in args[:2]}) == 2:
            return self._copy(*args)
        if wanted is not None:
            kwargs["device"] = self._place if here else torch.device("cpu")
        if packet is aten.mm and "dtype" in func._overloadname:
            found = self._product(func, args, kwargs)
        else:
            bare_args, bare_kwargs = tree_map_only(DeviceTensor, lambda each: each.values, (args, kwargs))
            found = func(*bare_args, **bare_kwargs)
        if not (on_device or here):
            return self._pin(found) if pinned else found
        if on_device and (packet in WAITS or (packet is aten.index and _by_mask(args[1]))):
            self._wait(str(packet))
        self._count(func, args, kwargs, found)
        return self._wrap(func, args, kwargs, found)

    def _wrap(self, func: Any, args: Any, kwargs: Any, found: Any) -> Any:
        """Results as device tensors; those that are arguments are returned themselves."""
        given = tree_flatten((args, kwargs))[0] if func._schema.is_mutable else []
        same = {id(each.values): each for each in given if isinstance(each, DeviceTensor)}

        def shell(each: Tensor) -> DeviceTensor:
            return same[id(each)] if id(each) in same else DeviceTensor(each)

        return tree_map_only(Tensor, shell, found)

    def _product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """`mm` with an output dtype, which CPUs do not have: fp32 products and sums of rounded inputs."""
        left, right, dtype = (each.values if isinstance(each, DeviceTensor) else each for each in args)
        if dtype != torch.float32 or left.dtype not in (torch.bfloat16, torch.float16) or right.dtype != left.dtype:
            raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
        product = torch.mm(left.float(), right.float())  # fp32 sums
        if (out := kwargs.get("out")) is None:
            return product
        if out.shape != product.shape or out.dtype != dtype:
            raise RuntimeError(f"out is {out.shape} {out.dtype}, expected {product.shape} {dtype}")
        out.values.copy_(product)
        return out.values

    def _to_copy(self, source: Tensor, kwargs: Any, to_device: bool) -> Tensor:
        non_blocking, target = kwargs.pop("non_blocking", False), kwargs.pop("device", None)
        dtype = kwargs.get("dtype") or source.dtype
        from_device = isinstance(source, DeviceTensor)
        if target is None or from_device == to_device:
            values = source.values if from_device else source
            if from_device and dtype == values.dtype:
                return source  # it is there already, which C++ does not know
            found = aten._to_copy.default(values, **kwargs)
            if not from_device:
                return found
            self._operation("_to_copy", [source], [found], source.numel())
            return DeviceTensor(found)
        if to_device:
            values = aten._to_copy.default(source, **kwargs).to(self._place)
            self._upload(source, non_blocking)
            return DeviceTensor(values)
        found = torch.empty(source.shape, dtype=dtype)
        if non_blocking:  # torch takes pinned memory for it
            self._pin(found)
        self._download(found, source, non_blocking)
        return found

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, DeviceTensor):
            target.values.copy_(source)
            self._upload(source, non_blocking)
        else:
            self._download(target, source, non_blocking)
        return target

    def _upload(self, source: Tensor, non_blocking: bool) -> None:
        self.uploads += 1
        if not (non_blocking and self._is_pinned(source)):
            self._wait("copy to the device: " + ("blocking" if self._is_pinned(source) else "pageable memory"))
            return
        self._flying.append((self.queued, _Copy(source, None, source.clone())))
        self.queued += 1

    def _download(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        self.downloads += 1
        if not (non_blocking and self._is_pinned(target)):
            self.arrive()
            if self._place.type != "meta":
                target.copy_(source.values)
            self._wait("copy to the host: " + ("blocking" if self._is_pinned(target) else "pageable memory"))
            return
        self._flying.append((self.queued, _Copy(source, target, source.values.to(target.dtype, copy=True))))
        self.queued += 1
        target.view(torch.uint8).fill_(0x5A) if target.numel() and target.dim() else None

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def _wait(self, what: str) -> None:
        here = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{ROOT}/pipeline")]
        line = f"{here[-1].filename.removeprefix(ROOT + '/')}:{here[-1].lineno}" if here else "elsewhere"
        self.synchronisations.append(f"{what} ({line})")

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        packet = func.overloadpacket
        if packet in MAKES_NOTHING or _is_view(func):
            return
        read = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, DeviceTensor)]
        if (out := kwargs.get("out")) is not None:
            read = [each for each in read if each is not out]
        written = [each for each in tree_flatten(found)[0] if isinstance(each, Tensor)]
        touched = None
        if packet in SELECTS:
            place = SELECTS[packet]
            touched = args[place].numel() if place is not None else written[0].numel()
        self._operation(packet.__name__, read, written, touched)

    def _operation(self, name: str, read: list[Any], written: list[Tensor], touched: int | None) -> None:
        def size(tensors: list[Any]) -> int:
            return sum(min(each.numel(), touched or each.numel()) * each.element_size() for each in tensors)

        largest = max((min(each.numel(), touched or each.numel()) for each in [*read, *written]), default=0)
        self.operations.append(Operation(name, size(read), size(written), largest))


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an argument that is not changed."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _by_mask(indices: Any) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


@contextlib.contextmanager
def simulated_gpu(*, shapes_only: bool = False) -> Iterator[SimulatedGpu]:
    """Inside the block `cuda` is a simulated device; at its end everything has arrived."""
    gpu = SimulatedGpu(shapes_only=shapes_only)
    event = type("Event", (_Event,), {"gpu": gpu})

    def synchronize(device: object = None) -> None:
        gpu._wait("torch.cuda.synchronize")
        gpu.arrive()

    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "Event": event,
        "synchronize": synchronize,
        "current_stream": lambda device=None: None,
        "get_device_name": lambda device=None: "simulated",
    }
    no_kernels = mock.patch.object(kernels, "kernels_on", lambda device: None)  # they would need real memory
    with mock.patch.multiple(torch.cuda, **replaced), no_kernels, gpu:
        yield gpu
        gpu.arrive()
