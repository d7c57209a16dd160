"""TensorRT for RTX: engines for GeForce RTX and RTX PRO, built on any CPU ahead of time."""

from __future__ import annotations

from trimtab.errors import TargetError
from trimtab.targets.device import Device
from trimtab.targets.network import NetworkBuilder
from trimtab.targets.operators import RTX, Parser

COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What the builder's `ComputeCapability` names, in 1.7:
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix-1/1.5.html"""


class TensorRTRTXBuilder(NetworkBuilder):
    """Builds for one compute capability. The GPU's own kernels are made from the engine when it is first loaded.

    It is not asked for a timing cache: with one it would want a GPU.
    """

    backend = "tensorrt_rtx"

    @property
    def device_fields(self) -> tuple[str, ...]:
        """One engine serves all devices of a compute capability: nothing else is told to the builder."""
        return ("sm",)

    def parser(self, device: Device) -> Parser:
        return RTX

    def compute_capability(self, device: Device) -> str:
        """The device's.

        Raises:
            TargetError: The builder has none for it.
        """
        if device.sm not in COMPUTE_CAPABILITIES:
            raise TargetError(
                f"{device.name} has compute capability {device.sm}, and TensorRT for RTX builds for "
                f"{', '.join(COMPUTE_CAPABILITIES)}: choose another device, or another backend for it"
            )
        return device.sm
