"""Linear algebra that several methods share, in float64 inside whatever comes in.

Everything here is exact up to rounding; where a matrix is too close to singular the damping that
was needed is bounded, and beyond the bound the call fails with one line instead of returning
noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drawplate.core.errors import NotFinite, UserError

SLAB = 4096
"""Columns of a Gram matrix that are converted at a time."""


def require_finite(what: str, *tensors: Tensor) -> None:
    """Raises `NotFinite` naming `what` where any of `tensors` holds NaN or infinity."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotFinite(f"{what} holds NaN or infinity")


def damped(gram: Tensor, damping: float) -> Tensor:
    """Gram [I, I] -> gram + damping * d * 1, float64, d the mean of its diagonal (1 if zero).

    Raises:
        NotFinite: the matrix holds NaN or infinity.
    """
    require_finite("Gram matrix", gram)
    result = gram.to(torch.float64, copy=True)
    mean = float(result.diagonal().mean())
    result.diagonal().add_(damping * (mean or 1.0))
    return result


def cholesky(gram: Tensor, damping: float = 0.0, limit: float = 1.0) -> tuple[Tensor, float]:
    """Gram [I, I] -> (lower L, e) with L L^T = gram + e * d * 1, d the mean of the diagonal.

    e is `damping` if that is enough, otherwise the first of 10, 100, ... times max(damping, 1e-12)
    with which the matrix is positive definite, and never more than `limit`.

    Raises:
        NotFinite: the matrix holds NaN or infinity.
        UserError: even `limit` does not make it positive definite.
    """
    require_finite("Gram matrix", gram)
    tried = damping
    while tried <= limit:
        lower, info = torch.linalg.cholesky_ex(damped(gram, tried))
        if int(info) == 0:
            return lower, tried
        tried = max(tried, 1e-12) * 10
    raise UserError(
        f"Gram matrix is not positive semi-definite: damping by {limit:g} of its mean diagonal "
        "does not repair it; it must be a mean of x x^T"
    )


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Gram [I, I] -> upper V, float64, with V^T V = (gram + damping * d * 1)^-1.

    Row j of V is, up to its length, what removing input j does to the inputs after it: V is the
    Cholesky factor that optimal brain surgeon needs, from one factorisation of the reversed matrix.
    """
    lower, _ = cholesky(gram.flip(0, 1), damping)
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
    return inverse.flip(0, 1)


def left_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [O, I] -> (left singular vectors [O, k], squared singular values [k]), k = min(O, I).

    Both float64, largest first. The vectors are orthonormal and span the columns of `matrix` even
    where it is rank-deficient. Works on the smaller of the two Gram matrices: a good deal faster
    than a singular value decomposition, and exact to 1e-16 of the largest squared value.

    Raises:
        NotFinite: the matrix holds NaN or infinity.
    """
    require_finite("matrix", matrix)
    exact = matrix.double()
    tall = exact.shape[0] > exact.shape[1]
    frame, small = torch.linalg.qr(exact) if tall else (None, exact)
    energy, vectors = torch.linalg.eigh(small @ small.T)
    vectors, energy = vectors.flip(1), energy.flip(0).clamp(min=0)
    return (vectors if frame is None else frame @ vectors), energy


def energies(matrix: Tensor) -> Tensor:
    """Matrix [O, I] -> its min(O, I) squared singular values, float64, largest first.

    Raises:
        NotFinite: the matrix holds NaN or infinity.
    """
    require_finite("matrix", matrix)
    exact = matrix.double()
    small = exact.T @ exact if exact.shape[0] > exact.shape[1] else exact @ exact.T
    ascending: Tensor = torch.linalg.eigvalsh(small)
    return ascending.flip(0).clamp(min=0)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """E |D x|^2 = trace(D G D^T), D [O, I], G = E x x^T [I, I] -> float64 scalar, at least 0.

    Columns of G are converted to D's dtype a slab at a time.
    """
    slabs = zip(torch.split(gram, SLAB, 1), torch.split(difference, SLAB, 1), strict=True)
    images = (((difference @ g.to(d.dtype)) * d).sum(dtype=torch.float64) for g, d in slabs)
    return torch.stack(list(images)).sum().clamp(min=0)
