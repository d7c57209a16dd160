"""What is refused before a build on a device, judged on what real machines said of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from null_device import NullCuda

from trimtab.errors import MissingDependency, TargetError, TrimtabError, WrongDevice
from trimtab.runtime.sessions.cuda import Driver
from trimtab.targets.device import find_device
from trimtab.targets.machine import meminfo_bytes
from trimtab.targets.preflight import (
    DPKG,
    JETPACKS,
    Machine,
    jetpack_version,
    l4t_version,
    look,
    preflight,
)

ORIN = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
THOR = "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64\n"
ORIN_7 = "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64\n"
MEMINFO = "MemTotal:        7802100 kB\nMemAvailable:    5123456 kB\nSwapFree: 3900000 kB\n"

GOOD = Machine("Orin", "8.7", "36.4.3", "6.2", "10.3.0", 6 << 30)


def asked(
    release: str, dpkg: str = "", version: str | None = "10.3.0", sm: tuple[int, int] = (8, 7)
) -> Machine:
    texts = {"/etc/nv_tegra_release": release, "/proc/meminfo": MEMINFO}

    def run(command: Sequence[str]) -> str:
        assert tuple(command) == DPKG
        return dpkg

    def installed(name: str) -> str:
        if version is None:
            raise MissingDependency(name, "tensorrt")
        return version

    cuda = NullCuda(sm, memory=8 << 30, integrated=bool(release))
    return look(
        "tensorrt",
        read=lambda path: texts.get(str(path), ""),
        run=run,
        driver=lambda: Driver(cuda),
        version=installed,
    )


def test_an_orin_says_what_it_is() -> None:
    machine = asked(ORIN)
    assert (machine.sm, machine.l4t, machine.jetpack) == ("8.7", "36.4.3", "6.2")
    assert machine.free_bytes == 5123456 * 1024  # with the page cache, which CUDA leaves out
    preflight(find_device("orin-nano-8gb"), machine, needed_bytes=4 << 30)


def test_the_package_knows_better_than_the_release() -> None:
    assert asked(ORIN, dpkg="6.2.1+b38").jetpack == "6.2.1"


@pytest.mark.parametrize(
    ("text", "l4t", "jetpack"),
    [(ORIN, "36.4.3", "6.2"), (THOR, "38.2.2", "7.0"), (ORIN_7, "39.2.1", "7.2.1"), ("", None, None)],
)
def test_jetson_linux_tells_jetpack(text: str, l4t: str | None, jetpack: str | None) -> None:
    assert l4t_version(text) == l4t
    assert l4t is None or jetpack_version("", l4t) == jetpack


def test_an_unknown_release_is_not_guessed() -> None:
    assert jetpack_version("", "40.1.0") is None and jetpack_version("", "36.1.0") is None
    assert all(jetpack_version("", l4t) == jetpack for l4t, jetpack in JETPACKS.items())


def test_memory_is_in_bytes() -> None:
    assert meminfo_bytes(MEMINFO, "MemAvailable") == 5123456 * 1024
    assert meminfo_bytes(MEMINFO, "SwapTotal") is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sm": "11.0", "gpu": "Thor"}, WrongDevice, r"8\.7 and this machine's Thor has 11\.0"),
        ({"l4t": None, "jetpack": None}, WrongDevice, "no /etc/nv_tegra_release"),
        ({"jetpack": None, "l4t": "40.1.0"}, TargetError, r"Jetson Linux 40\.1\.0.*flash JetPack 6\.2"),
        (
            {
                "backend_version": None,
                "trouble": "TensorRT cannot be loaded (libnvinfer.so.10: ...): install it",
            },
            TargetError,
            r"^TensorRT cannot be loaded \(libnvinfer",
        ),
        ({"jetpack": "6.1"}, TargetError, r"has JetPack 6\.1 and orin-nano-8gb needs 6\.2 or 7\.2"),
        (
            {"backend_version": None},
            MissingDependency,
            r"comes with JetPack .*: apt-get install python3-libnvinfer",
        ),
        (
            {"backend_version": "11.2.0"},
            TargetError,
            r"TensorRT 11\.2\.0, which does not run on JetPack 6\.2",
        ),
        ({"backend_version": "8.6.2"}, TargetError, r"TensorRT 8\.6\.2, which does not run.*10\.3"),
        (
            {"backend_version": "10.13.3.9"},
            TargetError,
            r"10\.13\.3\.9 and JetPack 6\.2 has 10\.3: .*system-site",
        ),
        ({"free_bytes": 1 << 30}, TargetError, r"1\.0 GiB of memory are free and 4\.0 GiB .*multi-user"),
    ],
)
def test_what_cannot_end_well_is_refused_with_the_way_out(
    change: dict[str, object], error: type[TrimtabError], words: str
) -> None:
    machine = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    with pytest.raises(error, match=words) as info:
        preflight(find_device("orin-nano-8gb"), machine, needed_bytes=4 << 30)
    assert "\n" not in str(info.value)


def test_a_later_jetpack_brings_its_own_tensorrt() -> None:
    def verdict(jetpack: str, version: str) -> str:
        machine = dataclasses.replace(GOOD, l4t="39.2.1", jetpack=jetpack, backend_version=version)
        try:
            preflight(find_device("orin-nano-8gb"), machine)
        except TargetError as error:
            return str(error)
        return "taken"

    assert verdict("7.2.1", "10.16.0") == "taken"
    assert "TensorRT 10.17.0 and JetPack 7.2.1 has 10.16" in verdict("7.2.1", "10.17.0")
    assert verdict("7.3", "10.17.0") == "taken"  # nobody has listed what it brings
    assert "TensorRT 10.17.0 and JetPack 6.2 has 10.3" in verdict("6.2", "10.17.0")


def test_a_desktop_gpu_needs_no_jetpack() -> None:
    desktop = asked("", version="1.7.1.116", sm=(8, 9))
    assert desktop.jetpack is None and desktop.free_bytes == 8 << 30
    preflight(find_device("rtx-4090"), desktop)
    with pytest.raises(TargetError, match="close other programs"):
        preflight(find_device("rtx-4090"), desktop, needed_bytes=9 << 30)


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="finds no GPU"):
        look("tensorrt", driver=lambda: Driver(NullCuda(devices=0)), version=lambda name: "10.3.0")
