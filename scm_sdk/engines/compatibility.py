"""Decide from an engine's record whether it can run on this machine, before its library is loaded.

An engine is executable code that its library takes on faith, and fits one library version, one kind of system and
some GPUs. Plans and backends ask the same questions here.
"""

from __future__ import annotations

import hmac
import os
import platform
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._util.cache_dir import trusted_folder, warn_once, writable_folder
from .._util.files import atomic_write_bytes, open_regular
from .._util.gpu import Gpu, current_gpu, gpus
from .._util.switches import is_on
from ..bundle.engine_record import Flavour
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
    """What decides whether engines run on this machine.

    Attributes:
        gpu: The GPU; None without one.
        versions: Installed version of each flavour; None where it is not installed.
        platform: ``<system>-<machine>``.
        trusts: Whether an engine of this sha256 may be run.
        no_gpu: Why ``gpu`` is None, where it is.
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
            device: ``cuda`` or ``cuda:N``; None is the first GPU, and ``cpu`` is none.
            trust_engines: Run engines wherever they come from.
        """
        kind, _, number = (device or "cuda").partition(":")
        gpu = current_gpu(int(number) if number.isdecimal() else 0) if kind == "cuda" else None
        others = ", ".join(f"cuda:{found.index} ({found.name})" for found in gpus()) if kind == "cuda" else ""
        return cls(
            gpu=gpu,
            no_gpu=f"no GPU {device} here, only {others}" if others else cls.no_gpu,
            versions={flavour: installed_version(flavour) for flavour in _PACKAGES},
            platform=this_platform(),
            trusts=lambda sha256: trust_engines or is_trusted(sha256),
        )


def this_platform() -> str:
    """Return ``<system>-<machine>`` of this machine, for example ``linux-x86_64``."""
    return f"{platform.system()}-{platform.machine()}".lower()


def installed_version(flavour: str) -> str | None:
    """Return the version of a flavour from its package's metadata, without importing it."""
    from importlib import metadata  # inside: it loads Python's e-mail package

    for package in _PACKAGES[flavour]:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_trusted(engine_sha256: str) -> bool:
    """Return whether this user built an engine on this machine, or trusts all (``SCM_TRUST_ENGINES=1``).

    Raises:
        ConfigError: If ``SCM_TRUST_ENGINES`` is neither a yes nor a no.
    """
    return is_on(TRUST_VARIABLE) or was_built_here(engine_sha256)


def was_built_here(engine_sha256: str) -> bool:
    """Return whether this user built an engine on this machine.

    Its marker is a keyed digest, so that a file that somebody else put there says nothing.
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
    """Keep that this user built an engine on this machine; its file may lie anywhere, and leave the cache.

    Where that cannot be kept, one warning says so.
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
    """Return the user's key, if its file is one that nobody else can read or write."""
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
    """Write a new key, or return that of a process that was faster.

    Raises:
        OSError: If it cannot be written, or what lies there cannot be used.
    """
    handle, name = tempfile.mkstemp(prefix=".key.", dir=folder)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_bytes(_KEY_BYTES))
        os.link(name, folder / _KEY)  # fails where there is one
    except FileExistsError:
        pass
    finally:
        os.unlink(name)
    key = _read_key(folder)
    if key is None:
        raise OSError(f"{folder / _KEY} cannot be used")
    return key


def rebuild_command(flavour: Flavour, gpu: Gpu | None = None) -> str:
    """Return the command that builds an engine again, for a GPU if one is given."""
    target = f" --target sm_{gpu.compute_capability.replace('.', '')}" if gpu is not None else ""
    ahead = flavour == "tensorrt_rtx" and (gpu is None or gpu.compute_capability in AHEAD_OF_TIME)
    return f"scm-export engine BUNDLE{target}" + ("" if ahead else " --flavor tensorrt")


def why_not(flavour: Flavour, facts: EngineFacts, host: EngineHost) -> str | None:
    """Return why an engine cannot run on a machine, with what to do; None if nothing speaks against it."""
    version, gpu = host.versions.get(flavour), host.gpu
    rebuild = rebuild_command(flavour, gpu)
    if facts.platform != host.platform:
        return f"built for {facts.platform}, this is {host.platform}; build it here: {rebuild}"
    if version is None:
        return f"{flavour} is not installed"
    if not _version_fits(facts, version):
        least = " or later" if facts.version_compatible else ""
        return f"built with {flavour} {facts.library_version}{least}, {version} is installed; build it again: {rebuild}"
    if gpu is None:
        return host.no_gpu
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
