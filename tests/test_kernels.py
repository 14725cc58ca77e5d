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
import torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # pages of one size, also where huge ones are the default
from stages.quiet import keep_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.ones({size} << 18) for _ in range(8)]
for _ in range(4):
    step()
before = faults()
for _ in range(8):
    step()
print(faults() - before)
"""


def fetched(mebibytes: int, call: str) -> float:
    """Pages fetched from the system for each page of 8 tensors, made and left 8 times."""
    script = FAULTS.format(size=mebibytes, call=call)
    free = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=free, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * resource.getpagesize() / (64 * mebibytes * 2**20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_tensors_leave_is_used_again():
    assert fetched(12, "keep_memory()") < 0.05
    assert fetched(12, "") > 0.5  # what it is without
    assert fetched(40, "keep_memory()") > 0.5  # large ones go back to the system
