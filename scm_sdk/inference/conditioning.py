"""Conditioning inputs for calibration and validation: prompts of the user, or precomputed tensors.

By default such inputs are standard normal, drawn from the seeds (``request.make_example``). That suffices to compare a
graph with its source, but the output of a text encoder, and therefore activations, have another distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._util.files import sha256_file
from ..errors import ConfigError, ShapeError
from ..spec import SamplerSpec
from .prompts import EMBEDS, MASK, Prompts

MAX_PROMPTS = 4096
_MAX_TEXT_BYTES = 4 << 20
_MAX_TENSOR_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Conditioning inputs, selected by seed.

    Attributes:
        tensors: By input name, ``(N, *shape)``; N is the same for all.
        source: Description for records: number of rows and name of the file.
        sha256: sha256 of the file.
    """

    tensors: Mapping[str, np.ndarray]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the conditioning of some samples: seed s uses row s modulo N."""
        at = [int(seed) % len(self) for seed in seeds]
        return {name: tensor[at] for name, tensor in self.tensors.items()}


def read_examples(path: Path, spec: SamplerSpec, prompts: Prompts) -> Examples:
    """Read conditioning inputs from a file.

    Args:
        path: A UTF-8 text file with one prompt per line; or a ``.safetensors`` file with the further inputs of the
            sampler by name, ``(N, *shape)``; masks are optional.
        spec: The sampler.
        prompts: What encodes prompts of a text file.

    Raises:
        ConfigError: If the model takes no such inputs, the file is empty, too large or of another kind, or there is no
            text encoder for its prompts.
        ShapeError: If a tensor has another shape or dtype.
        BackendUnavailable: If torch, diffusers or transformers is missing for encoding prompts.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file, expected prompts, one a line, or a .safetensors file.")
    names = [tensor.name for tensor in spec.conditioning]
    if not names:
        raise ConfigError(f"{path} is given, but this model takes no prompt or other input of its own. Leave it out.")
    if path.suffix == ".safetensors":
        tensors = _read_tensors(path, spec)
        source = f"{len(next(iter(tensors.values())))} rows of {path.name}"
    else:
        if EMBEDS not in names:
            raise ConfigError(
                f"{path} holds prompts, but this model takes {', '.join(names)}. Give a .safetensors file with those."
            )
        texts = read_prompts(path)
        made = prompts.conditioning(spec, len(texts), prompt=texts)
        tensors = {name: array for name, array in (made or {}).items() if name in (EMBEDS, MASK)}
        source = f"{len(texts)} prompts of {path.name}"
    return Examples(tensors=tensors, source=source, sha256=sha256_file(path))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a UTF-8 text file, one per line.

    Raises:
        ConfigError: If the file is too large, not UTF-8 or has no line.
    """
    size = path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise ConfigError(f"{path} has {size} bytes, expected prompts of at most {_MAX_TEXT_BYTES} in all.")
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is no UTF-8 text: {exc}. Expected prompts, one a line.") from exc
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise ConfigError(f"{path} holds {len(texts)} prompts, expected 1..{MAX_PROMPTS}, one a line.")
    return texts


def _read_tensors(path: Path, spec: SamplerSpec) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if path.stat().st_size > _MAX_TENSOR_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_TENSOR_BYTES}.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as exc:
        raise ConfigError(f"{path} is no safetensors file: {exc}. Write it again.") from exc
    wanted = {tensor.name: tensor for tensor in spec.conditioning}
    needed = {name for name, tensor in wanted.items() if tensor.kind != "mask"}
    if not needed <= set(found) <= set(wanted):
        raise ConfigError(f"{path} holds {sorted(found)}, expected {sorted(needed)}, and of masks {sorted(wanted)}.")
    count = len(next(iter(found.values()))) if all(array.ndim for array in found.values()) else 0
    for name, array in found.items():
        shape, dtype = (count, *wanted[name].shape), np.dtype(wanted[name].dtype)
        if not count or array.shape != shape or array.dtype != dtype:
            expected = f"(N, {', '.join(map(str, wanted[name].shape))}) {dtype}"
            raise ShapeError(f"{name} in {path} is {array.shape} {array.dtype}, expected {expected}, one N for all.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(f"{name} in {path} holds NaN or infinity, expected finite numbers.")
    return found
