"""The variables of a sandbox's processes: what the image and the user may say, and what only the claim decides.

Pure. Must not know what the variables mean to anyone but a GPU vendor's runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Read by the GPU vendors' container runtimes and libraries to choose devices. An image or a user that sets them would
# see other devices than those claimed, or none of them. NVIDIA's: https://docs.nvidia.com/datacenter/cloud-native
# (container toolkit, "Environment variables"); AMD's: https://rocm.docs.amd.com (GPU isolation techniques).
GPU_VARIABLES = frozenset(
    {
        "AMD_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "HIP_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_MIG_CONFIG_DEVICES",
        "NVIDIA_MIG_MONITOR_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
    }
)


def variables(
    image: Iterable[str], wanted: Mapping[str, str | None], devices: Iterable[str] = ()
) -> dict[str, str | None]:
    """Additions and overrides over the image's variables; None removes one.

    image and devices (of the CDI edits): `NAME=value`. NVIDIA's runtime gives all GPUs to an image that says so, hence
    `void` is said aloud.
    """
    result: dict[str, str | None] = {name: None for name in _names(image) if name in GPU_VARIABLES}
    result |= {name: value for name, value in wanted.items() if name not in GPU_VARIABLES}
    result |= {name: value for name, _, value in (pair.partition("=") for pair in devices)}
    return result | {"NVIDIA_VISIBLE_DEVICES": "void"}


def _names(pairs: Iterable[str]) -> Iterable[str]:
    return (pair.partition("=")[0] for pair in pairs)
