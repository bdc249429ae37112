"""Cache of latencies measured on this machine, from which ``backend="auto"`` chooses the fastest backend.

One small JSON file in the cache folder, written by ``Generator.benchmark`` and ``scm-export bench``. The key of a
latency names the build, artifact, precision, number of steps, backend with its library's version, device, number of
threads, and processor with its class. The file may be deleted at any time.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .._util.cache_dir import cache_folder, warn_once, writable_folder
from .._util.files import atomic_write_bytes, open_regular
from .._util.gpu import gpus
from .._util.lazy import distribution_version
from .._util.processor import cpu_class, cpu_name, platform_tag, usable_cores
from ..errors import ScmError
from .backends import BACKENDS
from .selection import Measured, WayKey

MAX_ENTRIES = 1000
_MAX_BYTES = 1 << 20
_NAME = "latency.json"


def cache_path() -> Path | None:
    """Return the path of the file; None without a cache."""
    folder = cache_folder()
    return None if folder is None else folder / _NAME


def recall(
    build_id: str, *, num_inference_steps: int, device: str | None, num_threads: int | None
) -> dict[WayKey, Measured]:
    """Return the remembered medians by backend, artifact path and precision.

    An unreadable file counts as empty, because the cache affects only speed.
    """
    found = {}
    here: dict[str, str] = {}
    for key, median in _read().items():
        backend, _, rest = key.partition("|")
        artifact, _, rest = rest.partition("|")
        precision, _, conditions = rest.partition("|")
        if backend not in BACKENDS or not conditions.startswith(f"{build_id}|"):  # before a version is looked up
            continue
        if backend not in here:
            here[backend] = _conditions(backend, build_id, num_inference_steps, device, num_threads)
        if conditions == here[backend]:
            found[backend, artifact, precision] = median
    return found


def remember(
    medians: Mapping[WayKey, Measured],
    build_id: str,
    *,
    num_inference_steps: int,
    device: str | None,
    num_threads: int | None,
) -> None:
    """Store medians by backend, artifact path and precision; each replaces an older one, also of another batch size.

    Warns once if the cache is not writable.
    """
    purpose = "the measured latencies are not kept for other processes"
    folder = writable_folder("", purpose=purpose)
    if folder is None:
        return
    times = _read()
    for (backend, artifact, precision), median in medians.items():
        conditions = _conditions(backend, build_id, num_inference_steps, device, num_threads)
        key = f"{backend}|{artifact}|{precision}|{conditions}"
        times.pop(key, None)  # the newest are last, and the oldest are dropped first
        times[key] = median
    kept = dict(list(times.items())[-MAX_ENTRIES:])
    try:
        atomic_write_bytes(folder / _NAME, json.dumps(kept, indent=1).encode() + b"\n")
    except ScmError as exc:
        warn_once(f"{purpose}: {exc}")


def _read() -> dict[str, Measured]:
    """Return the content of the file; empty if it is missing, or, with one warning, damaged."""
    path = cache_path()
    if path is None:
        return {}
    try:
        with open_regular(path) as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as exc:
        return _ignored(path, "it is no plain file") if exc.errno == errno.EINVAL else {}
    if len(data) > _MAX_BYTES:
        return _ignored(path, f"it has more than {_MAX_BYTES} bytes")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as exc:
        return _ignored(path, f"it is no JSON ({type(exc).__name__})")
    if not isinstance(raw, dict) or len(raw) > MAX_ENTRIES:
        return _ignored(path, f"it is no object of at most {MAX_ENTRIES} times")
    found = {}
    for key, value in raw.items():
        try:
            measured = msgspec.convert(value, Measured)
        except msgspec.ValidationError:  # of another version
            continue
        if math.isfinite(measured.ms) and measured.ms > 0 and measured.batch > 0:
            found[key] = measured
        else:
            _ignored(path, "it holds times that are not positive numbers", what="a part of ")
    return found


def _ignored(path: Path, problem: str, *, what: str = "") -> dict[str, Measured]:
    warn_once(f"{what}{path} is ignored: {problem}. Delete it and measure again: gen.benchmark()")
    return {}


def _conditions(backend: str, build_id: str, steps: int, device: str | None, num_threads: int | None) -> str:
    library = BACKENDS[backend].library if backend in BACKENDS else backend
    version = distribution_version(library, f"{library}-gpu") or "unknown"
    machine = f"{platform_tag()}-{cpu_name()}-{cpu_class()}-{usable_cores()}"
    if backend in BACKENDS and BACKENDS[backend].runs_engines:
        machine += "".join(f"-{gpu.name}-{gpu.driver}" for gpu in gpus())
    return f"{build_id}|{steps}|{version}|{device or 'cpu'}|{num_threads or 'auto'}|{machine}"
