"""Gaussian noise without torch, with the bits that torch draws on the CPU.

A seed names a picture only where the start noise is the same to the last bit, so this repeats torch's
recipe operation by operation. Words of the Mersenne Twister (Matsumoto and Nishimura, "Mersenne Twister",
ACM TOMACS 8(1), 1998) become uniforms, and pairs of uniforms become pairs of normals (Box and Muller,
"A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29(2), 1958):

    radius = sqrt(-2 log(1 - u)), angle = 2 pi v:    radius cos(angle), radius sin(angle)

Logarithm, sine and cosine are the single precision polynomials of the Cephes library (S. L. Moshier,
logf.c and sinf.c) in the order of operations of torch's AVX2 kernel, which its AVX-512 machines run too.
numpy rounds +, -, * and sqrt correctly everywhere, so that a Jetson's Arm cores draw the same picture.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError

Float32s = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]

_GROUP = 16
"""torch transforms this many uniforms at once, 8 for the radii and then 8 for the angles (an AVX2 register
holds 8 float32); smaller draws take a path of their own."""

_CHUNK = 2048 * _GROUP
"""Uniforms per pass over a big draw: keeps the temporary arrays (128 KiB each in float64) in the L2 cache."""

# Cephes logf.c: log(1 + x) = x - x^2 / 2 + x^3 P(x) for sqrt(1/2) <= 1 + x < sqrt(2), highest power first.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS = np.float32(math.sqrt(0.5)).view(np.int32)
# log(2) in two parts (Cody and Waite, "Software Manual for the Elementary Functions", 1980): the first has
# few enough bits, 355 / 512, that its product with any exponent is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)

# Cephes sinf.c, for |x| <= pi / 4: sin(x) = x + x^3 P(x^2) and cos(x) = 1 - x^2 / 2 + x^4 Q(x^2).
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_TWO_PI = np.float32(2 * math.pi)
_FOUR_OVER_PI = np.float32(4 / math.pi)
# pi / 2 in three parts, for the same reason: twice the parts of pi / 4 in sinf.c (DP1, DP2, DP3).
_QUARTER_HIGH = np.float32(2 * 0.78515625)
_QUARTER_MIDDLE = np.float32(2 * 2.4187564849853515625e-4)
_QUARTER_LOW = np.float32(2 * 3.77489497744594108e-8)

_ONE = np.float32(1)
_HALF = np.float32(0.5)


def _fma(a: Float32s, b: Float32s | np.float32, c: Float32s | np.float32) -> Float32s:
    """`a * b + c`, rounded once.

    The product of two float32 is exact in float64. The sum is rounded to 53 bits and then to 24, which is
    one rounding unless the first lands halfway between two float32: that never happens on any of the 2^24
    uniforms (the tests try all of them), so the error term that general code needs is left out.
    """
    product = np.multiply(a, b, dtype=np.float64)
    return np.add(product, c, out=product).astype(np.float32)


def _polynomial(coefficients: tuple[float, ...], x: Float32s) -> Float32s:
    """Horner's rule with fused steps, highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, np.float32(coefficient))
    return value


def _log(u: Float32s) -> Float32s:
    """Natural logarithm of u: (n,) float32 in (0, 1]; bit for bit torch's `log256_ps`."""
    # u = 2^exponent (1 + x). Counting the exponent from sqrt(1/2) and not from 1 puts x around 0.
    bits: Int32s = u.view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    x = (bits - (exponent << 23)).view(np.float32) - _ONE
    exponents = exponent.astype(np.float32)
    square = x * x
    tail = _fma(_polynomial(_LOG, x) * x, square, exponents * _LN2_LOW) - _HALF * square
    return (x + tail) + exponents * _LN2_HIGH


def _sincos(angle: Float32s) -> tuple[Float32s, Float32s]:
    """Sine and cosine of angle: (n,) float32 in [0, 2 pi]; bit for bit torch's `sincos256_ps`."""
    quarter = ((angle * _FOUR_OVER_PI).astype(np.int32) + 1) >> 1  # the nearest quarter turn, 0 to 4
    quarters = quarter.astype(np.float32)
    x = (angle - quarters * _QUARTER_HIGH) - quarters * _QUARTER_MIDDLE
    x = _fma(quarters, -_QUARTER_LOW, x)
    square = x * x
    sine = _fma(x, _polynomial(_SIN, square) * square, x)
    cosine = _fma(square, _polynomial(_COS, square) * square, -_HALF * square) + _ONE
    odd = (quarter & 1) == 1
    along, across = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    return np.where(quarter & 2, -along, along), np.where((quarter + 1) & 2, -across, across)


def box_muller(words: npt.NDArray[np.uint32]) -> Float32s:
    """Turn uniforms into normals as torch's AVX2 kernel does.

    The kernel's source fuses no multiplication with an addition but the last; GCC does wherever it can.
    Fusing changes bits, and is repeated here, in the three polynomials, in the one sum that follows each
    of them, and in the smallest part of the angle's reduction. The other fused products are exact.

    Args:
        words: (16 n,) uint32 below 2^24, in units of 2^-24; in every 16, 8 for radii and then 8 for angles.

    Returns:
        (16 n,) float32: in every 16, the 8 cosines and then the 8 sines. Exact (see `NoiseGenerator`).
    """
    uniforms = words.reshape(-1, 2, _GROUP // 2).astype(np.float32) * np.float32(2.0**-24)
    radius = np.sqrt(np.float32(-2) * _log(_ONE - uniforms[:, 0]))
    sine, cosine = _sincos(_TWO_PI * uniforms[:, 1])
    normals = np.stack((radius * cosine, radius * sine), axis=1)
    normals += np.float32(0)  # torch adds the mean, and so has no -0 either
    return normals.reshape(-1)


class NoiseGenerator:
    """Draws what ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` draws.

    Call after call the state goes on as torch's does. Draws of 16 values and more are bit for bit those of
    torch's Linux x86-64 wheels (compared: 2.13) on CPUs with AVX2 or AVX-512: the tests compare all 2^24
    radii and all 2^24 angles with torch, and a normal is one correctly rounded product of the two. Smaller
    draws are made in float64 by the platform's libm, as in torch: where another libm differs in the last
    of 53 bits, a float32 differs once in some 5e8 values.

    torch itself differs between machines: without AVX2, and on Arm, it takes log, sin and cos from libm
    and draws other values. On x86-64 these are within 3.4e-6 (measured over all radii and angles): sine
    and cosine by 5e-7, mostly the rounding of the angle to float32, and the radius, at most 5.8, by 1 ulp.
    In ulps there is no bound where a sine or cosine goes through 0.

    Args:
        seed: From -2^63 to 2^64 - 1, as torch takes it. Only its low 32 bits make a difference, with
            negative seeds in two's complement: also as in torch.

    Raises:
        InputError: The seed is not an integer, or does not fit in 64 bits.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise InputError(f"the seed is {seed!r}, of type {type(seed).__name__}: give an integer")
        if not -(2**63) <= int(seed) < 2**64:
            raise InputError(f"the seed {seed} does not fit in 64 bits: give one from -2**63 to 2**64 - 1")
        # RandomState is numpy's frozen interface: its seeding is the Twister's own, and its integers below
        # a power of two are the low bits of one word each.
        self._twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> Float32s:
        """Draw the next standard normals.

        Args:
            shape: Any shape; () draws one value and a shape with a 0 draws none.

        Returns:
            Array of that shape, float32. Exact: the bits that torch gives.

        Raises:
            InputError: A size is negative.
        """
        if any(size < 0 for size in shape):
            raise InputError(f"the shape {tuple(shape)} has a negative size: give sizes of 0 or more")
        count = math.prod(shape)
        if count < _GROUP:
            # Adding 0 as torch adds the mean: there is no -0.
            return np.array([self._next() + 0.0 for _ in range(count)], np.float32).reshape(shape)
        values = np.empty(count, np.float32)
        whole = count - count % _GROUP
        for start in range(0, whole, _CHUNK):
            stop = min(start + _CHUNK, whole)
            values[start:stop] = box_muller(self._words(stop - start))
        if whole < count:
            # torch draws the uniforms of the incomplete group too, but then fills the last 16 values anew.
            self._words(count - whole)
            values[-_GROUP:] = box_muller(self._words(_GROUP))
        return values.reshape(shape)

    def _words(self, count: int) -> npt.NDArray[np.uint32]:
        """The next `count` words of the Twister, their low 24 bits: as many as a float32 holds."""
        return self._twister.randint(1 << 24, size=count, dtype=np.uint32)

    def _uniform(self) -> float:
        """The next uniform of 53 bits in [0, 1), from two words."""
        high, low = self._twister.randint(1 << 32, size=2, dtype=np.uint32).tolist()
        return float((high << 32 | low) & (1 << 53) - 1) * 2.0**-53

    def _next(self) -> float:
        """One normal in float64. They come in pairs: the second is kept for the next small draw."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle = 2 * math.pi * self._uniform()
        radius = math.sqrt(-2 * math.log1p(-self._uniform()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)
