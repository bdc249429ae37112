"""GPU targets by name: compute capability, precisions, and which builder supports them.

Data only, without a GPU or a library. Sources: NVIDIA's table of compute capabilities, and for ``ahead_of_time`` the
capabilities of TensorRT-RTX 1.7 (verified: each of them builds on a CPU).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import ConfigError

AHEAD_OF_TIME = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX builds for on any machine."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU model.

    Attributes:
        name: Name for options.
        title: Full name.
        compute_capability: Two numbers, for example ``8.0``.
    """

    name: str
    title: str
    compute_capability: str

    @property
    def sm(self) -> str:
        """The capability as in file names, for example ``sm80``."""
        return "sm" + self.compute_capability.replace(".", "")

    @property
    def ahead_of_time(self) -> bool:
        """Whether TensorRT-RTX builds for it without such a GPU."""
        return self.compute_capability in AHEAD_OF_TIME

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of graphs that its tensor cores compute, fp32 first."""
        version = tuple(int(part) for part in self.compute_capability.split("."))
        return ("fp32", "fp16", "int8", *(["bf16"] if version >= (8, 0) else []))

    def unbuildable(self, flavor: str) -> str:
        """Return why a flavor cannot build any engine for this GPU, or ""."""
        if flavor == "tensorrt_rtx" and not self.ahead_of_time:
            return (
                f"TensorRT-RTX cannot build for {self.name} ({self.compute_capability}), only for compute capability "
                f"{', '.join(AHEAD_OF_TIME)}"
            )
        return ""

    def lacks(self, precision: str, flavor: str) -> str:
        """Return why engines of a precision cannot be built for this GPU, or "".

        Measured: on Turing, TensorRT-RTX 1.7 has no float32 matrix products and silently dequantizes INT8
        convolutions.
        """
        if precision not in self.precisions:
            return f"{self.name} cannot compute {precision}, which needs compute capability 8.0"
        if flavor == "tensorrt_rtx" and self.compute_capability == "7.5" and precision != "fp16":
            return f"TensorRT-RTX has no {precision} kernels for {self.name} (7.5)"
        return ""

    @property
    def note(self) -> str:
        """Note for users before building for this GPU; usually empty."""
        if self.compute_capability == "8.0":
            return "not in TensorRT-RTX's support matrix: prefer tensorrt on the GPU"
        return "" if self.ahead_of_time else "tensorrt only, on such a GPU"


_BOARDS = {
    "7.5": {"t4": "T4", "rtx2080ti": "GeForce RTX 2080 Ti", "rtx6000": "Quadro RTX 6000"},
    "8.0": {"a100": "A100", "a30": "A30"},
    "8.6": {
        "a10": "A10", "a2": "A2", "a16": "A16", "a40": "A40", "rtxa6000": "RTX A6000",
        "rtx3060": "GeForce RTX 3060", "rtx3090": "GeForce RTX 3090",
    },
    "8.7": {"orin": "Jetson Orin"},
    "8.9": {
        "l4": "L4", "l40": "L40", "l40s": "L40S", "rtx6000ada": "RTX 6000 Ada", "rtx4070": "GeForce RTX 4070",
        "rtx4090": "GeForce RTX 4090",
    },
    "9.0": {"h100": "H100", "h200": "H200", "gh200": "GH200"},
    "10.0": {"b200": "B200", "gb200": "GB200"},
    "10.3": {"b300": "B300", "gb300": "GB300"},
    "11.0": {"thor": "Jetson Thor"},
    "12.0": {"rtx5070": "GeForce RTX 5070", "rtx5090": "GeForce RTX 5090", "rtxpro6000": "RTX PRO 6000 Blackwell"},
    "12.1": {"spark": "DGX Spark (GB10)"},
}  # fmt: skip
TARGETS: dict[str, Target] = {
    name: Target(name=name, title=title, compute_capability=capability)
    for capability, boards in _BOARDS.items()
    for name, title in boards.items()
}


def resolve_target(name: str | Target) -> Target:
    """Find a GPU by its name (``l4``, ``rtx4090``) or its capability (``sm_89``, ``8.9``).

    Raises:
        ConfigError: If the name is unknown; the message lists close names.
    """
    if isinstance(name, Target):
        return name
    text = name.strip().lower().replace("-", "").replace(" ", "")
    if text in TARGETS:
        return TARGETS[text]
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text)
    capability = f"{match[1]}.{match[2]}" if match else ""
    if capability in _BOARDS:
        return Target(name=f"sm_{capability.replace('.', '')}", title=f"sm {capability}", compute_capability=capability)
    close = get_close_matches(text, TARGETS, n=3, cutoff=0.5) or ["l4", "t4", "rtx4090"]
    raise ConfigError(
        f"target is {name!r}, expected a GPU such as {', '.join(close)}, or a compute capability such as sm_86. "
        "All of them: scm-export targets"
    )


def resolve_targets(names: Sequence[str | Target]) -> tuple[Target, ...]:
    """Find several; two names of one compute capability count once, the first.

    Raises:
        ConfigError: If a name is unknown or the list is empty.
    """
    if not names:
        raise ConfigError("no target was given, expected at least one. See: scm-export targets")
    found: dict[str, Target] = {}
    for name in names:
        target = resolve_target(name)
        found.setdefault(target.compute_capability, target)
    return tuple(found.values())
