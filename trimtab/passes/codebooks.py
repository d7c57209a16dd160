"""Weights as codes into codebooks: plain data that calibration makes and `trimtab.passes.vq` puts into graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from trimtab.passes import vq_op

CALIBRATED = "calibrated"
"""How a weight was made that was trained after k-means; the folder of such weights in a store."""


@dataclass(frozen=True)
class Format:
    """How a number of bits for a weight is spent (VQ4DiT, https://arxiv.org/abs/2408.17131).

    Attributes:
        codewords: The most in a codebook.
        length: Weights of one codeword.
        index_bits: Bits of a stored index: 8 / 4 = 2, 6 / 2 = 3 and 8 / 2 = 4 bits a weight.
    """

    codewords: int
    length: int
    index_bits: int


FORMATS: Mapping[int, Format] = {2: Format(256, 4, 8), 3: Format(64, 2, 6), 4: Format(256, 2, 8)}


@dataclass(frozen=True)
class PackedWeight:
    """One weight as codes.

    Attributes:
        bits: A key of `FORMATS`.
        codes: As `trimtab.passes.vq_op` stores them: (O, bytes) uint8.
        codebook: (k, d) float32; the same numbers in weights that share one.
        scale: (O,) float32, or None.
        columns: Weights in a row, (I / group) * kernel.
        error: |W - decoded|^2 / |W|^2.
        method: How it was made: "k-means" or `CALIBRATED`.
    """

    bits: int
    codes: vq_op.Codes
    codebook: vq_op.Floats
    scale: vq_op.Floats | None
    columns: int
    error: float
    method: str = "k-means"

    @property
    def index_bits(self) -> int:
        """Bits of a stored index."""
        return FORMATS[self.bits].index_bits

    def rows(self) -> vq_op.Floats:
        """The decoded weight as rows (O, columns) float32."""
        return vq_op.decode(self.codes, self.codebook, self.scale, self.columns, self.index_bits)


_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Codebooks:
    """All packed weights of a model.

    Attributes:
        fingerprint: Of the weights that they were made from, by `trimtab.calibration.codebook_store.fingerprint`.
        layers: Initializer's name -> its codes. ``SEGMENT/NAME`` is that of a segment whose weight is another one than
            the first of that name: see `of`.
        kept: Initializer's name, or ``SEGMENT/NAME``, -> why it stays as it is.
        parameters: Initializer's name, or ``SEGMENT/NAME``, -> what it becomes: biases trained with the codes.
    """

    fingerprint: str
    layers: Mapping[str, PackedWeight]
    kept: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and codebooks, of which equal ones stand once."""
        books = {layer.codebook.tobytes(): layer.codebook.nbytes for layer in self.layers.values()}
        scales = sum(layer.scale.nbytes for layer in self.layers.values() if layer.scale is not None)
        return sum(layer.codes.nbytes for layer in self.layers.values()) + scales + sum(books.values())

    def of(self, segment: str) -> Codebooks:
        """Those of one segment, by the names of its own initializers."""

        start = f"{segment}/"

        def own(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
            named = {name.removeprefix(start): e for name, e in entries.items() if name.startswith(start)}
            return {**entries, **named}

        # What another segment packs by this name is not this one's, which is too small for it.
        kept = {name.removeprefix(start) for name in self.kept if name.startswith(start)}
        layers = {name: layer for name, layer in own(self.layers).items() if name not in kept}
        return replace(self, layers=layers, kept=own(self.kept), parameters=own(self.parameters))
