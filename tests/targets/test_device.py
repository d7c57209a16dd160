"""The device table: complete, plausible and sourced; a user's own devices; and which device is at hand."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli import main
from trimtab.errors import InputError
from trimtab.manifest import BACKENDS
from trimtab.targets import recognise as recognise_module
from trimtab.targets.device import PRECISIONS, Device, JetPack, find_device, known_devices
from trimtab.targets.recognise import match_gpu, match_jetson, recognise

GIB = 2**30

NAMES = [
    "cpu",
    "orin-nano-4gb",
    "orin-nano-8gb",
    "orin-nx-8gb",
    "orin-nx-16gb",
    "agx-orin-32gb",
    "agx-orin-64gb",
    "agx-thor",
    "t4000",
    "rtx-3060",
    "rtx-3090",
    "rtx-4060",
    "rtx-4070",
    "rtx-4090",
    "rtx-5060",
    "rtx-5070",
    "rtx-5080",
    "rtx-5090",
    "rtx-pro-6000",
    "dgx-spark",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without devices in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setattr(Path, "home", lambda: folder)
    return folder


@pytest.fixture
def table() -> dict[str, Device]:
    return known_devices()


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], Path]:
    """Text -> a file of it."""

    def write(text: str) -> Path:
        path = tmp_path / "own.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def gpus() -> list[Device]:
    return [device for device in known_devices().values() if device.name != "cpu"]


each_gpu = pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.name)


# ---- the table ----


def test_the_table_has_the_devices_that_the_documents_promise(table: dict[str, Device]) -> None:
    assert list(table) == NAMES
    assert table["cpu"].backend == "onnxruntime"


@pytest.mark.parametrize("name", NAMES)
def test_every_row_says_where_its_numbers_are_from(name: str, table: dict[str, Device]) -> None:
    assert table[name].source
    for source in table[name].source:
        title, _, address = source.partition(" <")
        assert title and address.startswith("https://") and address.endswith(">"), source


@each_gpu
def test_every_gpu_row_is_complete(gpu: Device) -> None:
    jetson = gpu.backend == "tensorrt"
    may_lack = {"fp8_tflops"} if "fp8" not in gpu.precisions else set()
    may_lack |= set() if jetson else {"power_mode", "jetpacks"}
    for field, value in vars(gpu).items():
        assert value not in (None, ()) or field in may_lack | {"unverified"}, field
    assert gpu.backend == ("tensorrt" if jetson else "tensorrt_rtx")
    assert jetson == bool(gpu.jetpacks)


@each_gpu
def test_peaks_are_plausible_and_dense(gpu: Device) -> None:
    assert gpu.fp32_tflops and gpu.fp16_tflops and gpu.fp16_fast_tflops and gpu.int8_tops
    assert 3.9 <= gpu.fp16_fast_tflops / gpu.fp32_tflops <= 33
    assert 0.99 <= gpu.fp16_fast_tflops / gpu.fp16_tflops <= 2.1, "FP16 accumulation is once or twice as fast"
    assert 1.9 <= gpu.int8_tops / gpu.fp16_fast_tflops <= 2.1, (
        "INT8 is twice as fast, and four times if sparse"
    )
    if gpu.fp8_tflops:
        assert 1.9 <= gpu.fp8_tflops / gpu.fp16_tflops <= 2.1


RATES = {  # FLOP per SM and clock: FP16 with FP32 and with FP16 accumulation, INT8; from the head of devices.toml
    "GeForce": (512, 1024, 2048),
    "RTX PRO": (1024, 1024, 2048),
    "DGX": (1024, 1024, 2048),
    "Orin": (2048, 2048, 4096),
    "Thor": (8192, 8192, 16384),
    "T4000": (8192, 8192, 16384),
}


@each_gpu
def test_peaks_are_those_of_the_cores_and_the_clock(gpu: Device) -> None:
    rates = next(rates for word, rates in RATES.items() if word in gpu.title)
    assert gpu.sm_count and gpu.clock_mhz
    clocks = gpu.sm_count * gpu.clock_mhz * 1e-6  # 1e12 SM clocks per second
    peaks = [gpu.fp32_tflops, gpu.fp16_tflops, gpu.fp16_fast_tflops, gpu.int8_tops]
    assert peaks == pytest.approx([clocks * rate for rate in (256, *rates)], rel=0.02)


@each_gpu
def test_memory_and_precisions_go_with_the_architecture(gpu: Device) -> None:
    assert gpu.sm and gpu.memory_bytes and gpu.bandwidth_gb_s
    assert gpu.memory_bytes % GIB == 0 and 4 <= gpu.memory_bytes // GIB <= 128
    assert 50 <= gpu.bandwidth_gb_s <= 1800
    capability = tuple(map(int, gpu.sm.split(".")))
    assert set(gpu.precisions) <= set(PRECISIONS)
    assert ("fp8" in gpu.precisions) == (capability >= (8, 9))
    assert ("fp4" in gpu.precisions) == (capability >= (10, 0))
    assert gpu.shared_memory == (gpu.backend == "tensorrt" or gpu.name == "dgx-spark")


def test_jetpacks_match_what_each_jetson_can_install(table: dict[str, Device]) -> None:
    versions = {name: [jetpack.version for jetpack in table[name].jetpacks] for name in NAMES}
    assert all(versions[name] == ["6.2", "7.2"] for name in NAMES if "orin" in name)
    assert versions["agx-thor"] == ["7.0", "7.1", "7.2"] and versions["t4000"] == ["7.1", "7.2"]
    assert table["orin-nano-8gb"].jetpacks[0] == JetPack("6.2", tensorrt="10.3", cuda="12.6")
    assert all(jetpack.tensorrt.startswith("10.") for d in table.values() for jetpack in d.jetpacks)


def test_what_is_unverified_is_named_and_little(table: dict[str, Device]) -> None:
    named = {name: set(device.unverified) for name, device in table.items() if device.unverified}
    assert set(named) == {"orin-nano-4gb", "t4000", "dgx-spark"}


def test_every_identity_leads_to_one_device(table: dict[str, Device]) -> None:
    exact = [i for d in table.values() for i in d.identities if i[0] == "p" or i.startswith("NVIDIA")]
    assert len(exact) == len(set(exact))


# ---- devices of one's own ----

BOARD = """
[my-board]
title = "A board of ours"
backend = "tensorrt"
sm = "8.7"
memory_bytes = 17_179_869_184
bandwidth_gb_s = 102
fp32_tflops = 2.4
fp16_tflops = 19.2
precisions = ["fp32", "fp16"]
"""


def test_a_file_adds_devices_and_overrides_single_fields(own: Callable[[str], Path]) -> None:
    path = own(BOARD + "\n[orin-nano-8gb]\npower_mode = '15W'\nfp16_tflops = 10\nclock_mhz = 625\n")
    devices = known_devices(path)
    assert list(devices) == [*NAMES, "my-board"]
    assert devices["my-board"].memory_bytes == 16 * GIB and devices["my-board"].int8_tops is None
    before, after = known_devices()["orin-nano-8gb"], devices["orin-nano-8gb"]
    changed = {field for field in vars(before) if getattr(before, field) != getattr(after, field)}
    assert changed == {"power_mode", "fp16_tflops", "clock_mhz"}
    assert find_device("my-board", path).title == "A board of ours"


def test_the_file_in_the_home_folder_is_read_and_the_given_one_goes_before_it(
    home: Path, own: Callable[[str], Path]
) -> None:
    folder = home / ".config" / "trimtab"
    folder.mkdir(parents=True)
    (folder / "devices.toml").write_text(BOARD)
    assert known_devices()["my-board"].bandwidth_gb_s == 102
    assert known_devices(own("[my-board]\nbandwidth_gb_s = 90\n"))["my-board"].bandwidth_gb_s == 90


def test_environment_variables_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trimtab").mkdir()
    (tmp_path / "trimtab" / "devices.toml").write_text(BOARD)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert list(known_devices()) == NAMES


def test_without_a_home_folder_the_table_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert list(known_devices()) == NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "cannot be read as TOML"),
        ("bandwidth_gb_s = 3", "outside of a device"),
        ("[rtx-4090]\nbandwith_gb_s = 3", "did you mean bandwidth_gb_s?"),
        ("[rtx-4090]\nname = 'x'", "unknown field 'name'"),
        ("[rtx-4090]\nqqq = 1", "known are title, backend"),
        ("[rtx-4090]\nbandwidth_gb_s = '3'", "a number above 0"),
        ("[rtx-4090]\nbandwidth_gb_s = nan", "a number above 0"),
        ("[rtx-4090]\nbandwidth_gb_s = true", "a number above 0"),
        ("[rtx-4090]\nmemory_bytes = 24.5", "a whole number above 0"),
        ("[rtx-4090]\nmemory_bytes = 0", "a whole number above 0"),
        ("[rtx-4090]\nsm = 8.9", "a text"),
        ("[rtx-4090]\nsm = '89'", 'a compute capability such as "8.7"'),
        ("[rtx-4090]\nbackend = 'tensorflow'", f"one of {', '.join(BACKENDS)}"),
        ("[rtx-4090]\nshared_memory = 1", "true or false"),
        ("[rtx-4090]\nprecisions = 'fp16'", "needs a list"),
        ("[rtx-4090]\nprecisions = []", "some of fp32"),
        ("[rtx-4090]\nprecisions = ['fp17']", "some of fp32"),
        ("[rtx-4090]\nprecisions = [['fp16']]", "a list of texts"),
        ("[rtx-4090]\nprecisions = ['fp16', 'int8']", "fp8 too where fp8_tflops is given"),
        ("[rtx-4090]\nunverified = ['clock']", "did you mean clock_mhz?"),
        ("[orin-nano-8gb]\njetpacks = [{version = '6.2'}]", "version, tensorrt, cuda in each"),
        (
            "[orin-nano-8gb]\njetpacks = [{version = '6', tensorrt = '10.3', cuda = '12.6'}]",
            "is not a version",
        ),
        ("[My_Board]\ntitle = 'x'\nbackend = 'onnxruntime'", "no device name"),
        ("[my-board]\ntitle = 'x'", "has no backend"),
        (
            "[my-board]\ntitle = 'x'\nbackend = 'tensorrt'\nsm = '8.7'",
            "has no memory_bytes and no bandwidth_gb_s",
        ),
    ],
)
def test_a_file_that_cannot_be_used_fails_with_one_line_that_names_it(
    text: str, message: str, own: Callable[[str], Path]
) -> None:
    path = own(text)
    with pytest.raises(InputError) as raised:
        known_devices(path)
    line = str(raised.value)
    assert message in line and str(path) in line and "\n" not in line


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        known_devices(tmp_path / "nothing.toml")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean rtx-4090"):
        find_device("rtx-4900")


def test_the_example_of_the_documentation_can_be_used(own: Callable[[str], Path]) -> None:
    page = Path(__file__).parents[2] / "docs" / "devices.md"
    found = re.search(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    devices = known_devices(own(found[1]))
    assert devices["orin-nano-8gb"].power_mode == "15W" and "rtx-4090-laptop" in devices
    answer = "NVIDIA GeForce RTX 4090 Laptop GPU, 8.9, 16376 MiB"
    assert match_gpu(answer, devices) == devices["rtx-4090-laptop"]


# ---- which one is at hand ----

# Model and compatible of the device tree, MemTotal in kB, and the device that it is. The first three are as devices
# printed them; the rest are made from NVIDIA's part numbers and from what a memory of that size shows.
JETSONS = [
    (
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        7_802_736,
        "orin-nano-8gb",
    ),
    (
        "NVIDIA Jetson AGX Orin Developer Kit\0",
        "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0nvidia,tegra23x\0",
        64_349_396,
        "agx-orin-64gb",
    ),
    (
        "NVIDIA Jetson AGX Thor Developer Kit\0",
        "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
        128_825_804,
        "agx-thor",
    ),
    (
        "NVIDIA Jetson AGX Thor Developer Kit\0",
        "nvidia,p4071-0000+p3834-0000\0nvidia,p3834-0000\0nvidia,tegra264\0",
        64_000_000,
        "t4000",
    ),
    # Without a part number that is known, the words and the memory decide.
    ("NVIDIA Orin NX Developer Kit\0", "nvidia,tegra234\0", 15_900_000, "orin-nx-16gb"),
    ("NVIDIA Orin NX Developer Kit\0", "nvidia,tegra234\0", 7_600_000, "orin-nx-8gb"),
    ("NVIDIA Orin Nano Developer Kit\0", "", 6_600_000, "orin-nano-8gb"),
    ("NVIDIA Jetson Orin Nano 4GB\0", "", 3_400_000, "orin-nano-4gb"),
    ("Jetson AGX Orin\0", "nvidia,p3737-0000+p3701-0000\0nvidia,p3701-0000\0", 31_700_000, "agx-orin-32gb"),
    ("NVIDIA Jetson AGX Thor\0", "nvidia,tegra264\0", 64_000_000, "t4000"),
    (
        "NVIDIA Jetson Xavier NX Developer Kit\0",
        "nvidia,p3509-0000+p3668-0000\0nvidia,tegra194\0",
        7_800_000,
        None,
    ),
    ("NVIDIA Jetson Orin Nano\0", "", 16_000_000, None),
    ("NVIDIA Jetson Orin Nano\0", "", None, None),
    ("Raspberry Pi 5 Model B Rev 1.0\0", "raspberrypi,5-model-b\0brcm,bcm2712\0", 8_000_000, None),
]


@pytest.mark.parametrize(("model", "compatible", "kilobytes", "name"), JETSONS)
def test_jetsons_are_known_by_their_device_tree_and_memory(
    model: str, compatible: str, kilobytes: int | None, name: str | None, table: dict[str, Device]
) -> None:
    found = match_jetson(model, compatible, kilobytes * 1024 if kilobytes else None, table)
    assert (found and found.name) == name


GPUS = [
    ("NVIDIA GeForce RTX 4090, 8.9, 24564 MiB", "rtx-4090"),
    ("NVIDIA GeForce RTX 3060, 8.6, 12288 MiB", "rtx-3060"),
    ("NVIDIA GeForce RTX 5060, 12.0, 8151 MiB", "rtx-5060"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 12.0, 97887 MiB", "rtx-pro-6000"),
    ("NVIDIA GB10, 12.1, [N/A]", "dgx-spark"),
    ("NVIDIA GeForce GTX 1650, 7.5, 4096 MiB\nNVIDIA GeForce RTX 3090, 8.6, 24576 MiB\n", "rtx-3090"),
    ("NVIDIA GeForce RTX 3060, 8.6, 8192 MiB", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU, 8.9, 16376 MiB", None),
    ("NVIDIA GeForce RTX 4060 Ti, 8.9, 16380 MiB", None),
    ("NVIDIA GeForce RTX 4070 SUPER, 8.9, 12282 MiB", None),
    ("NVIDIA GeForce RTX 4090, 12.0, 24564 MiB", None),
    ("NVIDIA H100 80GB HBM3, 9.0, 81559 MiB", None),
    ("No devices were found", None),
    ("Failed to initialize NVML: Driver/library version mismatch", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "name"), GPUS)
def test_gpus_are_known_by_what_nvidia_smi_prints(
    answer: str, name: str | None, table: dict[str, Device]
) -> None:
    found = match_gpu(answer, table)
    assert (found and found.name) == name


class Machine:
    """A machine that is made up: its files, and its nvidia-smi."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = monkeypatch
        monkeypatch.setattr(recognise_module, "DEVICE_TREE", folder)
        monkeypatch.setattr(recognise_module, "MEMINFO", folder / "meminfo")
        self.nvidia_smi(FileNotFoundError("nvidia-smi"))

    def files(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.folder / name).write_text(text)

    def nvidia_smi(self, answer: str | Exception) -> None:
        def run(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
            assert options["timeout"] > 0
            if isinstance(answer, Exception):
                raise answer
            return subprocess.CompletedProcess(command, 0, answer, "")

        self.patch.setattr(subprocess, "run", run)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    folder = tmp_path / "machine"
    folder.mkdir()
    return Machine(folder, monkeypatch)


def test_a_jetson_is_at_hand_before_its_nvidia_smi_is_asked(machine: Machine) -> None:
    model, compatible, kilobytes, name = JETSONS[2]
    machine.files(model=model, compatible=compatible, meminfo=f"MemTotal:  {kilobytes} kB\n")
    machine.nvidia_smi("NVIDIA Thor, 11.0, [N/A]")
    found = recognise(known_devices())
    assert found is not None and found.name == name


def test_a_desktop_gpu_is_at_hand(machine: Machine) -> None:
    machine.nvidia_smi("NVIDIA GeForce RTX 5090, 12.0, 32607 MiB\n")
    found = recognise(known_devices())
    assert found is not None and found.name == "rtx-5090"


def test_a_device_of_ones_own_can_be_at_hand(machine: Machine, own: Callable[[str], Path]) -> None:
    devices = known_devices(own(BOARD + 'identities = ["p9999-0001"]'))
    machine.files(model="Our Board", compatible="us,p9999-0001\0nvidia,tegra234\0")
    assert recognise(devices) == devices["my-board"]


@pytest.mark.parametrize(
    "trouble",
    [
        subprocess.TimeoutExpired("nvidia-smi", 10),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        PermissionError("nvidia-smi"),
    ],
)
def test_recognising_never_fails(machine: Machine, trouble: Exception) -> None:
    assert recognise(known_devices()) is None
    machine.nvidia_smi(trouble)
    assert recognise(known_devices()) is None


# ---- the command line ----


def test_the_table_marks_the_device_at_hand(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.nvidia_smi("NVIDIA GeForce RTX 4090, 8.9, 24564 MiB\n")
    assert main(["devices"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    for title in ("name", "device", "SM", "memory GiB", "bandwidth GB/s", "fp16 TFLOPS", "backend"):
        assert title in header
    assert [row.split()[0] for row in rows] == NAMES
    assert [row.split()[0] for row in rows if "at hand" in row] == ["rtx-4090"]


def test_json_has_every_field(
    machine: Machine, own: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "--devices", str(own(BOARD)), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["at_hand"] is None
    assert [d["name"] for d in result["devices"]] == [*NAMES, "my-board"]
    fields = {field.name for field in dataclasses.fields(Device)}
    assert all(set(d) == fields for d in result["devices"])
    nano = next(d for d in result["devices"] if d["name"] == "orin-nano-8gb")
    assert nano["jetpacks"][0] == {"version": "6.2", "tensorrt": "10.3", "cuda": "12.6"}


def test_a_file_of_devices_that_cannot_be_used_is_one_line(
    own: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices", "--devices", str(own("[rtx-4090]\nbandwith_gb_s = 3"))]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert "did you mean bandwidth_gb_s?" in captured.err


def test_compile_knows_the_devices_of_the_given_file(
    own: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own(BOARD + "\n[our-cpu]\ntitle = 'Ours'\nbackend = 'onnxruntime'\n")
    arguments = [
        "compile",
        str(tmp_path),
        "--devices",
        str(path),
        "-o",
        str(tmp_path / "x.bundle"),
        "--target",
    ]
    assert main([*arguments, "my-bord"]) == 1
    assert "did you mean my-board" in capsys.readouterr().err
    assert main([*arguments, "our-cpu"]) == 1
    assert "model_index.json" in capsys.readouterr().err
