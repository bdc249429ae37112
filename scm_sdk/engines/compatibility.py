"""Decide from an engine's record whether it can run on this machine, before its library is loaded.

An engine is executable code that its library does not check, and fits one library version, one platform and some GPUs.
Plans and backends share these checks.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._util.cache_dir import trusted_folder, warn_once, writable_folder
from .._util.files import atomic_write_bytes, open_regular
from .._util.gpu import Gpu, current_gpu, gpus, parse_device
from .._util.lazy import distribution_version
from .._util.processor import platform_tag
from .._util.switches import is_on
from ..bundle.engine_record import Flavor
from ..bundle.manifest import EngineFacts
from ..errors import ScmError
from .targets import AHEAD_OF_TIME
from .tensorrt import version_tuple

TRUST_VARIABLE = "SCM_TRUST_ENGINES"
_BUILT = "built"
_KEY = "key"
_KEY_BYTES = 32
_MARKER_BYTES = 64
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
}


@dataclass(frozen=True, kw_only=True)
class EngineHost:
    """Properties of a machine that decide whether engines run on it.

    Attributes:
        gpu: The GPU; None without a GPU.
        versions: Installed version of each flavor; None if it is not installed.
        platform: ``<system>-<machine>``.
        trusts: Returns whether an engine with this sha256 may run.
        no_gpu: Reason why ``gpu`` is None.
    """

    gpu: Gpu | None
    versions: Mapping[str, str | None]
    platform: str
    trusts: Callable[[str], bool]
    no_gpu: str = "no NVIDIA GPU here"

    @classmethod
    def here(cls, *, device: str | None = None, trust_engines: bool = False) -> EngineHost:
        """Describe this machine.

        Args:
            device: ``cuda`` or ``cuda:N``; None is the first GPU, ``cpu`` no GPU.
            trust_engines: Run engines of any origin.
        """
        kind, index = parse_device(device or "cuda")
        gpu = current_gpu(index or 0) if kind == "cuda" else None
        others = ", ".join(f"cuda:{found.index} ({found.name})" for found in gpus()) if kind == "cuda" else ""
        return cls(
            gpu=gpu,
            no_gpu=f"no GPU {device} here, only {others}" if others else cls.no_gpu,
            versions={flavor: installed_version(flavor) for flavor in _PACKAGES},
            platform=platform_tag(),
            trusts=lambda sha256: trust_engines or is_trusted(sha256),
        )


def installed_version(flavor: str) -> str | None:
    """Return the version of a flavor from its package's metadata, without importing it."""
    return distribution_version(*_PACKAGES[flavor])


def is_trusted(engine_sha256: str) -> bool:
    """Return whether this user built an engine on this machine, or trusts all engines (``SCM_TRUST_ENGINES=1``).

    Raises:
        ConfigError: If ``SCM_TRUST_ENGINES`` is neither on nor off.
    """
    return is_on(TRUST_VARIABLE) or was_built_here(engine_sha256)


def was_built_here(engine_sha256: str) -> bool:
    """Return whether this user built an engine on this machine.

    The marker of an engine is a keyed digest, which another user cannot forge.
    """
    if not re.fullmatch("[0-9a-f]{64}", engine_sha256):
        return False
    folder = trusted_folder(_BUILT)
    key = None if folder is None else _read_key(folder)
    if folder is None or key is None:
        return False
    try:
        with open_regular(folder / engine_sha256) as stream:
            marker = stream.read(_MARKER_BYTES)
    except OSError:
        return False
    return hmac.compare_digest(marker, _marker(key, engine_sha256))


def remember_built(engine_sha256: str) -> None:
    """Record that this user built an engine on this machine, independently of the location of its file.

    If the record cannot be stored, one warning says so.
    """
    if was_built_here(engine_sha256):
        return
    purpose = "engines that are built here are not remembered and will need trust_engines=True"
    folder = writable_folder(_BUILT, purpose=purpose)
    if folder is None:
        return
    try:
        key = _read_key(folder) or _make_key(folder)
        atomic_write_bytes(folder / engine_sha256, _marker(key, engine_sha256))
    except (OSError, ScmError) as exc:
        warn_once(f"{purpose}: {exc}")


def _marker(key: bytes, engine_sha256: str) -> bytes:
    return hmac.new(key, engine_sha256.encode(), "sha256").hexdigest().encode()


def _read_key(folder: Path) -> bytes | None:
    """Return the user's key if no other user can read or write its file."""
    try:
        state = os.lstat(folder / _KEY)
        if hasattr(os, "geteuid") and (state.st_uid != os.geteuid() or state.st_mode & 0o077):
            warn_once(f"{folder / _KEY} is ignored: expected a file of your own with mode 0600. Delete it.")
            return None
        with open_regular(folder / _KEY) as stream:
            key = stream.read(_KEY_BYTES)
    except OSError:
        return None
    return key if stat.S_ISREG(state.st_mode) and len(key) == _KEY_BYTES else None


def _make_key(folder: Path) -> bytes:
    """Write a new key, or return the key of a concurrent process.

    Raises:
        OSError: If it cannot be written, or an existing file cannot be used.
    """
    handle, name = tempfile.mkstemp(prefix=".key.", dir=folder)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_bytes(_KEY_BYTES))
        os.link(name, folder / _KEY)  # fails if the file exists
    except FileExistsError:
        pass
    finally:
        os.unlink(name)
    key = _read_key(folder)
    if key is None:
        raise OSError(f"{folder / _KEY} cannot be used")
    return key


def rebuild_command(flavor: Flavor, gpu: Gpu | None = None) -> str:
    """Return the command that builds an engine again, for a GPU if one is given."""
    target = f" --target sm_{gpu.compute_capability.replace('.', '')}" if gpu is not None else ""
    ahead = flavor == "tensorrt_rtx" and (gpu is None or gpu.compute_capability in AHEAD_OF_TIME)
    return f"scm-export engine BUNDLE{target}" + ("" if ahead else " --flavor tensorrt")


def incompatibility_reason(flavor: Flavor, facts: EngineFacts, host: EngineHost) -> str | None:
    """Return why an engine cannot run on a machine, with advice; None if it can."""
    version, gpu = host.versions.get(flavor), host.gpu
    rebuild = rebuild_command(flavor, gpu)
    if facts.platform != host.platform:
        return f"built for {facts.platform}, this is {host.platform}; build it here: {rebuild}"
    if version is None:
        return f"{flavor} is not installed"
    if not _version_fits(facts, version):
        least = " or later" if facts.version_compatible else ""
        return f"built with {flavor} {facts.library_version}{least}, {version} is installed; build it again: {rebuild}"
    if gpu is None:
        return host.no_gpu
    if not _gpu_fits(facts, gpu):
        built_for = ", ".join(facts.compute_capabilities)
        if facts.hardware_compatibility == "ampere_plus":
            built_for += " and any later"
        return f"built for {built_for}, this {gpu.name} is {gpu.compute_capability}; build it here: {rebuild}"
    return None


def performance_warning(flavor: Flavor, facts: EngineFacts, host: EngineHost) -> str:
    """Return a reason why an engine may be slower than necessary on this machine, or ""."""
    same = host.gpu is None or not facts.gpu or facts.gpu == host.gpu.name
    if flavor == "tensorrt" and facts.hardware_compatibility == "none" and not same and host.gpu is not None:
        return f"tuned on a {facts.gpu}, this is a {host.gpu.name}"
    return ""


def _version_fits(facts: EngineFacts, version: str) -> bool:
    wanted, found = version_tuple(facts.library_version), version_tuple(version)
    return found >= wanted if facts.version_compatible else found == wanted


def _gpu_fits(facts: EngineFacts, gpu: Gpu) -> bool:
    if facts.hardware_compatibility == "ampere_plus":
        return version_tuple(gpu.compute_capability) >= (8, 0)
    return gpu.compute_capability in facts.compute_capabilities
