"""TensorRT's builder against a module that notes what it is asked: it is not to be had without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from engines import Fake
from graphs import single

from trimtab.errors import BuildFailed, MissingDependency, UnsupportedOp
from trimtab.targets.base import BuildOptions
from trimtab.targets.cache import EngineCache
from trimtab.targets.device import find_device
from trimtab.targets.engines import build_options, obtain
from trimtab.targets.tensorrt import TensorRTBuilder

ORIN, THOR = find_device("orin-nano-8gb"), find_device("agx-thor")
OPTIONS = BuildOptions(shapes={"x": (1, 4)})
GRAPH = single("Gelu", {"x": (1, 4)}, (1, 4))


def build(
    folder: Path,
    options: BuildOptions = OPTIONS,
    builder: TensorRTBuilder | None = None,
    graph: ir.Model = GRAPH,
) -> Any:
    builder = builder or TensorRTBuilder()
    (folder / "out").mkdir(exist_ok=True)
    return builder.build(
        builder.lower(graph, ORIN), ORIN, options, folder / "out" / "engine", lambda text: None
    )


def test_it_builds_strongly_typed_with_a_capped_workspace(fake: Fake, tmp_path: Path) -> None:
    calls = fake()
    info = build(tmp_path, build_options(ORIN, {"x": (1, 4)}, "fp32"))
    assert (tmp_path / "out" / "engine").read_bytes() == b"an engine"
    assert (info.bytes, info.backend, info.backend_version) == (9, "tensorrt", "10.3.0.30")
    assert info.activation_bytes == 4096
    assert calls() == [
        ["init_libnvinfer_plugins", ""],
        ["create_network", 2],
        ["parse_from_file", ["graph.onnx"]],
        ["set_memory_pool_limit", "WORKSPACE", 2 * 2**30],
        ["build", 3, -1],
    ]


def test_from_version_11_on_there_is_no_flag_and_all_is_strongly_typed(fake: Fake, tmp_path: Path) -> None:
    calls = fake(version="11.4.0.1", strongly_typed_only=True)
    assert build(tmp_path).backend_version == "11.4.0.1"
    assert ["create_network", 0] in calls()


def test_options_and_plugins_reach_it(fake: Fake, tmp_path: Path) -> None:
    calls = fake()
    library = tmp_path / "libours.so"
    library.write_bytes(b"")
    build(tmp_path, BuildOptions(optimization_level=4, extra={"max_aux_streams": 2}, plugins=(library,)))
    assert ["build", 4, 2] in calls() and ["load_library", str(library)] in calls()


def with_plugins() -> ir.Model:
    """A graph whose weights trimtab's plugins decode."""
    graph = single("TrimtabVQMatMul1", {"x": (1, 4)}, (1, 4))
    graph.graph.node(0).domain = "trimtab"
    return graph


def test_packed_weights_need_a_tensorrt_that_carries_kernels_or_the_library(
    fake: Fake, tmp_path: Path
) -> None:
    calls = fake()
    with pytest.raises(BuildFailed, match=r"10\.3\.0\.30 has no plugins that carry their kernels"):
        build(tmp_path, graph=with_plugins())
    assert not any(call[0] == "parse_from_file" for call in calls())
    library = tmp_path / "libtrimtab_vq.so"
    library.write_bytes(b"")
    build(tmp_path, BuildOptions(plugins=(library,)), graph=with_plugins())
    assert ["load_library", str(library)] in calls() and ["create_network", 2] in calls()


def test_from_10_9_on_plugins_that_carry_their_kernels_are_registered_before_the_graph_is_parsed(
    fake: Fake, tmp_path: Path
) -> None:
    calls = fake(version="10.13.3.9")
    build(tmp_path, graph=with_plugins())
    assert [call for call in calls() if call[0] != "init_libnvinfer_plugins"][:4] == [
        ["register", "trimtab::TrimtabVQMatMul1"],
        ["register", "trimtab::TrimtabVQDecode1"],
        ["create_network", 2 | 8],  # strongly typed, with ahead-of-time plugins preferred
        ["parse_from_file", ["graph.onnx"]],
    ]


def test_a_library_that_tensorrt_does_not_take_ends_the_build(fake: Fake, tmp_path: Path) -> None:
    calls = fake()
    library = tmp_path / "strange.so"
    library.write_bytes(b"")
    with pytest.raises(BuildFailed, match=r"did not take the plugin library .*strange\.so"):
        build(tmp_path, BuildOptions(plugins=(library,)), graph=with_plugins())
    assert not any(call[0] == "parse_from_file" for call in calls())


def test_when_memory_runs_out_it_tries_with_less(
    fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = fake("memory", "killed", "engine")
    assert build(tmp_path).bytes == 9
    assert [call[1] for call in calls() if call[0] == "build"] == [3, 1, 0]
    assert "ran out of memory at optimization level 3" in caplog.text
    assert "at optimization level 1 (it was killed" in caplog.text


@pytest.mark.parametrize(
    ("ending", "said", "tries"),
    [
        ("memory", r"\(.*OutOfMemory.*\): close other programs", 3),
        ("killed", "it was killed, as the system does when memory runs out", 3),
        ("none", r"\(could not find any implementation\): see", 1),
        ("abort", "was ended by SIGABRT after saying \"terminate called .*'Trouble'\"", 1),
        ("error", "RuntimeError: what now", 1),
    ],
)
def test_a_build_that_fails_is_one_line_and_leaves_nothing(
    fake: Fake, tmp_path: Path, ending: str, said: str, tries: int
) -> None:
    calls = fake(ending)
    with pytest.raises(BuildFailed, match=said) as error:
        build(tmp_path)
    assert "\n" not in str(error.value) and "tensorrt 10.3.0.30 built no engine for orin-nano-8gb" in str(
        error.value
    )
    assert sum(call[0] == "build" for call in calls()) == tries
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_does_not_take_the_engine_is_said_and_a_cache_on_it_left_out(
    fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake("full", "full", "engine")
    with pytest.raises(
        BuildFailed, match=r"cannot be written to .*out \(No space left on device\): make room there"
    ):
        build(tmp_path)
    out = tmp_path / "out" / "engine"
    cache = EngineCache(tmp_path / "cache")
    obtain(cache, GRAPH, ORIN, OPTIONS, TensorRTBuilder(), out, lambda text: None)
    assert out.read_bytes() == b"an engine" and "the engine is built without the cache" in caplog.text
    assert not list((tmp_path / "cache" / "entries").iterdir())


def test_an_operator_that_it_does_not_know_is_found_before_it_parses(fake: Fake, tmp_path: Path) -> None:
    calls = fake(unknown=["Erf"])
    with pytest.raises(UnsupportedOp, match=r"tensorrt 10\.3\.0\.30 has no Erf"):
        build(tmp_path)
    assert not any(call[0] == "parse_from_file" for call in calls())


def test_who_stops_waiting_ends_the_build(fake: Fake, tmp_path: Path) -> None:
    fake("hang")
    pid = tmp_path / "site" / "pid"

    def interrupt(text: str) -> None:
        if pid.exists() and pid.read_text():  # a file is there before what is written to it
            raise KeyboardInterrupt

    builder = TensorRTBuilder()
    with pytest.raises(KeyboardInterrupt):
        builder.build(builder.lower(GRAPH, ORIN), ORIN, OPTIONS, tmp_path / "engine", interrupt)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_timings_are_kept_between_builds(fake: Fake, tmp_path: Path) -> None:
    calls = fake()
    cache = EngineCache(tmp_path / "cache")
    for _ in range(2):
        build(tmp_path, builder=TensorRTBuilder(cache.timing_cache))
    assert [call for call in calls() if call[0] == "set_timing_cache"] == [
        ["set_timing_cache", "", False],
        ["set_timing_cache", "timed;", False],
    ]
    assert (tmp_path / "cache/timing/sm87-10.3.0.30.cache").read_bytes() == b"timed;timed;"


def test_the_key_tells_devices_and_versions_apart(fake: Fake, tmp_path: Path) -> None:
    fake()
    builder, sources = TensorRTBuilder(), []
    cache = EngineCache(tmp_path / "cache")
    for device in (ORIN, find_device("orin-nx-8gb"), ORIN):
        with cache.get_or_build(GRAPH, device, OPTIONS, builder) as entry:
            sources.append(entry.source)
            assert entry.key.backend_version.startswith("10.3.0.30 ")
    assert sources == ["built", "built", "local"]


def test_while_it_builds_a_clock_goes(fake: Fake, tmp_path: Path) -> None:
    fake("hang")
    said: list[str] = []
    cache = EngineCache(tmp_path / "cache")

    def tell(text: str) -> None:
        said.append(text)
        if len(said) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(GRAPH, ORIN, OPTIONS, TensorRTBuilder(), progress=tell)
    assert {text.rpartition(", ")[0] for text in said[1:]} == {"orin-nano-8gb: Timing tactics"}
    times = [text.rpartition(", 0:")[2] for text in said[1:]]
    assert times == sorted(times) and int(times[-1]) >= 2


def test_a_workstation_lowers_for_a_jetson_without_tensorrt(tmp_path: Path) -> None:
    assert "tensorrt" not in sys.modules
    assert {node.op_type for node in TensorRTBuilder().lower(GRAPH, ORIN).graph} == {"Mul", "Erf", "Add"}
    assert TensorRTBuilder().parser(THOR).version == (10, 13)
    with pytest.raises(MissingDependency, match=r"pip install 'trimtab\[tensorrt\]'"):
        build(tmp_path)
