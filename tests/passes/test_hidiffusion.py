"""HiDiffusion: every phase against a plain torch implementation, the phases' tables, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trimtab
from trimtab.bundle import open_bundle, update_manifest
from trimtab.calibration.draft import draft
from trimtab.errors import InputError, PassError, WrongDevice
from trimtab.passes.hidiffusion import check_places, hidiffusion, rewrites_at, scale_of
from trimtab.passes.partition import partition
from trimtab.passes.propagation import propagate
from trimtab.passes.raunet import CONV, POOL, Places
from trimtab.runtime.load import Pipeline
from trimtab.storage import read_program, with_engines
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.device import find_device
from trimtab.targets.engines import specialized
from trimtab.targets.estimate import plan

BundleFolder = Callable[[str], Path]

TOP = Places("down_blocks.0", ("down_blocks.1", "up_blocks.2"), ("down_blocks.0", "up_blocks.3"))
"""Stable Diffusion 1 and 2."""
BELOW = Places("down_blocks.1", ("down_blocks.1", "up_blocks.1"), ("down_blocks.1", "up_blocks.1"))
"""SDXL."""

SIZE = (256, 128)
"""Pixels: four times the trained side of 64 by its area, and not square."""


# ---- a plain torch implementation, written from the paper's description ----


@contextlib.contextmanager
def rewritten(unet: Any, places: Places, rewrites: tuple[str, ...], shifts: np.ndarray) -> Iterator[None]:
    """A diffusers U-Net that computes as HiDiffusion says, while the block runs."""
    sizes: dict[str, Any] = {}
    undo: list[Callable[[], None]] = []

    def put(module: Any, name: str, value: Any) -> None:
        old = getattr(module, name)
        setattr(module, name, value)
        undo.append(lambda: setattr(module, name, old))

    module = unet.get_submodule
    if CONV in rewrites:
        down = module(f"{places.conv}.downsamplers.0")
        up = module(places.upsampler)

        def quarter(hidden: Any, *_: Any, **__: Any) -> Any:
            sizes["conv"] = hidden.shape[2:]
            return F.conv2d(hidden, down.conv.weight, down.conv.bias, stride=4, padding=2, dilation=2)

        def back(hidden: Any, *_: Any, **__: Any) -> Any:
            return up.conv(F.interpolate(hidden, size=sizes["conv"], mode="nearest"))

        put(down, "forward", quarter)
        put(up, "forward", back)
    if POOL in rewrites:
        layers = len(module(places.pool[0]).resnets)
        kind = "attentions" if hasattr(module(places.pool[0]), "attentions") else "resnets"

        def pooled(_m: Any, _i: Any, output: Any) -> Any:
            sizes["pool"] = output[0].shape[2:]
            return (F.avg_pool2d(output[0], 2, ceil_mode=True),)

        def resized(_m: Any, _i: Any, output: Any) -> Any:
            return (F.interpolate(output[0], size=sizes["pool"], mode="bicubic"),)

        for path, hook in (
            (f"{places.pool[0]}.{kind}.0", pooled),
            (f"{places.pool[1]}.{kind}.{layers - 1}", resized),
        ):
            undo.append(module(path).register_forward_hook(hook).remove)
    blocks = [n for n, _ in unet.named_modules() if n.endswith(".attn1") and n.startswith(places.windows)]
    order = [n for n in _graph_order(unet) if n in blocks]
    for index, name in enumerate(order):
        transformer = module(name.partition(".transformer_blocks")[0])
        undo.append(
            transformer.register_forward_pre_hook(
                lambda _m, inputs: sizes.update(grid=inputs[0].shape[2:])
            ).remove
        )
        put(module(name), "processor", _Windows(sizes, int(shifts[index])))
    try:
        with torch.no_grad():
            yield
    finally:
        for each in reversed(undo):
            each()


def _graph_order(unet: Any) -> list[str]:
    names = [n for n, _ in unet.named_modules() if n.endswith(".attn1")]
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(names, key=lambda n: (stage[n.partition(".")[0]], n))


class _Windows:
    """diffusers' attention processor with four shifted windows."""

    def __init__(self, sizes: dict[str, Any], shift: int) -> None:
        self.sizes, self.shift = sizes, shift

    def __call__(self, attention: Any, hidden: Any, **_: Any) -> Any:
        height, width = self.sizes["grid"]
        rows, _, channels = hidden.shape
        wh, ww = height // 2, width // 2
        roll = (self.shift * (wh // 4), self.shift * (ww // 4))
        grid = hidden.view(rows, height, width, channels)
        grid = torch.roll(grid, (-roll[0], -roll[1]), (1, 2))
        parts = (
            grid.view(rows, 2, wh, 2, ww, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, wh * ww, channels)
        )
        heads = attention.heads
        q, k, v = (
            to(parts).view(len(parts), wh * ww, heads, -1).transpose(1, 2)
            for to in (attention.to_q, attention.to_k, attention.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(parts), wh * ww, -1)
        out = attention.to_out[0](out)
        out = out.view(rows, 2, 2, wh, ww, -1).permute(0, 1, 3, 2, 4, 5).reshape(rows, height, width, -1)
        return torch.roll(out, roll, (1, 2)).reshape(rows, height * width, -1)


# ---- one step of a bundle, beside torch ----


def step_and_torch(
    pipe: Pipeline, unet: Any, index: int, rewrites: tuple[str, ...], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The guided prediction of one evaluation, from the engine and from torch, for the same inputs."""
    request, plan, _ = pipe.prepare("a red circle", seed=3, schedule=20, size=size)
    plan.begin(request)
    state = plan.buffers["state"]  # as after earlier steps: of zeros, norms would magnify the last bits
    state[...] = np.random.default_rng(index).standard_normal(state.shape).astype(np.float32)
    step = plan.steps[index]
    step.begin(request)
    read: dict[str, Any] = {}
    for call in step.calls:
        read |= {name: np.asarray(array).copy() for name, array in call.inputs.items()}
    for call in step.calls:
        call.run()
    ours = np.asarray(step.results["model_output"])
    rows = len(read["mix"])
    sample = np.tensordot(read["sample_weights"], read["state"], 1)
    places = _places(unet)
    shifts = np.asarray(plan.buffers["window_shifts"])[index]
    with rewritten(unet, places, rewrites, shifts):
        prediction = unet(
            torch.from_numpy(np.tile(sample, (rows, 1, 1, 1)).astype(np.float32)),
            torch.tensor(float(read["timestep"])),
            torch.from_numpy(read["encoder_hidden_states"]),
            return_dict=False,
        )[0].numpy()
    return ours, np.tensordot(read["mix"], prediction.reshape(rows, -1, *prediction.shape[1:]), 1)


def _places(unet: Any) -> Places:
    blocks = len(unet.down_blocks)
    pool = ("down_blocks.1", f"up_blocks.{blocks - 2}")
    if hasattr(unet.down_blocks[0], "attentions"):
        return Places("down_blocks.0", pool, ("down_blocks.0", f"up_blocks.{blocks - 1}"))
    return Places("down_blocks.1", pool, pool)


@pytest.fixture(scope="module")
def top(
    sample_bundle: BundleFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, Any]]:
    """The sample U-Net, built as Stable Diffusion 1 is, rewritten; and its diffusers twin."""
    from conftest import SAMPLE_MODELS
    from diffusers import UNet2DConditionModel

    program = partition(hidiffusion(read_program(open_bundle(sample_bundle("shapes-sd")))))
    with draft(program, tmp_path_factory.mktemp("top")) as pipe:
        yield pipe, UNet2DConditionModel.from_pretrained(SAMPLE_MODELS / "shapes-sd" / "unet").eval()


@pytest.fixture(scope="module")
def below(
    bundle_folder: BundleFolder, pipeline_folder: BundleFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, Any]]:
    """A U-Net without attention at the top level, as SDXL's."""
    from diffusers import UNet2DConditionModel

    folder = bundle_folder("sd_below")
    program = partition(hidiffusion(read_program(open_bundle(folder))))
    with draft(program, tmp_path_factory.mktemp("below")) as pipe:
        yield pipe, UNet2DConditionModel.from_pretrained(pipeline_folder("sd_below") / "unet").eval()


@pytest.mark.xdist_group("shapes-sd")
@pytest.mark.parametrize(
    ("size", "index", "rewrites"),
    [
        ((128, 128), 0, (CONV,)),
        ((128, 128), 8, ()),
        (SIZE, 0, (CONV, POOL)),
        (SIZE, 6, (CONV,)),
        (SIZE, 14, ()),
    ],
)
def test_every_phase_equals_torch_with_attention_at_the_top(
    top: tuple[Pipeline, Any], size: tuple[int, int], index: int, rewrites: tuple[str, ...]
) -> None:
    ours, theirs = step_and_torch(*top, index, rewrites, size)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.xdist_group("sd_below")
@pytest.mark.parametrize(
    ("size", "index", "rewrites"),
    [
        ((128, 128), 0, (CONV,)),
        ((128, 128), 3, (POOL,)),
        (SIZE, 0, (CONV, POOL)),
        (SIZE, 6, (POOL,)),
        (SIZE, 14, ()),
    ],
)
def test_every_phase_equals_torch_without_attention_at_the_top(
    below: tuple[Pipeline, Any], size: tuple[int, int], index: int, rewrites: tuple[str, ...]
) -> None:
    ours, theirs = step_and_torch(*below, index, rewrites, size)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.xdist_group("shapes-sd")
def test_pictures_of_the_trained_size_stay_as_they_are(
    top: tuple[Pipeline, Any], sample_bundle: BundleFolder
) -> None:
    with trimtab.load(sample_bundle("shapes-sd")) as plain:
        before, after = (p("a red circle", seed=0, schedule=3) for p in (plain, top[0]))
    assert after.settings["schedule"] == before.settings["schedule"]
    np.testing.assert_allclose(after.pixels, before.pixels, rtol=0, atol=1e-5)


@pytest.mark.xdist_group("shapes-sd")
def test_weights_stand_once(top: tuple[Pipeline, Any], sample_bundle: BundleFolder) -> None:
    def weights(folder: Path) -> int:
        return sum(path.stat().st_size for path in (folder / "graphs").glob("*.weights"))

    assert weights(top[0].bundle.folder) <= 1.01 * weights(sample_bundle("shapes-sd"))


@pytest.mark.xdist_group("shapes-sd")
def test_the_seed_draws_the_shifts_and_the_same_noise(top: tuple[Pipeline, Any]) -> None:
    pipe, _ = top
    shifts, noises = [], []
    for seed in (1, 1, 2):
        request, plan, _ = pipe.prepare("a star", seed=seed, size=(128, 128), schedule=20)
        plan.begin(request)
        shifts.append(np.asarray(plan.buffers["window_shifts"]).copy())
        noises.append(np.asarray(plan.buffers["state"])[0].copy())
    assert (shifts[0] == shifts[1]).all() and (shifts[0] != shifts[2]).any()
    assert set(np.unique(shifts[0])) == {0, 1, 2, 3}
    from trimtab.runtime.noise import NoiseGenerator

    np.testing.assert_allclose(noises[0], NoiseGenerator(1).normal(noises[0].shape), rtol=1e-6)


@pytest.mark.xdist_group("shapes-sd")
def test_a_size_that_the_windows_cannot_divide_is_refused(
    top: tuple[Pipeline, Any], sample_bundle: BundleFolder
) -> None:
    with pytest.raises(InputError, match=r"136x128 .* multiples of 16, .* use 128x128"):
        top[0]("a star", size=(136, 128))
    program = read_program(open_bundle(sample_bundle("shapes-sd")))
    large = dataclasses.replace(program, size=(136, 128), trained_size=(64, 64))
    with pytest.raises(PassError, match=r"the windows of down_blocks.0 cannot divide 136x128"):
        check_places(large)  # before layers are scored
    with pytest.raises(PassError, match=r"the windows of down_blocks.0 cannot divide 136x128"):
        hidiffusion(large)


@pytest.mark.xdist_group("shapes-sd")
def test_a_program_that_only_starts_from_pictures_has_the_phases_of_the_whole_one(
    sample_bundle: BundleFolder,
) -> None:
    folder, name = sample_bundle("shapes-sd"), "image-to-image"
    whole, part = (read_program(open_bundle(folder)) for _ in range(2))
    part = dataclasses.replace(part, tasks={name: part.tasks[name]})
    assert hidiffusion(part).tasks == {name: hidiffusion(whole).tasks[name]}


@pytest.mark.xdist_group("shapes-sd")
def test_a_large_native_size_takes_the_place_of_the_plain_schedules(sample_bundle: BundleFolder) -> None:
    program = read_program(open_bundle(sample_bundle("shapes-sd")))
    program = dataclasses.replace(program, size=(128, 128), trained_size=(64, 64))
    task = hidiffusion(program).tasks["text-to-image"]
    assert set(task.schedules) == set(program.tasks["text-to-image"].schedules)
    assert all(s.size_multiple == 16 for s in task.schedules.values())


# ---- what every picture is bound to ----


@pytest.mark.xdist_group("sd_below")
def test_all_sizes_follow_from_those_of_the_inputs(below: tuple[Pipeline, Any]) -> None:
    """Windows in the pooled part too: whoever fixes sizes, plans memory or splits attention asks for it."""
    contents = below[0].bundle.contents
    for size, windows in (((64, 64), 1), ((128, 128), 2)):
        shapes = segment_shapes(contents, size)
        windowed = [each["windows"] for made in shapes.values() for each in made if "windows" in each]
        assert len(windowed) > 2 and set(windowed) == {(windows,)}
        for name, segment in read_program(below[0].bundle).segments.items():
            for binding in shapes[name]:
                extents = propagate(segment.model, binding)
                assert all(value in extents for node in segment.model.graph for value in node.outputs)
    inner = next(n for n, made in shapes.items() if len(made) > 2)
    fixed = specialized(read_program(below[0].bundle).segments[inner].model, shapes[inner][0])
    assert all(v.shape is not None and v.shape.is_static() for node in fixed.graph for v in node.outputs)
    assert not {"Shape", "Size", "Range"} & {node.op_type for node in fixed.graph}


@pytest.mark.xdist_group("sd_below")
def test_a_plan_of_a_larger_picture_has_the_segments_that_it_calls(below: tuple[Pipeline, Any]) -> None:
    bundle = below[0].bundle
    whole = functools.partial(plan, read_program(bundle), bundle.contents, find_device("cpu"))
    small, large = whole(precision="fp32"), whole(precision="fp32", size=(128, 128))
    assert len(large.segments) > len(small.segments) and large.peak_bytes > small.peak_bytes


@pytest.mark.xdist_group("sd_below")
def test_engines_may_lack_what_only_larger_pictures_call(below: tuple[Pipeline, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(below[0].bundle.folder, tmp_path / "b"))
    contents = open_bundle(folder).contents
    lacking = {n for n, made in segment_shapes(contents, contents.size).items() if not made}
    engines = {n: () if n in lacking else s.engines for n, s in contents.segments.items()}
    update_manifest(folder, with_engines(contents, engines))
    with trimtab.load(folder) as pipe:
        assert lacking and pipe("a star", seed=0, schedule=3).images
        with pytest.raises(InputError, match=r"no engine of denoiser\.\d for cpu, as the sizes that were"):
            pipe("a star", seed=0, schedule=3, size=(128, 128))
    update_manifest(folder, with_engines(contents, engines | {"denoiser.0": ()}))
    with pytest.raises(WrongDevice, match=r"has no engine of denoiser\.0 for cpu yet"):
        trimtab.load(folder, target="cpu")


@pytest.mark.xdist_group("dit")
def test_a_transformer_is_refused(bundle_folder: BundleFolder) -> None:
    with pytest.raises(PassError, match="HiDiffusion rewrites U-Nets, and this denoiser has no down_blocks"):
        hidiffusion(read_program(open_bundle(bundle_folder("dit"))))


@pytest.mark.xdist_group("shapes-sd")
def test_an_upsampler_of_another_factor_is_refused(sample_bundle: BundleFolder) -> None:
    program = read_program(open_bundle(sample_bundle("shapes-sd")))
    for node in program.segments["denoiser"].model.graph:
        if node.op_type == "Resize":
            node.resize_inputs(3)
    with pytest.raises(PassError, match=r"upsamplers\.0 does not double, .* out"):
        hidiffusion(program)


# ---- the tables ----


@pytest.mark.parametrize(
    ("places", "scale", "steps", "expected"),
    [
        (TOP, 2, 50, [("conv", 20), ("", 30)]),
        (TOP, 2, 30, [("conv", 12), ("", 18)]),
        (TOP, 2, 20, [("conv", 8), ("", 12)]),
        (TOP, 4, 50, [("conv+pool", 15), ("conv", 20), ("", 15)]),
        (TOP, 4, 30, [("conv+pool", 9), ("conv", 12), ("", 9)]),
        (TOP, 4, 20, [("conv+pool", 6), ("conv", 8), ("", 6)]),
        (BELOW, 2, 50, [("conv", 8), ("pool", 12), ("", 30)]),
        (BELOW, 2, 30, [("conv", 4), ("pool", 8), ("", 18)]),
        (BELOW, 2, 20, [("conv", 3), ("pool", 5), ("", 12)]),
        (BELOW, 4, 50, [("conv+pool", 15), ("pool", 20), ("", 15)]),
        (BELOW, 4, 30, [("conv+pool", 9), ("pool", 12), ("", 9)]),
        (BELOW, 4, 20, [("conv+pool", 6), ("pool", 8), ("", 6)]),
    ],
)
def test_phases_follow_the_authors_table(
    places: Places, scale: int, steps: int, expected: list[tuple[str, int]]
) -> None:
    found = ["+".join(rewrites_at(places, scale, step, steps)) for step in range(steps)]
    assert found == [name for name, count in expected for _ in range(count)]


@pytest.mark.parametrize(
    ("size", "scale"),
    [((64, 64), 1), ((88, 88), 1), ((64, 128), 2), ((128, 128), 2), ((256, 128), 4), ((512, 512), 4)],
)
def test_a_pictures_scale_is_that_of_its_area(size: tuple[int, int], scale: int) -> None:
    assert scale_of(size, (64, 64)) == scale
