"""Options of an engine, checked before the build."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from scm_sdk.bundle.engine_record import Flavor
from scm_sdk.engines.targets import AHEAD_OF_TIME
from scm_sdk.errors import ConfigError

HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]


class BuilderOptions(TypedDict, total=False):
    """Keywords of ``add_engines`` for the builder; ``EngineOptions`` says what each means."""

    workspace_bytes: int | None
    optimization_level: int | None
    hardware_compatibility: HardwareCompatibility
    version_compatible: bool
    weight_streaming: bool


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine is built.

    Attributes:
        flavor: Which library builds it and will run it.
        compute_capabilities: GPUs it is for; several only ahead of time.
        batch: Smallest, best and largest batch.
        workspace_bytes: Most memory that a kernel may use at run time; None leaves it to the library.
        optimization_level: 0 to 5, build time against speed; None is the library's. No effect on TensorRT-RTX.
        hardware_compatibility: ``none``, ``same_compute_capability`` or ``ampere_plus``; TensorRT alone.
        version_compatible: Whether newer TensorRT may load it; it then holds code of the host. TensorRT alone.
        weight_streaming: Whether weights may stay in host memory.
    """

    flavor: Flavor = msgspec.field(default="tensorrt_rtx", name="flavour")  # as build records spell it
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, int, int]
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        least, best, most = self.batch
        if not 1 <= least <= best <= most:
            raise ConfigError(f"batch is {self.batch}, expected 1 <= smallest <= best <= largest.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"optimization_level is {self.optimization_level}, expected 0 to 5.")
        if not self.compute_capabilities:
            raise ConfigError("compute_capabilities is empty, expected at least one, such as 8.6.")
        if self.flavor == "tensorrt" and len(self.compute_capabilities) > 1:
            raise ConfigError(
                f"TensorRT was asked for {', '.join(self.compute_capabilities)}, expected one GPU: it builds on the "
                "GPU that runs the engine. Build once on each, or use flavor tensorrt_rtx."
            )
        if self.flavor == "tensorrt_rtx":
            absent = [c for c in self.compute_capabilities if c not in AHEAD_OF_TIME]
            if absent:
                raise ConfigError(
                    f"TensorRT-RTX cannot build for compute capability {', '.join(absent)}, expected one of "
                    f"{', '.join(AHEAD_OF_TIME)}. Build with --flavor tensorrt on such a GPU."
                )
            if self.version_compatible or self.hardware_compatibility != "none":
                raise ConfigError(
                    "hardware and version compatibility were asked of TensorRT-RTX, expected neither: its engines fit "
                    "all the GPUs they are built for, and one version. Use --flavor tensorrt."
                )
