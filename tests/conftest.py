"""Tiny pipelines and their bundles, made once for all tests that ask for them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import trimtab

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; torch would take them all for each.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the whole session shares."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def pipeline_folder(workshop: Path) -> Callable[[str], Path]:
    """Family -> folder of its tiny diffusers pipeline."""
    return functools.cache(lambda family: tiny.save(family, workshop / "pipelines"))


@pytest.fixture(scope="session")
def bundle_folder(workshop: Path, pipeline_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """Family -> its compiled bundle. Tests must not change it: see `copied_bundle`."""

    @functools.cache
    def compiled(family: str) -> Path:
        output = workshop / "bundles" / family
        trimtab.compile(pipeline_folder(family), output, steps=(20, 3))
        return output

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
