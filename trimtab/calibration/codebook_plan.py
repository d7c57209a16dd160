"""Which weights are packed, to how many bits, and which of them share a codebook.

VQ4DiT gives every weight a codebook of its own (https://arxiv.org/abs/2408.17131), which costs DiT-XL/2 a hundredth of
a bit a weight. In a U-Net of 3.4 million weights it costs 1.6 bits, and 0.4 where small weights of one spread share, at
nearly the same error: each may then choose of all 256 codewords.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.errors import InputError
from trimtab.passes.codebooks import FORMATS
from trimtab.passes.vq import Site

KEEP = "keep"

OWN = 64
"""Sub-vectors for each codeword from which on a weight has a codebook of its own: it costs an eighth of its codes, in
FP16, or less."""

ALIKE = 1.25
"""The spreads of weights that share a codebook lie within this factor."""

PER_CODEWORD = 8
"""Sub-vectors for each codeword, at least: where they are fewer there are fewer codewords. Then a codebook of 32-bit
numbers is at most twice as large as its codes, and a small weight that shares with none still shrinks to 6 bits."""

FEWEST = 16
"""Codewords, at least. A weight with fewer than 16 * 8 sub-vectors stays as it is: packing saves it under 2 KB."""


@dataclass(frozen=True)
class Settings:
    """What decides the codebooks.

    Attributes:
        bits: For a weight: 2, 3 or 4.
        rules: Pattern of module paths (``*`` and ``?``) -> its own bits, or ``"keep"``; the first that fits decides.
        scale: Whether every output channel has a factor of its own.
        seed: Of the samples and the first codewords.
    """

    bits: int = 2
    rules: tuple[tuple[str, int | str], ...] = ()
    scale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, *(bits for _, bits in self.rules if bits != KEEP)):
            if bits not in FORMATS:
                raise InputError(f"{bits!r} bits were asked for, and weights are packed to 2, 3 or 4 bits")


@dataclass(frozen=True)
class Group:
    """Weights with one codebook.

    Attributes:
        names: Of the weights; one, or several small ones.
        bits: For each of their numbers.
        codewords: Of the codebook, a power of two.
    """

    names: tuple[str, ...]
    bits: int
    codewords: int


def choose(found: Mapping[str, Site], settings: Settings) -> dict[str, int | str]:
    """Decides for every weight: its bits, or why it stays as it is.

    What no rule names is packed if its layer lies in a block that the model repeats (its path has a number in it),
    as in VQ4DiT, and is no embedder in there. So the first and the last layers stay, and embeddings do.

    Args:
        found: Name -> weight of the denoiser; not read.
        settings: The user's.

    Raises:
        InputError: A rule that fits no layer, or none that the rules before it leave.
    """
    rules = {name: _rule(site, settings) for name, site in found.items()}
    if idle := {pattern for pattern, _ in settings.rules} - {rule[0] for rule in rules.values() if rule}:
        raise InputError(_why_idle(min(idle), sorted({site.module for site in found.values()})))
    return {name: _choice(site, rules[name], settings) for name, site in found.items()}


def _why_idle(pattern: str, layers: list[str]) -> str:
    """What is wrong with a rule that decides nothing."""
    if any(fnmatch.fnmatchcase(layer, pattern) for layer in layers):
        return f"rules before {pattern!r} fit all of its layers: give it before them"
    near = " or ".join(difflib.get_close_matches(pattern, layers, 2, 0.0)) or "a graph without any has none"
    return f"the rule {pattern!r} fits no layer: give the whole path of one, with * for parts of it ({near})"


def plan(found: Mapping[str, Site], choices: Mapping[str, int | str], settings: Settings) -> list[Group]:
    """Which weights share a codebook, each in one group.

    Only small ones do (`OWN`), and only their numbers are read. They are taken by their spread, the least first; a
    group ends when it has sub-vectors enough for a codebook, or when the next weight's spread is another.

    Args:
        found: Name -> weight.
        choices: From `choose`.
        settings: With ``scale`` all spreads are alike.
    """
    groups = []
    small: dict[int, list[tuple[float, str, int]]] = {}
    for name, bits in choices.items():
        if isinstance(bits, str):
            continue
        vectors = _vectors(found[name], bits)
        if vectors < OWN * FORMATS[bits].codewords:
            spread = 1.0 if settings.scale else _spread(found[name])
            small.setdefault(bits, []).append((spread, name, vectors))
        else:
            groups.append(Group((name,), bits, FORMATS[bits].codewords))
    for bits, weights in small.items():
        groups += _shared(sorted(weights, key=lambda weight: weight[0]), bits)
    return groups


def _shared(weights: Iterable[tuple[float, str, int]], bits: int) -> Iterator[Group]:
    """Groups of small weights.

    Args:
        weights: (spread, name, sub-vectors), the least spread first.
        bits: Of all.
    """
    names: list[str] = []
    count, least = 0, math.inf
    for spread, name, vectors in weights:
        if names and (count >= OWN * FORMATS[bits].codewords or spread > ALIKE * least):
            yield Group(tuple(names), bits, _codewords(count, bits))
            names, count, least = [], 0, math.inf
        names.append(name)
        count, least = count + vectors, min(least, spread)
    if names:
        yield Group(tuple(names), bits, _codewords(count, bits))


def _rule(site: Site, settings: Settings) -> tuple[str, int | str] | None:
    """The first rule that fits a weight's layer."""
    return next((rule for rule in settings.rules if fnmatch.fnmatchcase(site.module, rule[0])), None)


def _choice(site: Site, rule: tuple[str, int | str] | None, settings: Settings) -> int | str:
    """The bits of one weight, or why it stays as it is."""
    bits = settings.bits
    if rule is None:
        if (reason := _outside(site.module)) is not None:
            return reason
    elif rule[1] == KEEP:
        return "a rule keeps it"
    else:
        bits = int(rule[1])
    if not _codewords(_vectors(site, bits), bits):
        return f"it is too small: {site.shape[0]} x {math.prod(site.shape[1:])}"
    return bits


def _outside(module: str) -> str | None:
    """Why a layer is not one of a repeated block's own; None if it is."""
    parts = module.split(".")
    if not any(part.isdecimal() for part in parts):
        return "it lies outside of the repeated blocks"
    if any(
        part == "emb" or part.endswith(("embed", "embedder", "embedding", "embeddings")) for part in parts
    ):
        return "it is an embedder"
    if any(part.endswith("final_layer") for part in parts):  # Z-Image's has a number for its patches
        return "it is the last layer"
    return None


def _vectors(site: Site, bits: int) -> int:
    """How many sub-vectors a weight has."""
    return site.shape[0] * -(-math.prod(site.shape[1:]) // FORMATS[bits].length)


def _codewords(vectors: int, bits: int) -> int:
    """The codewords for so many sub-vectors, a power of two; 0 where they are too few."""
    fitting = min(FORMATS[bits].codewords, vectors // PER_CODEWORD)
    return 0 if fitting < FEWEST else 1 << (fitting.bit_length() - 1)


def _spread(site: Site) -> float:
    """The root mean square of a weight's numbers."""
    return float(np.sqrt(np.square(site.rows(), dtype=np.float64).mean()))
