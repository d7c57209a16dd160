"""Scores: right, resumable, and with the same bits wherever they are computed."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import residual

from trimtab.calibration import workers
from trimtab.calibration.gates import GatedDenoiser
from trimtab.calibration.planning import Calibration
from trimtab.calibration.sensitivity import GatedGraph, kept_losses, mark_of
from trimtab.calibration.trajectories import Sample
from trimtab.calibration.workers import Workers
from trimtab.child import Child
from trimtab.errors import BundleError, CalibrationError, InputError, MissingDependency
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemoveLayers


def graph(
    folder: Path,
    widths: tuple[int, ...] = (4, 8, 12),
    count: int = 3,
    asked: Mapping[str, object] | None = None,
) -> GatedGraph:
    samples = [
        Sample(i, "denoiser", residual.inputs(seed=i), np.zeros((1, 6, 5), np.float32)) for i in range(count)
    ]
    return GatedGraph(residual.denoiser(widths), samples, folder, asked=asked)


def test_a_loss_is_that_of_the_graph_with_the_layer_removed(tmp_path: Path) -> None:
    gated = graph(tmp_path)
    scores = gated.score(Workers())
    whole = onnxruntime.InferenceSession(ir.to_proto(residual.denoiser()).SerializeToString())
    for name in gated.candidates:
        smaller = residual.denoiser()
        RemoveLayers([name])(smaller)
        removed = onnxruntime.InferenceSession(ir.to_proto(smaller).SerializeToString())
        for inputs, loss in zip(gated.samples, scores.losses[name], strict=True):
            outputs = [s.run(["model_output"], inputs)[0].astype(np.float64) for s in (whole, removed)]
            assert loss == pytest.approx(np.square(outputs[0] - outputs[1]).mean(), rel=1e-4)
    assert scores.mean("blocks.0") > scores.mean("blocks.1") > scores.mean("blocks.2") > 0
    assert 0 < scores.error("blocks.0") < scores.mean("blocks.0")


def test_every_set_of_gates_is_that_set_of_removals(tmp_path: Path) -> None:
    gated = graph(tmp_path)
    denoiser = GatedDenoiser(gated.path, list(gated.candidates))
    for size in range(4):
        for names in itertools.combinations(gated.candidates, size):
            smaller = residual.denoiser()
            RemoveLayers(names)(smaller)
            session = onnxruntime.InferenceSession(ir.to_proto(smaller).SerializeToString())
            expected = session.run(["model_output"], gated.samples[0])[0]
            (given,) = denoiser.outputs(gated.samples[0], [names])
            assert np.abs(given - expected).max() <= 1e-6


# ---- the file of losses ----


def test_losses_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    gated, log = graph(tmp_path), tmp_path / "losses"
    first = gated.score(Workers(), log=log)
    told: list[int] = []
    again = gated.score(Workers(), log=log, progress=lambda done, total: told.append(done))
    assert again == first and not told


def test_a_file_cut_short_loses_its_last_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gated, log = graph(tmp_path), tmp_path / "losses"
    first = gated.score(Workers(), log=log)
    log.write_bytes(log.read_bytes()[:-7])
    told: list[tuple[int, int]] = []
    again = gated.score(Workers(), log=log, progress=lambda *done: told.append(done))
    assert again == first and told == [(1, 1)]
    assert "cut short" in caplog.text
    assert gated.score(Workers(), log=log) == first


def test_a_file_of_another_model_or_of_other_samples_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "losses"
    graph(tmp_path / "a").score(Workers(), log=log)
    with pytest.raises(CalibrationError, match="losses of another model"):
        graph(tmp_path / "b", widths=(4, 8, 13)).score(Workers(), log=log)
    with pytest.raises(CalibrationError, match="losses on other samples"):
        graph(tmp_path / "c", count=4).score(Workers(), log=log)


@pytest.mark.parametrize("asked", [{}, {"samples": 3, "prompts": ("a cat", "a dog")}])
def test_a_file_says_what_its_samples_were_asked_for_by(asked: dict[str, Any], tmp_path: Path) -> None:
    log, calibration = tmp_path / "losses", Calibration(**asked)
    assert Calibration.of_scores(log) == Calibration(log=log)
    graph(tmp_path / "a", asked=calibration.asked).score(Workers(), log=log)
    assert Calibration.of_scores(log) == replace(calibration, log=log)


@pytest.mark.parametrize("asked", ['"all"', '{"samples": "all"}', '{"prompts": "a cat"}'])
def test_a_file_that_does_not_say_it_is_refused(asked: str, tmp_path: Path) -> None:
    log = tmp_path / "losses"
    log.write_text(f'{{"fingerprint": "x", "asked": {asked}}}\n')
    with pytest.raises(CalibrationError, match="does not say what its losses were measured on"):
        Calibration.of_scores(log)


def test_a_file_of_the_same_architecture_with_other_weights_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "losses"
    gated = graph(tmp_path / "a")
    gated.score(Workers(), log=log)
    assert kept_losses(log, mark_of(gated.candidates)) == 9
    other = residual.denoiser()
    value = other.graph.initializers["blocks.0.first.weight"]
    assert value.const_value is not None
    value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)
    trained = Candidates(other)
    assert trained.fingerprint == gated.candidates.fingerprint
    with pytest.raises(CalibrationError, match="losses of another model"):
        kept_losses(log, mark_of(trained))
    samples = [
        Sample(i, "denoiser", residual.inputs(seed=i), np.zeros((1, 6, 5), np.float32)) for i in range(3)
    ]
    with pytest.raises(CalibrationError, match="losses of another model"):
        GatedGraph(other, samples, tmp_path / "b").score(Workers(), log=log)


@pytest.mark.parametrize("text", ["what\n", "[1]\n", "{}\n{}\n"])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    log = tmp_path / "losses"
    log.write_text(text)
    with pytest.raises(CalibrationError, match="name another file"):
        graph(tmp_path).score(Workers(), log=log)


def test_a_loss_in_the_file_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    gated, log = graph(tmp_path), tmp_path / "losses"
    gated.score(Workers(), log=log)
    *lines, last = log.read_text().splitlines()
    log.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"loss": "nan"})]) + "\n")
    with pytest.raises(CalibrationError, match="a loss that is not finite"):
        gated.score(Workers(), log=log)


def test_a_folder_in_the_place_of_the_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        kept_losses(tmp_path, "")
    with pytest.raises(InputError, match="cannot be read"):
        graph(tmp_path / "a").score(Workers(), log=tmp_path)


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    gated = graph(tmp_path)
    gated.samples[1]["state"][:] = np.nan
    with pytest.raises(CalibrationError, match=r"without blocks\.0 is not finite at sample 1"):
        gated.score(Workers())


# ---- several processes, several machines ----


@pytest.mark.parametrize(("processes", "threads"), [(0, 1), (-1, 1), (1, -1), (1, 100_000)])
def test_workers_that_cannot_be_are_refused(processes: int, threads: int) -> None:
    with pytest.raises(InputError, match="1 process or more"):
        Workers(processes, threads)


def test_several_processes_give_the_same_bits(tmp_path: Path) -> None:
    gated = graph(tmp_path)
    assert gated.score(Workers(processes=2)) == gated.score(Workers())


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), 9)", "one of 2 processes that score was killed, .*: give fewer of them"),
        ("os._exit(3)", "one of 2 processes that score ended with exit code 3"),
    ],
)
def test_a_process_that_ends_is_said_and_ends_the_others(
    end: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = graph(tmp_path)
    (tmp_path / "ending.py").write_text(
        f"import os\nfrom trimtab.calibration import workers\ndef end(task):\n    {end}\n"
        "def main():\n    workers._losses = end\n    workers.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    started: list[Child] = []

    def start(own: str) -> Child:
        started.append(Child("ending" if not started else own))
        return started[-1]

    monkeypatch.setattr(workers, "Child", start)
    with pytest.raises(CalibrationError, match=message):
        gated.score(Workers(processes=2))
    assert len(started) == 2 and all(child._process.poll() is not None for child in started)


def test_a_process_that_cannot_open_the_graph_says_why(tmp_path: Path) -> None:
    gated = graph(tmp_path)
    gated.path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime"):
        gated.score(Workers(processes=2))


def test_who_needs_no_more_losses_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, started = graph(tmp_path), []
    monkeypatch.setattr(workers, "Child", lambda name: started.append(Child(name)) or started[-1])
    jobs = [(number, (name,)) for number in range(3) for name in gated.candidates]
    found = Workers(processes=2).losses(gated.path, list(gated.candidates), gated.samples, jobs)
    next(found)
    assert all(child._process.poll() is None for child in started)
    found.close()  # type: ignore[attr-defined]
    assert len(started) == 2 and all(child._process.poll() is not None for child in started)


@pytest.mark.slow
def test_ray_gives_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'trimtab[ray]'")
    gated = graph(tmp_path)
    assert gated.score(Workers(processes=2, ray="local")) == gated.score(Workers())


class FakeRay(ModuleType):
    """Ray's machines, of so many cores each, in this process."""

    def __init__(self, cores: Sequence[int], *, up: bool = False) -> None:
        super().__init__("ray")
        self.cores, self.up = cores, up
        self.cpus, self.alive = 0, 0
        self.put = self.get = lambda value: value
        self.util = SimpleNamespace(ActorPool=self._pool)

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **_: object) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def nodes(self) -> list[dict[str, object]]:
        dead = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [dead, *({"Alive": True, "Resources": {"CPU": float(n)} if n else {}} for n in self.cores)]

    def remote(self, num_cpus: int) -> Callable[[type], object]:
        self.cpus = num_cpus
        return lambda kind: SimpleNamespace(remote=lambda *given: self._actor(kind(*given)))

    def kill(self, actor: object) -> None:
        self.alive -= 1

    def _actor(self, worker: Any) -> object:
        self.alive += 1
        return SimpleNamespace(work=SimpleNamespace(remote=worker.work))

    def _pool(self, actors: Sequence[Any]) -> object:
        room = sum(n // self.cpus for n in self.cores)
        assert 0 < len(actors) <= room, "some wait for ever"
        self.used = len(actors)
        return SimpleNamespace(map_unordered=lambda do, tasks: (do(actors[0], task) for task in tasks))


@pytest.mark.parametrize("up", [False, True])
def test_ray_is_shut_down_by_who_started_it(
    up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay([2], up=up)
    monkeypatch.setitem(sys.modules, "ray", ray)
    gated = graph(tmp_path)
    assert gated.score(Workers(processes=2, ray="local")) == gated.score(Workers())
    assert ray.up is up and ray.alive == 0 and ray.used == 2


def test_rays_machines_are_sent_the_graph_s_own_weights_and_keep_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills its workers, which then clean nothing up."""
    ray, sent = FakeRay([2]), []
    ray.put = lambda value: sent.append(len(value)) or value
    ray.kill = lambda actor: killed.append(actor)
    killed: list[object] = []  # and so kept alive
    monkeypatch.setitem(sys.modules, "ray", ray)
    gated = graph(tmp_path, (64, 80, 96))  # too large for the graph's own file
    (gated.path.parent / "another.weights").write_bytes(b"a text encoder, say")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    gated.score(Workers(processes=2, ray="local"))
    assert len(killed) == 2 and not list((tmp_path / "temporary").iterdir())
    assert sent == [
        (gated.path.parent / name).stat().st_size for name in (gated.path.name, "denoiser.gated.weights")
    ]


@pytest.mark.parametrize(
    ("cores", "threads", "cpus", "used"),
    [
        ([4, 0, 8, 8], 0, 8, 2),  # a machine for each
        ([4, 0, 8], 3, 3, 3),
        ([2], 1, 1, 2),
    ],
)
def test_rays_processes_are_as_many_as_find_room(
    cores: list[int], threads: int, cpus: int, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(cores)
    monkeypatch.setitem(sys.modules, "ray", ray)
    graph(tmp_path, count=4).score(Workers(processes=4, threads=threads, ray="auto"))
    assert (ray.cpus, ray.used) == (cpus, used)


@pytest.mark.parametrize(("cores", "threads"), [([2, 4], 5), ([], 0)])
def test_ray_without_a_machine_that_is_large_enough_is_refused(
    cores: list[int], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(cores)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(CalibrationError, match=r"largest machine has \d CPUs and a process shall have"):
        graph(tmp_path).score(Workers(processes=2, threads=threads, ray="auto"))
    assert not ray.up


def test_ray_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match="ray"):
        graph(tmp_path).score(Workers(ray="local"))
