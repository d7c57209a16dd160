"""Tiny pipelines, the shipped sample models, and their bundles: made once for all tests of all workers.

Compiling even a tiny pipeline takes ten to thirty seconds, so that a test takes what lies here: `bundle_folder`,
`sample_bundle` and `pipeline_folder` give folders that every test and every worker reads. A test that changes
files copies them first, as `copied_bundle` does.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
import torch
import torch._dynamo.config
from diffusers.configuration_utils import FrozenDict
from filelock import FileLock

import trimtab
from trimtab.export import parts
from trimtab.export import trace as tracing
from trimtab.export.trace import Example

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
SAMPLE_MODELS = Path(__file__).parents[1] / "samples" / "01_shapes" / "models"

# The collector would go through all objects of torch once every few hundred new ones: 9% of the tests' time, now 4%.
gc.set_threshold(100_000)

if IS_WORKER:
    # Workers share the cores; torch would take them all for each.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts a test of small pipelines that is in no group into that of its parameter ``family``, or of "dit".

    So one worker does not wait for what the other compiles, or compile what the other has.
    """
    for item in items:
        if "pipeline_folder" in item.fixturenames and item.get_closest_marker("xdist_group") is None:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            item.add_marker(pytest.mark.xdist_group(parameters.get("family", "dit")))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the whole session shares: one for all xdist workers. Use `made_once` to write to it."""
    base = tmp_path_factory.getbasetemp()
    # Every worker has a base of its own inside the session's.
    folder = (base.parent if IS_WORKER else base) / "workshop"
    folder.mkdir(exist_ok=True)
    return folder


DEEP = 500
"""Modules from which on a trace keeps what fake tensors gave, as the shipped models'. Where there is one layer of each
kind, it is seldom asked for again, and to keep it takes a fifth of the time."""


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Lets the first worker that asks make ``folder``; the others wait for it.

    Args:
        folder: In the workshop.
        make: Writes the folder it is given, which is put in its place once it is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


class _ByContent(pickle.Pickler):
    """Writes what a module is, and not where: torch would say where tensors lie in memory, configurations on disk.

    Every process writes the same: sets are sorted, as diffusers' lists of them are, and a string is a number, so that
    none refers to another that happens to be the same object.
    """

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Path) or (isinstance(thing, str) and thing.startswith(os.sep)):
            return "a path"
        if isinstance(thing, str):
            return int.from_bytes(thing.encode())
        return sorted(map(repr, thing)) if isinstance(thing, set | frozenset) else None

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return tuple, ((str(thing.dtype), *thing.shape, thing.detach().contiguous().numpy().tobytes()),)
        if isinstance(thing, FrozenDict):
            return dict, (
                dict(thing) | {"_use_default_values": sorted(thing.get("_use_default_values", ()))},
            )
        return NotImplemented


@pytest.fixture(scope="session", autouse=True)
def _traced_once(workshop: Path) -> Iterator[None]:
    """Has all workers trace a module once: a third of all tests' time would go into the same tiny models again.

    Modules are the same if everything in them is, to the last bit. What is traced depends on nothing else but
    the sizes of the examples, and every caller gets a graph of its own, from a file.
    """

    def trace(module: torch.nn.Module, inputs: Mapping[str, Example], outputs: list[str]) -> ir.Model:
        sizes = [(n, e.tensor.shape, e.tensor.dtype, e.dims, dict(e.multiples)) for n, e in inputs.items()]
        stream = io.BytesIO()
        _ByContent(stream).dump((module, sizes, outputs))

        def save(folder: Path) -> None:
            deep = sum(1 for _ in module.modules()) >= DEEP
            with torch._dynamo.config.patch(fake_tensor_cache_enabled=deep):
                graph = tracing.trace(module, inputs, outputs)
            folder.mkdir()
            ir.save(graph, folder / "graph.onnx")

        traced = made_once(workshop / "traced" / hashlib.sha256(stream.getvalue()).hexdigest(), save)
        return ir.load(traced / "graph.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "trace", trace)
        yield


@pytest.fixture(scope="session")
def pipeline_folder(workshop: Path) -> Callable[[str], Path]:
    """Family (of `tiny.FAMILIES`) -> folder of its diffusers pipeline with random weights. To be read only."""
    pipelines = workshop / "pipelines"
    return lambda family: made_once(pipelines / family, lambda folder: tiny.save(family, folder)) / family


@pytest.fixture(scope="session")
def bundle_folder(workshop: Path, pipeline_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """Family -> its bundle for the `cpu` target, with its own scheduler's 20 and 3 steps. To be read only.

    "dit" is the cheapest (no text encoder, a fixed size), then "ddpm" (pixels, no VAE); "sd15" is a whole
    Stable Diffusion with its encoder and inpainting. Tests that use another than "dit", and have it not as a
    parameter ``family``, say so with an ``xdist_group`` of its name.
    """

    def compiled(family: str) -> Path:
        return made_once(
            workshop / "bundles" / family,
            lambda folder: trimtab.compile(pipeline_folder(family), folder, steps=(20, 3)),
        )

    return compiled


@pytest.fixture(scope="session")
def sample_bundle(workshop: Path) -> Callable[[str], Path]:
    """ "shapes-sd" or "shapes-dit" -> the bundle of that shipped, trained model: 20 and 3 steps. To be read only.

    For what random weights cannot show. Costs about 25 s ("shapes-sd") or 10 s ("shapes-dit") a session.
    """

    def compiled(model: str) -> Path:
        return made_once(
            workshop / "samples" / model,
            lambda folder: trimtab.compile(SAMPLE_MODELS / model, folder, steps=(20, 3)),
        )

    return compiled


@pytest.fixture
def copied_bundle(bundle_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small bundle that a test may damage."""
    return Path(shutil.copytree(bundle_folder("dit"), tmp_path / "copy.bundle"))


@pytest.fixture(scope="session")
def diffusers_pipeline(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Family -> the diffusers pipeline itself."""

    @functools.cache
    def loaded(family: str) -> Any:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(family))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return loaded
