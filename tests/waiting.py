"""Copies to the device that the host waits for, caught as they are made, on any device."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FROM_LISTS = ("tensor", "as_tensor", "new_tensor")


class NoCopies(TorchDispatchMode):
    """AssertionError at a copy from the CPU to another device that waits for it, and at an index by a mask.

    `pinned`: also at a copy out of memory that is not page-locked, which CUDA stages behind the work before it.
    """

    def __init__(self, pinned: bool = False):
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default:
            self._copy(args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._copy(args[1], args[0].device, len(args) > 2 and args[2])
        elif func in (aten.index.Tensor, aten.index_put_.default):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{func} by a mask counts it on the host"
                assert index is None or index.device == args[0].device, f"{func} copies its index"
        return func(*args, **kwargs)

    def _copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if source.device.type == "cpu" and target.type != "cpu":
            assert non_blocking, "a copy that waits for the device"
            assert not self.pinned or source.is_pinned(), "a copy from memory that is not page-locked"


class NoLists(TorchFunctionMode):
    """AssertionError where numbers of Python are copied to another device than the CPU: the copy waits for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in FROM_LISTS:
            assert made.device.type == "cpu", f"torch.{func.__name__} copies and waits; torch.full does not"
        return made
