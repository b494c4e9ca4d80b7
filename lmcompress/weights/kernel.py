"""First floor: the inner loops of weight statistics, in C where a compiler is at hand, else in numpy.

Fused loops read each weight from cache a few times instead of some twenty, which makes a pass four times faster
than array operations can. Compiling takes a tenth of a second, so nothing is kept: each process compiles its own.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

BINS = 1 << 15  # |x| by the upper 16 bits of its float32: sign cleared, 8 of exponent, 7 of mantissa
_SHIFT = 16
_PIECE = 32_000  # elements that numpy's temporaries keep in cache

# Without leave to reorder sums, and to ignore NaN in minima, no loop is vectorised. Never -ffast-math: loading such
# a library makes the whole process flush subnormal numbers to zero.
_FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-fassociative-math", "-ffinite-math-only"]
_FLAGS += ["-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]

_SOURCE = r"""
#include <stdint.h>
#include <string.h>
enum { BLOCK = 4096 };  /* elements that stay in the first-level cache between the loops */

void power_sums(const float *x, int64_t n, double shift, double *sums) {
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t stop = n - i < BLOCK ? n : i + BLOCK;
        double s1 = 0, s2 = 0, s3 = 0, s4 = 0;
        for (int64_t j = i; j < stop; j++) {
            double v = x[j] - shift, w = v * v;
            s1 += v; s2 += w; s3 += w * v; s4 += w * w;
        }
        sums[0] += s1; sums[1] += s2; sums[2] += s3; sums[3] += s4;
    }
}

void tally(const float *x, int64_t n, const float *limits, float *range, int64_t *counts, int64_t *histogram) {
    float low = range[0], high = range[1];
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t stop = n - i < BLOCK ? n : i + BLOCK;
        int32_t first = 0, second = 0, zero = 0;
        for (int64_t j = i; j < stop; j++) {
            float v = x[j], magnitude = v < 0 ? -v : v;
            low = v < low ? v : low;
            high = v > high ? v : high;
            first += magnitude > limits[0]; second += magnitude > limits[1]; zero += magnitude == 0;
        }
        counts[0] += first; counts[1] += second; counts[2] += zero;
        for (int64_t j = i; j < stop; j++) {
            uint32_t bits;
            memcpy(&bits, x + j, sizeof bits);
            histogram[(bits & 0x7fffffff) >> 16]++;
        }
    }
    range[0] = low; range[1] = high;
}
"""


@cache
def native() -> ctypes.CDLL | None:
    """The loops compiled for this machine, or None without a working C compiler (`$CC`, else `cc`)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        source.write_text(_SOURCE)
        command = [compiler, *_FLAGS, source, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            return None


def power_sums(x: np.ndarray, shift: float) -> np.ndarray:
    """Σ(x−shift)^k for k = 1 to 4, in float64; `x` is a contiguous flat array of float32 or float64."""
    sums = np.zeros(4)
    if x.dtype == np.float32 and (library := native()):
        library.power_sums(_at(x), ctypes.c_int64(x.size), ctypes.c_double(shift), _at(sums))
        return sums
    for start in range(0, x.size, _PIECE):
        v = np.subtract(x[start : start + _PIECE], shift, dtype=np.float64)
        w = v * v
        sums += (v.sum(), w.sum(), (v * w).sum(), (w * w).sum())
    return sums


def tally(x: np.ndarray, thresholds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Range (min, max) of `x`, counts (|x| > first, > second, == 0), histogram (BINS,) of |x|.

    A float's bits grow with its magnitude, so its leading bits number the bins for nothing. With NaN or infinity
    in `x` (they fall into the bins from `first_infinite` on) the range means nothing.
    """
    limits = np.array([_at_most(threshold, x.dtype) for threshold in thresholds])
    range_, counts = np.array([np.inf, -np.inf], dtype=x.dtype), np.zeros(3, dtype=np.int64)
    histogram = np.zeros(BINS, dtype=np.int64)
    if x.dtype == np.float32 and (library := native()):
        library.tally(_at(x), ctypes.c_int64(x.size), *map(_at, (limits, range_, counts, histogram)))
        return range_.astype(np.float64), counts, histogram
    for start in range(0, x.size, _PIECE):
        piece = x[start : start + _PIECE]
        magnitude = np.abs(piece)
        range_[:] = min(range_[0], piece.min()), max(range_[1], piece.max())
        counts += [np.count_nonzero(magnitude > limit) for limit in limits] + [
            piece.size - np.count_nonzero(piece)
        ]
        with np.errstate(over="ignore"):
            keys = magnitude.astype(np.float32).view(np.int32) >> _SHIFT
        histogram += np.bincount(keys, minlength=BINS)
    return range_.astype(np.float64), counts, histogram


def lower_edges(keys: np.ndarray) -> np.ndarray:
    """Smallest |x| of the histogram bins `keys`, infinity from `first_infinite` on."""
    bits = np.minimum(keys, first_infinite()).astype(np.int32) << _SHIFT
    return bits.view(np.float32).astype(np.float64)


def first_infinite() -> int:
    """The first bin that holds infinity, NaN, or a float64 beyond float32."""
    return 0x7F800000 >> _SHIFT


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _at_most(threshold: float, dtype: np.dtype) -> np.floating:
    """Largest number of `dtype` not above `threshold`, so that comparing with it is exact (0.1 is no float32)."""
    nearest = dtype.type(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, dtype.type(0))
