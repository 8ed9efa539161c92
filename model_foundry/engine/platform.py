"""The machine under the torch engine: device, compute type, threads, allocator, and the memory it took.

It knows nothing of models.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import resource
import sys

import torch

from model_foundry.errors import EngineError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MADV_COLLAPSE = 25  # Linux 6.1
_HUGE_PAGE_BYTES = 2**21
_OUT_OF_MEMORY_SIGNS = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "STATUS_ALLOC_FAILED",
    # oneDNN, when it finds no room for its kernels or its working memory.
    "could not create a primitive", "could not execute a primitive", "could not create a memory",
    # MLX on Metal.
    "Unable to allocate", "Insufficient Memory",
)  # fmt: skip
_allocator_tuned = False


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        EngineError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        raise EngineError(f"this machine has no {name} device", where="model.device", hint="Use model.device=auto.")
    return torch.device(name)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is native there: else it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where it is native, else float32; float16 only where it is asked for."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def set_threads(num_threads: int | None) -> int:
    """CPU threads for every later operation; part of what makes results repeat bit for bit. Returns the number."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next step, where it would fault the same pages in again: 1.4× on a CPU.

    Linux with glibc only; elsewhere it does nothing. Once a process.
    """
    global _allocator_tuned
    if _allocator_tuned or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return _allocator_tuned
    try:
        libc = ctypes.CDLL(None)
        done = libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        done = done and libc.mallopt(_M_TOP_PAD, 256 * 2**20)
        # One heap: what a thread freed in a heap of its own, no other could use.
        done = done and libc.mallopt(_M_ARENA_MAX, 1)
    except (OSError, AttributeError):
        return False
    _allocator_tuned = bool(done)
    return _allocator_tuned


def join_pages() -> None:
    """Have Linux put the memory that this process has filled so far into huge pages. Weights are read
    once a token, and with small pages a quarter of that time went into finding them.

    Worth calling after a model was loaded, before memory is set aside that may never be filled.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file]
    for span, mode, _, _, inode, *name in lines:
        first, last = (int(part, 16) for part in span.split("-"))
        if mode.startswith("rw") and inode == "0" and name in ([], ["[heap]"]) and last - first >= _HUGE_PAGE_BYTES:
            # It fails for stretches that are partly empty, having joined the rest.
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_COLLAPSE)


def release_memory(device: torch.device) -> None:
    """Give back what nothing uses, and ask for no more than is needed from now on: memory has just run out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif _allocator_tuned:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TOP_PAD, 2**20)
        libc.malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the device with CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not getrusage: its peak survives exec, so a process started by a large one would report its parent's.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Resident memory now."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)
