"""Kernels that oneDNN keeps: as many shapes as asked for, and a user's own number stays."""

import os
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
