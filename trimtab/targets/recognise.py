"""Which known device this machine is, from what it says of itself: pure parsers, and one function that looks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trimtab.targets.device import Device
from trimtab.targets.machine import MEMINFO, meminfo_bytes, read_text, run_text

DEVICE_TREE = Path("/proc/device-tree")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader")

LEAST_VISIBLE, MOST_VISIBLE = 0.7, 1.02
"""The part of the installed memory that a system reports. An Orin Nano of 8 GB under JetPack 5 shows 6.3 GiB,
0.79; a GPU with ECC 0.94; the nearest sizes of one model are 8 and 12 GB, 0.67."""


def recognise(devices: Mapping[str, Device]) -> Device | None:
    """The device at hand, or None where it is none of the known ones. Never fails.

    A Jetson is known by its device tree and its memory, any other GPU by nvidia-smi, where that is installed; of
    several GPUs it is the first that is known.

    Args:
        devices: By name.
    """
    if model := read_text(DEVICE_TREE / "model"):
        compatible = read_text(DEVICE_TREE / "compatible")
        jetson = match_jetson(model, compatible, meminfo_bytes(read_text(MEMINFO), "MemTotal"), devices)
        if jetson is not None:
            return jetson
    return match_gpu(run_text(NVIDIA_SMI), devices)


def match_jetson(
    model: str, compatible: str, memory_bytes: int | None, devices: Mapping[str, Device]
) -> Device | None:
    """A Jetson by its device tree.

    Its module's part number decides. On a board whose maker left it out, the words of the model and the memory do.

    Args:
        model: /proc/device-tree/model, such as "NVIDIA Jetson Orin Nano Developer Kit".
        compatible: /proc/device-tree/compatible: strings that end with NUL, such as
            "nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234".
        memory_bytes: MemTotal in bytes; None if unknown.
        devices: By name.
    """
    jetsons = [device for device in devices.values() if device.backend == "tensorrt"]
    parts = set(re.findall(r"p\d{4}-\d{4}", compatible))
    for device in jetsons:
        if parts & set(device.identities):
            return device
    if memory_bytes is None:
        return None
    words = _words(model)
    for device in jetsons:
        named = any(f" {_words(identity)} " in f" {words} " for identity in device.identities)
        if named and _fits(memory_bytes, device):
            return device
    return None


def match_gpu(answer: str, devices: Mapping[str, Device]) -> Device | None:
    """A GPU by what nvidia-smi prints, such as "NVIDIA GeForce RTX 4090, 8.9, 24564 MiB".

    The whole name must fit: a "Laptop GPU", a "Ti" and a "SUPER" are other chips. So must the memory (an RTX 3060
    has 8 or 12 GB), unless it reads "[N/A]", as where the CPU shares it.

    Args:
        answer: Its output, a line for each GPU.
        devices: By name.
    """
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3:
            continue
        name, sm, memory = fields
        for device in devices.values():
            if name in device.identities and sm == device.sm:
                mib = re.fullmatch(r"(\d+) MiB", memory)
                if mib is None or _fits(int(mib[1]) * 2**20, device):
                    return device
    return None


def _fits(visible_bytes: int, device: Device) -> bool:
    installed = device.memory_bytes
    return installed is None or LEAST_VISIBLE <= visible_bytes / installed <= MOST_VISIBLE


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
