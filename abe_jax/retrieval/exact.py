"""Inner products on the host: in float64, and exact where that leaves a tie open.

The similarity of two rows IS their exact inner product, rounded once to float64. A
plain float64 product errs by up to its dimension in last digits; two similarities
that lie closer than that are computed exactly.

Exactly, and at the speed of matrix products: each row is cut into slices of a few bits,
whole numbers so small that a matrix product of two slices has no rounding in float64
(the first step of Ozaki's scheme: Ozaki et al., Numerical Algorithms 59, 2012).
"""

import math
from collections.abc import Callable

import numpy as np


def float64_error(norms: np.ndarray, longest: float, dim: int) -> np.ndarray:
    """Bounds the error of float64 products of rows with rows up to `longest`."""
    return norms * (longest * (dim + 2) * 2.0**-52)


def exact_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Similarities of all pairs of rows.

    Args:
      a: [..., n, D] float32.
      b: [..., m, D] float32.

    Returns:
      [..., n, m] float64, each the exact inner product, rounded once.
    """
    left, right = _distinct(a), _distinct(b)
    if left is not None or right is not None:
        # Equal rows, of which a collapsed network gives many, are multiplied once.
        chosen, rows = left or (a, slice(None))
        others, columns = right or (b, slice(None))
        return exact_products(chosen, others)[rows][:, columns]
    return _products(a, b, lambda x, y: np.matmul(x, np.swapaxes(y, -1, -2)), True)


def exact_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Similarities of a[i] and b[i], both [n, D] float32: [n] float64."""
    return _products(a, b, lambda x, y: np.einsum("nd,nd->n", x, y), False)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The different rows and which of them each row is; None if too few are equal."""
    if rows.ndim != 2 or len(rows) < 2:
        return None
    keys = hash_rows(rows)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) > len(rows) // 2 or not np.array_equal(rows, rows[first[which]]):
        return None
    return rows[first], which


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Numbers [n] uint64 of rows [n, D] float32: equal ones for equal rows."""
    words = (rows + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    factors = np.random.default_rng(0).integers(
        1, 2**63, rows.shape[1], dtype=np.uint64
    )
    return (words * (factors | np.uint64(1))).sum(axis=1, dtype=np.uint64)


def _products(
    a: np.ndarray, b: np.ndarray, multiply: Callable[..., np.ndarray], outer: bool
) -> np.ndarray:
    # Sums of up to 16 products of slices stay below 2^53.
    bits = (51 - math.ceil(math.log2(a.shape[-1]))) // 2
    (left, scale), (right, right_scale) = _slices(a, bits), _slices(b, bits)
    if outer:
        scale = scale[..., :, None] * right_scale[..., None, :]
    else:
        scale = scale * right_scale
    if not (left and right):
        return np.zeros(scale.shape)
    digits = [np.zeros(scale.shape) for _ in range(len(left) + len(right) - 1)]
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            digits[i + j] += multiply(x, y)
    flat = [digit.reshape(-1) for digit in digits]
    # So many at a time stay in the cache.
    parts = [slice(at, at + 2**17) for at in range(0, scale.size, 2**17)]
    total = np.concatenate(
        [_rounded_sum([x[part] for x in flat], bits) for part in parts]
    )
    return total.reshape(scale.shape) * scale


def _slices(rows: np.ndarray, bits: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts rows into whole numbers of so many bits, the leading ones first.

    Returns:
      float64 arrays s_0, s_1, ... of the shape of `rows`, as many as it takes, and the
      rows' scales c, powers of two: rows = c (s_0 + s_1 2^-bits + s_2 2^-(2 bits) ...).
    """
    _, exponent = np.frexp(np.abs(rows).max(axis=-1))
    scale = np.ldexp(1.0, exponent - (bits - 1))
    rest = rows / scale[..., None]
    slices = []
    while rest.any():
        slices.append(np.rint(rest))
        rest = (rest - slices[-1]) * 2.0**bits
    return slices, scale


def _rounded_sum(digits: list[np.ndarray], bits: int) -> np.ndarray:
    """The sum of digits[i] 2^(-i bits), whole numbers below 2^53, rounded once."""
    for i in range(len(digits) - 1, 0, -1):  # carry: all but the first become small
        carry = np.rint(digits[i] * 2.0**-bits)
        digits[i] = digits[i] - carry * 2.0**bits
        digits[i - 1] = digits[i - 1] + carry
    terms = [digit * 2.0 ** (-i * bits) for i, digit in enumerate(digits)]
    if len(terms) == 1:
        return terms[0]
    high, low = _two_sum(terms[0], terms[1])
    rest, slack = low, np.abs(low)
    for term in reversed(terms[2:]):
        rest, slack = rest + term, slack + np.abs(term)
    total, error = _two_sum(high, rest)
    # Rounding `rest` can matter only where the sum ends beside a midpoint of two
    # float64, which is half their spacing away, or a quarter below a power of two.
    exponents = total.view(np.uint64) & np.uint64(0x7FF0000000000000)
    spacing, slack = exponents.view(np.float64) * 2.0**-52, slack * 2.0**-50
    error = np.abs(error)
    open_ = np.minimum(np.abs(error - spacing / 2), np.abs(error - spacing / 4)) < slack
    open_ |= slack > spacing / 8
    for position in zip(*np.nonzero(open_), strict=True):
        total[position] = math.fsum(float(term[position]) for term in terms)
    return total


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, rounded, and what rounding left out (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)
