"""Bytes of TensorRT for RTX engines, dense and packed; goals for DiT-XL/2 at 2 bits: 1/14 of FP32's, 1/7 of FP16's.

    python benchmarks/vq_size.py GRAPH [--device rtx-4090] [--bits 2 3] [--rule PATTERN=BITS ...]

GRAPH is the denoiser of a compiled bundle. The engines are really built, which needs no GPU. The codes are random:
sizes do not depend on them, and k-means of so large a model takes minutes. FP16 is converted without ranges: nothing is
kept in FP32.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimtab.calibration.codebook_plan import Settings, choose, plan
from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS, Codebooks, PackedWeight
from trimtab.passes.precision import convert
from trimtab.passes.vq import PackWeights, Site, sites
from trimtab.recipe import make_recipe
from trimtab.shapes import shape
from trimtab.targets.base import BuildOptions
from trimtab.targets.device import find_device
from trimtab.targets.engines import builder_for, specialized
from trimtab.weights import weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("graph", type=Path)
    parser.add_argument("--device", default="rtx-4090")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--rule", nargs="*", default=[], help="as `trimtab compile --vq-rule` takes it")
    parser.add_argument("--symbols", nargs="*", default=["batch=1", "rows=1"], help="sizes for open ones")
    options = parser.parse_args()
    rules = make_recipe({"vq": options.bits[0], "vq_rules": options.rule}).vq_rules
    sizes = {name: int(size) for name, _, size in (pair.partition("=") for pair in options.symbols)}
    print(
        f"{'weights':<14}{'graph bytes':>15}{'engine bytes':>15}{'of FP32':>10}{'of FP16':>10}{'peak GB':>9}"
        f"{'activations MB':>16}"
    )
    dense: dict[str, int] = {}
    for precision in ("fp32", "fp16"):
        for bits in (None, *options.bits):
            model = ir.load(options.graph)
            if bits is not None:
                PackWeights(_random_codes(list(sites(model)), Settings(bits, rules)))(model)
            model = convert(model, precision, {}).model
            held = weight_bytes(model)
            size, peak, activations = _built(model, options.device, sizes)
            if bits is None:
                dense[precision] = size
            of = [f"1/{dense[p] / size:.2f}" if p in dense else "" for p in ("fp32", "fp16")]
            name = precision if bits is None else f"{precision}, {bits} bits"
            print(
                f"{name:<14}{held:>15,}{size:>15,}{of[0]:>10}{of[1]:>10}{peak / 1e9:>9.2f}"
                f"{activations / 1e6:>16.1f}",
                flush=True,
            )


def _built(model: ir.Model, name: str, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Bytes of the engine, the build's most memory, and the engine's activations."""
    device = find_device(name)
    builder = builder_for(device)
    shapes = {
        value.name: shape([d if isinstance(d, int) else str(d.value) for d in value.shape], sizes)
        for value in model.graph.inputs
    }
    fixed = specialized(model, shapes)
    lowered = builder.lower(fixed, device)
    with tempfile.TemporaryDirectory() as folder:
        info = builder.build(
            lowered, device, BuildOptions(shapes=shapes), Path(folder) / "engine", lambda text: None
        )
    return info.bytes, info.peak_bytes or 0, info.activation_bytes or 0


def _random_codes(found: list[Site], settings: Settings) -> Codebooks:
    random, layers = np.random.default_rng(0), {}
    named = {site.name: site for site in found}
    for group in plan(named, choose(named, settings), settings):
        form = FORMATS[group.bits]
        codebook = random.standard_normal((group.codewords, form.length)).astype(np.float32) * 0.02
        for name in group.names:
            rows, *rest = named[name].shape
            size = (rows, -(-math.prod(rest) // form.length))
            codes = random.integers(0, group.codewords, size, np.uint8, endpoint=False)
            packed = vq_op.pack_indices(codes, form.index_bits)
            layers[name] = PackedWeight(group.bits, packed, codebook, None, math.prod(rest), 0.0)
    return Codebooks("", layers)


if __name__ == "__main__":
    main()
