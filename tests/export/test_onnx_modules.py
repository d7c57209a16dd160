"""Module names and inner sizes of foreign graphs: what makes removal, inheritance and packing possible for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from foreign import PIXELS, compiled, noise, picture, sampled, write

from trimtab.errors import InputError
from trimtab.export.onnx.graphs import name_sizes, open_graph
from trimtab.export.onnx.modules import restore_modules
from trimtab.export.onnx.sizes import settle_inside
from trimtab.passes.scopes import SCOPES, module_tree, scopes

pytestmark = pytest.mark.xdist_group("onnx-modules")


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.ff(x)) / 1.0  # as diffusers divides by a scale of one


class _Net(torch.nn.Module):
    """Patches of 2x2 pixels, four blocks, and back; sizes are computed as diffusers' transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 32, 2, stride=2)
        self.transformer_blocks = torch.nn.ModuleList(_Block() for _ in range(4))
        self.out = torch.nn.Linear(32, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x) + (t / 1000).reshape(-1, 1, 1, 1)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        tokens = tokens.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        parts = self.out(tokens).reshape(-1, height, width, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", parts).reshape(-1, 3, 2 * height, 2 * width)


class _Wrapper(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.net(sample, timestep)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, _Net]:
    """A folder with a denoiser that torch's older exporter wrote from inside of a wrapper, and the denoiser."""
    folder = tmp_path_factory.mktemp("torchscript")
    torch.manual_seed(0)
    net = _Net().eval()
    axes = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Wrapper(net),
            (torch.randn(2, 3, 4, 8), torch.tensor([5.0, 5.0])),
            str(folder / "denoiser.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["sample", "timestep"],
            output_names=["out_sample"],
            dynamic_axes={"sample": axes, "timestep": {0: "n"}},
        )
    return folder, net


def test_names_of_the_older_exporter_become_modules_without_the_wrapper(
    torchscript: tuple[Path, _Net],
) -> None:
    model = open_graph("denoiser", torchscript[0] / "denoiser.onnx").model
    paths = set(module_tree(model.graph))
    assert {
        "patch",
        "transformer_blocks.0",
        "transformer_blocks.3.ff",
        "transformer_blocks.3.ff.2",
        "out",
    } <= paths
    assert not any(path.startswith("net") for path in paths)
    names = set(model.graph.initializers)
    assert {"patch.weight", "transformer_blocks.0.ff.0.bias", "transformer_blocks.0.ff.0.weight.T"} <= names
    assert "Constant" not in {node.op_type for node in model.graph}
    again = {node.name: scopes(node) for node in model.graph}
    restore_modules(model)
    assert {node.name: scopes(node) for node in model.graph} == again


def test_blocks_of_the_older_exporters_graph_are_inherited_removed_and_packed(
    torchscript: tuple[Path, _Net], tmp_path: Path
) -> None:
    folder, net = torchscript
    (tmp_path / "denoiser.onnx").symlink_to(folder / "denoiser.onnx")
    start = noise((1, 3, 4, 8), 1)
    with torch.no_grad():
        expected = picture(sampled(net, start))
    with compiled(tmp_path, PIXELS) as ours:
        assert np.abs(ours(seed=1).pixels - expected).max() < 1e-5
    kept: dict[str, torch.Tensor] = {}

    blocks = net.transformer_blocks

    def inheriting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        def middle(tokens: torch.Tensor) -> torch.Tensor:
            if int(t) != 333:  # the second of three steps
                kept["added"] = blocks[2](blocks[1](tokens)) - tokens
            return tokens + kept["added"]

        net.transformer_blocks = torch.nn.ModuleList([blocks[0], _Call(middle), blocks[3]])
        try:
            return net(x, t.reshape(1).float())
        finally:
            net.transformer_blocks = blocks

    with torch.no_grad():
        expected = picture(sampled(inheriting, start))
    with compiled(tmp_path, PIXELS, inherit=2) as ours:
        assert len(ours.bundle.contents.segments) == 4
        assert np.abs(ours(seed=1).pixels - expected).max() < 1e-5
        assert ours(seed=1, size=(16, 8)).pixels.shape == (1, 8, 16, 3)
    with compiled(tmp_path, PIXELS, vq=4) as ours:
        assert [(p.name, p.applied) for p in ours.bundle.contents.passes] == [
            ("FuseSampler", 1),
            ("PackWeights", 8),
        ]
    with compiled(tmp_path, PIXELS, remove=0.2, remove_by="magnitude") as ours:
        assert ("RemoveLayers", 1) in [(p.name, p.applied) for p in ours.bundle.contents.passes]


class _Call(torch.nn.Module):
    def __init__(self, run: object) -> None:
        super().__init__()
        self.forward = run  # type: ignore[assignment]


SCOPED = (
    "float[N,3,H,W] sample, float timestep",
    "float[N,3,H,W] out_sample",
    "<float[1] scale = {0.25}, float[1] shift = {0.5}> { t = Mul(timestep, scale) s = Mul(sample, shift) "
    "out_sample = Add(s, t) }",
)


def scoped(folder: Path, paths: list[list[str]], names: dict[str, str]) -> ir.Model:
    """`SCOPED` with these scopes on its nodes and these names of its weights, opened."""
    model = onnx.load(write(folder / "denoiser.onnx", *SCOPED))
    for node, path in zip(model.graph.node, paths, strict=True):
        entry = node.metadata_props.add()
        entry.key, entry.value = SCOPES, repr(["", *path, "op"])
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    onnx.save(model, folder / "denoiser.onnx")
    return open_graph("denoiser", folder / "denoiser.onnx").model


def test_a_wrapper_goes_from_paths_and_weights(tmp_path: Path) -> None:
    paths = [["unet", "unet.mid"], ["unet", "unet.mid", "unet.mid.0"], ["unet", "unet.out"]]
    model = scoped(tmp_path, paths, {"scale": "unet.mid.scale", "shift": "unet.shift"})
    assert [scopes(node) for node in model.graph] == [("mid",), ("mid", "mid.0"), ("out",)]
    assert set(model.graph.initializers) == {"mid.scale", "shift"}


def test_what_is_no_wrapper_stays(tmp_path: Path) -> None:
    blocks = [["blocks.0"], ["blocks.0", "blocks.0.ff"], []]
    assert set(module_tree(scoped(tmp_path, blocks, {}).graph)) == {"blocks.0", "blocks.0.ff"}
    model = scoped(tmp_path, [["a", "a.b"], ["a"], []], {"scale": "a.shift"})
    assert set(module_tree(model.graph)) == {"a", "a.b"}, "another weight has the name that would be left"


def test_sizes_inside_follow_from_the_inputs(tmp_path: Path) -> None:
    write(
        tmp_path / "denoiser.onnx",
        "float[1,3,H,W] sample, float timestep",
        "float[1,3,H,W] out_sample",
        "<int64[3] tokens = {1, 3, -1}> { "
        "up = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(sample, kernel) "
        "down = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(sample) "
        "flat = Reshape(up, tokens) more = Concat<axis = 2>(flat, first) odd = Concat<axis = 2>(flat, flat, more) "
        "a = ReduceSum(odd) b = ReduceSum(down) c = Add(a, b) out_sample = Add(sample, c) }",
    )
    model = onnx.load(tmp_path / "denoiser.onnx")
    for tensor in (np.zeros((3, 3, 3, 3), np.float32), np.zeros((1, 3, 1), np.float32)):
        name = "kernel" if tensor.ndim == 4 else "first"
        model.graph.initializer.append(onnx.numpy_helper.from_array(tensor, name))
    onnx.save(model, tmp_path / "denoiser.onnx")
    foreign = open_graph("denoiser", tmp_path / "denoiser.onnx")
    name_sizes(foreign.model.graph, {"sample": ("rows", None, "height", "width")})
    settle_inside(foreign.model, {"height": 8, "width": 16})
    shapes = {
        v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in _results(foreign.model)
    }
    tokens = "((height - 1)//2 + 1)*((width - 1)//2 + 1)"
    assert shapes["up"] == [1, 3, "(height - 1)//2 + 1", "(width - 1)//2 + 1"]
    assert shapes["down"] == [1, 3, "height//2", "width//2"]
    assert shapes["flat"] == [1, 3, tokens]
    assert shapes["more"] == [1, 3, f"{tokens} + 1"]
    assert shapes["a"] == [1, 1, 1]
    seen = {v.name: list(v.shape) for v in _results(foreign.model)}
    settle_inside(foreign.model, {"height": 8, "width": 16})
    assert {v.name: list(v.shape) for v in _results(foreign.model)} == seen


def _results(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs]


def test_a_size_that_is_a_multiple_gives_the_size_itself() -> None:
    head = '<ir_version: 8, opset_import: ["" : 17]>'
    text = f"{head} g (float[N,3,H,W] x) => (float[N,3,H,W] y) {{ z = Neg(x) y = Neg(z) }}"
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    model.graph.inputs[0].shape = ir.Shape(["n", 3, "4*h", "4*w"])
    half = next(iter(model.graph)).outputs[0]
    half.shape = ir.Shape(["n", 3, "2*h", "w"])
    name_sizes(model.graph, {"x": ("rows", None, "height", "width")})
    assert half.shape is not None
    assert list(map(str, half.shape)) == ["rows", "3", "2*(height//4)", "(width//4)"]


def test_packing_nothing_is_warned_of_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = "<float rate = {0.001}, float[3,3,1,1] kernel = {1,0,0, 0,1,0, 0,0,1}> { t = Mul(timestep, rate) "
    body += "s = Conv(sample, kernel) out_sample = Add(s, t) }"
    write(tmp_path / "denoiser.onnx", *SCOPED[:2], body)
    compiled(tmp_path, PIXELS, vq=2)
    assert "no weight of the denoiser is packed: of 1, 1 stay because it lies outside of the" in caplog.text
    with pytest.raises(InputError, match="opset 17, and weights of 3 bits need 18"):
        compiled(tmp_path, PIXELS, vq=3)
    write(tmp_path / "denoiser.onnx", *SCOPED[:2], body.replace("Conv(sample, kernel)", "Neg(sample)"))
    compiled(tmp_path, PIXELS, vq=2)
    assert "none of float32" in caplog.text
