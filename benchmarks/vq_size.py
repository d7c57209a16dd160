"""Bytes of TensorRT for RTX engines, dense and packed; goals for DiT-XL/2 at 2 bits: 1/14 of FP32's, 1/7 of FP16's.

    python benchmarks/vq_size.py BUNDLE [--against BUNDLE] [--device rtx-4090] [--bits 2 3] [--rule PATTERN=BITS ...]

BUNDLE is compiled without `--vq`; the engines of its denoiser are counted, all together where it is in parts. Ratios
are to the dense engines of the bundle itself, or of another one: of the same model without `--hoist`. The engines are
really built, which needs no GPU. The codes are random: sizes do not depend on them, and k-means of so large a model
takes minutes. FP16 is converted without ranges: nothing is kept in FP32.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np

from trimtab.bundle import open_bundle
from trimtab.calibration.codebook_plan import Settings, choose, plan
from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS, Codebooks, PackedWeight
from trimtab.passes.merge import MergeWeights
from trimtab.passes.precision import convert
from trimtab.passes.vq import PackWeights, Site, sites
from trimtab.program import DENOISER
from trimtab.recipe import make_recipe
from trimtab.storage import read_program
from trimtab.targets.base import BuildOptions, EngineInfo
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.device import find_device
from trimtab.targets.engines import builder_for, specialized
from trimtab.weights import weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="whose dense engines are the measure")
    parser.add_argument("--device", default="rtx-4090")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--rule", nargs="*", default=[], help="as `trimtab compile --vq-rule` takes it")
    options = parser.parse_args()
    rules = make_recipe({"vq": options.bits[0], "vq_rules": options.rule}).vq_rules
    print(
        f"{'weights':<14}{'graph bytes':>15}{'engine bytes':>15}{'of FP32':>10}{'of FP16':>10}{'peak GB':>9}"
        f"{'activations MB':>16}"
    )
    dense: dict[str, int] = {}
    for precision in ("fp32", "fp16"):
        for bits in (None, *options.bits):
            settings = None if bits is None else Settings(bits, rules)
            folder = options.bundle if bits is not None else options.against or options.bundle
            built = _built(folder, settings, precision, options.device)
            size = sum(engine.bytes for _, engine in built)
            if bits is None:
                dense[precision] = size
            of = [f"1/{dense[p] / size:.2f}" if p in dense else "" for p in ("fp32", "fp16")]
            name = precision if bits is None else f"{precision}, {bits} bits"
            peak, activations = (
                max(getattr(engine, key) or 0 for _, engine in built)
                for key in ("peak_bytes", "activation_bytes")
            )
            print(
                f"{name:<14}{sum(held for held, _ in built):>15,}{size:>15,}{of[0]:>10}{of[1]:>10}{peak / 1e9:>9.2f}"
                f"{activations / 1e6:>16.1f}",
                flush=True,
            )


def _built(
    folder: Path, settings: Settings | None, precision: str, name: str
) -> list[tuple[int, EngineInfo]]:
    """For every segment of the denoiser: bytes of the graph's weights, and the engine."""
    bundle, device = open_bundle(folder), find_device(name)
    program = read_program(bundle)
    builder = builder_for(device)
    sizes = segment_shapes(bundle.contents, program.size)
    built = []
    for segment in (program.segments[name] for name in program.segments if name.startswith(DENOISER)):
        model = segment.model
        if settings is not None:
            PackWeights(_random_codes(list(sites(model)), settings))(model)
        model = convert(model, precision, {}).model
        MergeWeights()(model)  # equal embedders are counted once
        held = weight_bytes(model)
        for shapes in sizes[segment.name]:
            lowered = builder.lower(specialized(model, shapes), device)
            with tempfile.TemporaryDirectory() as work:
                engine = builder.build(
                    lowered, device, BuildOptions(shapes=shapes), Path(work) / "engine", lambda text: None
                )
            built.append((held, engine))
    return built


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
