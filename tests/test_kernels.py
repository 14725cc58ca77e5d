"""What a process keeps: kernels of oneDNN, as many as asked for, and memory of former tensors."""

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

PRODUCTS = """
import torch
from stages.quiet import keep_kernels
keep_kernels({most})
weight = torch.ones(32, 32)
for rows in [*range(2, 102), 2]:
    torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 32), weight, None, "none", [], "")
"""


def made(most: int, **environment: str) -> int:
    """Kernels that a process makes for 100 shapes, and for the first of them once more."""
    free = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS.format(most=most)],
        env=free | {"ONEDNN_VERBOSE": "2"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.count("create:cache_miss")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_the_latest_shapes_are_kept_and_no_more():
    assert made(200) == 100
    assert made(50) == 101
    assert made(50, ONEDNN_PRIMITIVE_CACHE_CAPACITY="200") == 100


FAULTS = """
import ctypes
import resource
from stages.quiet import keep_memory

libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # pages of one size, also where huge ones are the default
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
size = ctypes.c_size_t({size} << 20)
{call}

def step():
    # Not tensors, whose records would by chance lie above them, which no memory is given back from.
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(8)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fetched(mebibytes: int, call: str) -> float:
    """Pages fetched from the system for each page of 8 blocks, taken and left 8 times."""
    script = FAULTS.format(size=mebibytes, call=call)
    free = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=free, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * resource.getpagesize() / (64 * mebibytes * 2**20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_blocks_leave_is_used_again():
    assert fetched(12, "keep_memory()") < 0.05
    assert fetched(12, "") > 0.5  # what it is without
    assert fetched(40, "keep_memory()") > 0.5  # large ones go back to the system
