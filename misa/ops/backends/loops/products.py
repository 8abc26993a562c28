"""Sums along a tree with products of edge weights, compiled by numba: one loop up, one down.

`misa.ops.treefilter.tree_sums` is the same in torch operations and defines the sums.
"""

import numpy as np
from numpy.typing import NDArray

from misa.ops.backends.loops.compiled import kernel


def _sums(values: NDArray, parent: NDArray, weight: NDArray, up: NDArray, full: NDArray) -> None:
    """Write `up` and `full` (p) of `values` (p); children have larger numbers than their parents. float64 inside."""
    p = len(values)
    below = np.empty(p, np.float64)
    whole = np.empty(p, np.float64)
    for v in range(p):
        below[v] = values[v]
    for i in range(p - 1):
        v = p - 1 - i
        below[np.uintp(parent[v])] += weight[v] * below[v]
    whole[0] = below[0]
    for v in range(1, p):
        k = np.float64(weight[v])
        whole[v] = below[v] * (1.0 - k * k) + k * whole[np.uintp(parent[v])]
    for v in range(p):
        up[v] = below[v]
        full[v] = whole[v]


single = kernel("void(f4[::1], u4[::1], f4[::1], f4[::1], f4[::1])")(_sums)
double = kernel("void(f8[::1], u4[::1], f8[::1], f8[::1], f8[::1])")(_sums)
