"""Many evaluations of one gated graph: here, in several processes, or on several machines through Ray.

Each job is one sample and one set of removals; its loss has the same bits wherever it is computed, on machines of
one kind.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.calibration.gates import Array, GatedDenoiser
from trimtab.child import Child, NoAnswer, serve
from trimtab.errors import CalibrationError, InputError, MissingDependency, first_line
from trimtab.runtime.engines import MAX_THREADS
from trimtab.weights import external_tensors, load_model

logger = logging.getLogger(__name__)

Job = tuple[int, tuple[str, ...]]
"""A sample's number, and the names of what is removed."""

CHUNK = 16
"""Jobs that a worker is handed at a time. Each chunk evaluates the whole model once more: a cost of one in 16."""


@dataclass(frozen=True)
class Workers:
    """Where evaluations run.

    Attributes:
        processes: How many, here or in all on Ray's machines.
        threads: CPU threads of each; 0 for one a core, and on Ray a machine for each process. The bits of a result
            may depend on it.
        ray: Address of a Ray cluster ("auto" for the one at hand, "local" for one made for the purpose); None
            for this machine without Ray. Where the caller is in a cluster already, it is that one, and stays up.

    Raises:
        InputError: No such number of processes or threads.
    """

    processes: int = 1
    threads: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.processes < 1 or not 0 <= self.threads <= MAX_THREADS:
            raise InputError(
                f"{self.processes} processes of {self.threads} threads were asked for: give 1 process or more, and 0 "
                f"threads for one a core, or up to {MAX_THREADS}"
            )

    def losses(
        self, graph: Path, names: Sequence[str], samples: Sequence[Mapping[str, Array]], jobs: Sequence[Job]
    ) -> Iterator[tuple[Job, float]]:
        """Losses of all jobs, in whatever order they are done.

        Args:
            graph: A gated graph; its weights lie beside it.
            names: Of the candidates, in the order of the gates.
            samples: Inputs, by sample.
            jobs: What to compute.
        """
        chunks = list(_chunks(jobs))
        tasks = [(samples[number], [removed for _, removed in chunk]) for number, chunk in chunks]
        if self.ray is not None:
            results = _on_ray(self, graph, names, tasks)
        elif self.processes > 1 and len(tasks) > 1:
            results = _in_processes(self, graph, names, tasks)
        else:
            denoiser = GatedDenoiser(graph, names, self.threads)
            results = ((i, denoiser.losses(*task)) for i, task in enumerate(tasks))
        for index, losses in results:
            yield from zip(chunks[index][1], losses, strict=True)


_Task = tuple[Mapping[str, Array], list[tuple[str, ...]]]


def _chunks(jobs: Sequence[Job]) -> Iterator[tuple[int, list[Job]]]:
    by_sample: dict[int, list[Job]] = {}
    for job in jobs:
        by_sample.setdefault(job[0], []).append(job)
    for number, members in by_sample.items():
        for start in range(0, len(members), CHUNK):
            yield number, members[start : start + CHUNK]


# ---- processes ----


def main() -> None:
    """A process that answers each sample and its removals with their losses."""
    serve(_losses)


_opened = functools.lru_cache(maxsize=1)(GatedDenoiser)


def _losses(task: dict[str, Any]) -> list[float]:
    denoiser = _opened(Path(task["graph"]), tuple(task["names"]), task["threads"])
    with np.load(task["sample"]) as inputs:
        return denoiser.losses(dict(inputs), task["removed"])


def _in_processes(
    workers: Workers, graph: Path, names: Sequence[str], tasks: Sequence[_Task]
) -> Iterator[tuple[int, list[float]]]:
    count = min(workers.processes, len(tasks))
    common = {"graph": str(graph.resolve()), "names": list(names), "threads": workers.threads}
    waiting = iter(enumerate(tasks))
    busy: dict[Future[list[float]], tuple[int, Child, str]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-"))
        # Each thread waits for an answer, or for its child's end.
        threads = stack.enter_context(ThreadPoolExecutor(count))

        def ask(child: Child, file: str, task: _Task) -> Any:
            sample: dict[str, Any] = dict(task[0])
            np.savez(file, **sample)
            return child.ask({**common, "sample": file, "removed": task[1]})

        def go_on(child: Child, file: str) -> None:
            for index, task in itertools.islice(waiting, 1):
                busy[threads.submit(ask, child, file, task)] = index, child, file

        for number in range(count):
            go_on(stack.enter_context(Child(__name__)), f"{folder}/{number}.npz")
        try:
            while busy:
                for done in wait(busy, return_when=FIRST_COMPLETED).done:
                    index, child, file = busy.pop(done)
                    losses = done.result()
                    go_on(child, file)
                    yield index, losses
        except NoAnswer as error:
            raise CalibrationError(
                error.line(f"one of {count} processes that score", "give fewer of them, or make room")
            ) from error


# ---- Ray ----


def _on_ray(
    workers: Workers, graph: Path, names: Sequence[str], tasks: Sequence[_Task]
) -> Iterator[tuple[int, list[float]]]:
    try:
        import ray
    except ImportError as error:
        raise MissingDependency("ray", "ray") from error
    address = None if workers.ray == "local" else workers.ray
    ours = not ray.is_initialized()  # else it is the caller's, and stays up
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ray's errors share no base
        raise CalibrationError(
            f"Ray cannot be reached at {workers.ray} ({first_line(error)}): start it there"
        ) from error
    actors = []
    try:
        cpus, room = _room(ray, workers.threads)
        count = min(workers.processes, len(tasks), room)
        if room < workers.processes:
            logger.warning("Ray's machines have room for %d of %d processes", room, workers.processes)
        # No shared disk is asked for: graph and weights travel, once a machine.
        files = {path.name: ray.put(path.read_bytes()) for path in _files(graph)}
        actor = ray.remote(num_cpus=cpus)(_Remote)
        for _ in range(count):
            actors.append(actor.remote(graph.name, files, list(names), workers.threads))
        pool = ray.util.ActorPool(actors)
        yield from pool.map_unordered(lambda a, task: a.work.remote(task), list(enumerate(tasks)))
    finally:
        for each in actors:
            ray.kill(each)
        if ours:
            ray.shutdown()


def _room(ray: Any, threads: int) -> tuple[int, int]:
    """CPUs that one process takes, a whole machine's for 0 threads, and how many such find room at once.

    One more would wait for ever, with its first task.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    largest = max(cores, default=0)
    cpus = max(threads or largest, 1)
    if cpus > largest:
        raise CalibrationError(
            f"Ray's largest machine has {largest} CPUs and a process shall have {cpus}: give fewer threads, or start "
            "a larger one"
        )
    return cpus, sum(count // cpus for count in cores)


def _files(graph: Path) -> list[Path]:
    """The graph and the files that hold its weights, of all that lie beside it."""
    names = {str(tensor.location) for tensor in external_tensors(load_model(graph))}
    return [graph, *(graph.parent / name for name in sorted(names))]


class _Remote:
    """A worker of a Ray cluster, with copies of the files."""

    def __init__(self, graph: str, files: Mapping[str, Any], names: Sequence[str], threads: int) -> None:
        import ray

        # An actor is killed, and cleans nothing up: the files go as soon as they are loaded.
        with tempfile.TemporaryDirectory(prefix="trimtab-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            for file, reference in files.items():
                (folder / file).write_bytes(ray.get(reference))
            self._denoiser = GatedDenoiser(folder / graph, names, threads)

    def work(self, numbered: tuple[int, _Task]) -> tuple[int, list[float]]:
        index, task = numbered
        return index, self._denoiser.losses(*task)
