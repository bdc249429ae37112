"""May an engine run here? Answered before its library is loaded, from the record alone.

An engine is executable code that its library takes on faith, and fits one library version, one kind of system and
some GPUs. Plans and backends ask the same questions here.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from .build_record import BUILD_RECORD_NAME, BuildRecord, Flavour
from .errors import ScmError
from .gpu import Gpu, current_gpu
from .manifest import EngineFacts
from .trt import version_tuple
from .user_cache import cache_folder

TRUST_VARIABLE = "SCM_TRUST_ENGINES"
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
}


@dataclass(frozen=True, kw_only=True)
class EngineHost:
    """What decides whether engines run on this machine.

    Attributes:
        gpu: The GPU; None without one.
        versions: Installed version of each flavour; None where it is not installed.
        platform: ``<system>-<machine>``.
        trusts: Whether an engine of this sha256 may be run.
    """

    gpu: Gpu | None
    versions: Mapping[str, str | None]
    platform: str
    trusts: Callable[[str], bool]

    @classmethod
    def here(cls, *, device: str | None = None, trust_engines: bool = False) -> EngineHost:
        """Describe this machine.

        Args:
            device: ``cuda`` or ``cuda:N``; None is the first GPU, and ``cpu`` is none.
            trust_engines: Run engines wherever they come from.
        """
        kind, _, number = (device or "cuda").partition(":")
        gpu = current_gpu(int(number) if number.isdecimal() else 0) if kind == "cuda" else None
        return cls(
            gpu=gpu,
            versions={flavour: installed_version(flavour) for flavour in _PACKAGES},
            platform=this_platform(),
            trusts=lambda sha256: trust_engines or is_trusted(sha256),
        )


def this_platform() -> str:
    """Return ``<system>-<machine>`` of this machine, for example ``linux-x86_64``."""
    return f"{platform.system()}-{platform.machine()}".lower()


def installed_version(flavour: str) -> str | None:
    """Return the version of a flavour from its package's metadata, without importing it."""
    for package in _PACKAGES[flavour]:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_trusted(engine_sha256: str) -> bool:
    """Return whether an engine was built on this machine, or the user trusts all (``SCM_TRUST_ENGINES=1``)."""
    if os.environ.get(TRUST_VARIABLE, "") not in ("", "0"):
        return True
    for path in (cache_folder() / "engines").glob(f"*/{BUILD_RECORD_NAME}"):
        try:
            if BuildRecord.from_json(path.read_bytes()).engine_sha256 == engine_sha256:
                return True
        except (OSError, ScmError):
            continue
    return False


def why_not(flavour: Flavour, facts: EngineFacts, host: EngineHost) -> str | None:
    """Return why an engine cannot run on a machine, with what to do; None if nothing speaks against it."""
    version, gpu = host.versions.get(flavour), host.gpu
    rebuild = f"scm-export engine BUNDLE --target {_target(gpu)}"
    if facts.platform != host.platform:
        return f"built for {facts.platform}, this is {host.platform}; build it here: {rebuild}"
    if version is None:
        return f"{flavour} is not installed"
    if not _version_fits(facts, version):
        least = " or later" if facts.version_compatible else ""
        return f"built with {flavour} {facts.library_version}{least}, {version} is installed; build it again: {rebuild}"
    if gpu is None:
        return "no NVIDIA GPU here"
    if not _gpu_fits(facts, gpu):
        built_for = ", ".join(facts.compute_capabilities)
        if facts.hardware_compatibility == "ampere_plus":
            built_for += " and any later"
        return f"built for {built_for}, this {gpu.name} is {gpu.compute_capability}; build it here: {rebuild}"
    return None


def doubt(flavour: Flavour, facts: EngineFacts, host: EngineHost) -> str:
    """Return what may make an engine slower than it could be here; "" if nothing."""
    same = host.gpu is None or not facts.gpu or facts.gpu == host.gpu.name
    if flavour == "tensorrt" and facts.hardware_compatibility == "none" and not same and host.gpu is not None:
        return f"tuned on a {facts.gpu}, this is a {host.gpu.name}"
    return ""


def _version_fits(facts: EngineFacts, version: str) -> bool:
    wanted, found = version_tuple(facts.library_version), version_tuple(version)
    return found >= wanted if facts.version_compatible else found == wanted


def _gpu_fits(facts: EngineFacts, gpu: Gpu) -> bool:
    if facts.hardware_compatibility == "ampere_plus":
        return version_tuple(gpu.compute_capability) >= (8, 0)
    return gpu.compute_capability in facts.compute_capabilities


def _target(gpu: Gpu | None) -> str:
    return f"sm_{gpu.compute_capability.replace('.', '')}" if gpu is not None else "NAME"
