"""What glibc does with memory that a step frees."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks: faulting them in again at each step costs up to half a MoE layer."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
