"""A SANA-Sprint folder with parts exchanged: another autoencoder, and LoRA files merged into the transformer.

A LoRA file, as ``SanaSprintPipeline.save_lora_weights`` and PEFT write it, holds two thin matrices for each layer that
it changes. Merged, the weight is

    W + scale * alpha / rank * B @ A

computed in float64 and stored as float32; the graph has no trace of it. Alpha is the rank where the file does not say
it, as in diffusers. Every tensor of a file must be used: one that is not understood is refused.

Source: arXiv 2106.09685, section 4.1; keys and defaults as in diffusers 0.42 and PEFT 0.19.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._util.files import scratch_folder
from ...bundle.layout import CONFIG_NAME, WEIGHTS_NAME
from ...errors import BundleError, ConfigError, IntegrityError
from ..checkpoint import read_tensors
from .component import read_json, weight_files
from .sana_folder import read_sana_folder

AUTOENCODER = "AutoencoderDC"
PREFIXES = ("transformer.", "base_model.model.")
"""How keys of a LoRA of the transformer start, as diffusers and PEFT write them."""
METADATA = "lora_adapter_metadata"
"""Key of a file's metadata for PEFT's config, JSON."""
_PLAIN = {"rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False, "lora_bias": False}
"""Settings of PEFT that change the sum, with the values that do not."""


@contextmanager
def with_parts(
    source: Path, *, vae: Path | None = None, loras: Sequence[Path] = (), lora_scale: float = 1.0
) -> Iterator[Path]:
    """Provide a pipeline folder with exchanged parts; without any it is ``source`` itself.

    Args:
        source: Folder of the pipeline.
        vae: Folder of another ``AutoencoderDC``, such as DC-AE-Lite.
        loras: LoRA files of the transformer, merged in order.
        lora_scale: Factor of all of them.

    Yields:
        A folder that exists inside the context.

    Raises:
        BundleError: If a file is missing.
        ConfigError: If the autoencoder is another class, or a LoRA file does not fit the transformer.
        IntegrityError: If a file is damaged.
    """
    if not math.isfinite(lora_scale):
        raise ConfigError(f"lora_scale is {lora_scale}, expected a finite number.")
    if vae is None and not loras:
        yield source
        return
    read_sana_folder(source)
    with scratch_folder() as folder:
        changed = {"vae"} if vae is not None else set()
        changed |= {"transformer"} if loras else set()
        for path in source.iterdir():
            if path.name not in changed:
                (folder / path.name).symlink_to(path.resolve())
        if vae is not None:
            config = read_json(vae / CONFIG_NAME) if (vae / CONFIG_NAME).is_file() else {}
            if config.get("_class_name") != AUTOENCODER:
                raise ConfigError(
                    f"{vae} holds {config.get('_class_name') or 'no config of a model'}, expected an {AUTOENCODER} of "
                    f"diffusers: {CONFIG_NAME} and its weights."
                )
            (folder / "vae").symlink_to(vae.resolve())
        if loras:
            _merge(source / "transformer", folder / "transformer", loras, lora_scale)
        yield folder


def _merge(source: Path, target: Path, loras: Sequence[Path], scale: float) -> None:
    weights: dict[str, Tensor] = {}
    for file in weight_files(source):
        weights |= read_tensors(file)
    for lora in loras:
        for name, change in read_lora(lora, weights).items():
            weights[name] = (weights[name].double() + scale * change).float()
    target.mkdir()
    shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / WEIGHTS_NAME)


def read_lora(file: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the change of each weight that a LoRA file makes, ``alpha / rank * B @ A``, float64.

    Args:
        file: The ``.safetensors`` file.
        weights: Tensors of the transformer, by name.

    Raises:
        BundleError: If the file is missing.
        ConfigError: If a key is unknown or a matrix does not fit its weight.
        IntegrityError: If the file is no safetensors file.
    """
    tensors = read_tensors(file)
    settings = _settings(file)
    changes: dict[str, Tensor] = {}
    ranks = {name: len(_matrix(tensor)) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        raise ConfigError(
            f"{file} holds no NAME.lora_A.weight but {', '.join(sorted(tensors)[:3]) or 'nothing'}, expected a LoRA as "
            "diffusers or PEFT writes it."
        )
    known: set[str] = set()
    for name, rank in ranks.items():
        stem = name.removesuffix(".lora_A.weight")
        others = {part: f"{stem}.{part}" for part in ("lora_B.weight", "alpha")}
        prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
        weight = f"{stem.removeprefix(prefix or '')}.weight"
        if prefix is None or weight not in weights or others["lora_B.weight"] not in tensors:
            raise ConfigError(
                f"{file} changes {stem!r}, which has no weight in the transformer or no lora_B, expected "
                f"transformer.NAME.lora_A.weight and .lora_B.weight of its layers, such as "
                f"transformer.{next(iter(weights)).removesuffix('.weight')}."
            )
        known |= {name, *others.values()}
        changes[weight] = _product(
            file, stem, tensors, weights[weight], _factor(file, stem, rank, ranks, tensors, settings)
        )
    if unknown := sorted(set(tensors) - known):
        raise ConfigError(
            f"{file} holds {len(unknown)} tensors that no sum of matrices explains, first {unknown[0]!r}, expected "
            "lora_A, lora_B and alpha alone (no DoRA, no bias, no text encoder). Merge it with its own library first."
        )
    return changes


def _product(file: Path, stem: str, tensors: dict[str, Tensor], weight: Tensor, factor: float) -> Tensor:
    A, B = (_matrix(tensors[f"{stem}.lora_{part}.weight"]) for part in "AB")
    pointwise = weight.ndim == 4 and tuple(weight.shape[2:]) == (1, 1)
    if weight.ndim != 2 and not pointwise:
        raise ConfigError(
            f"{file} changes {stem!r} of shape {tuple(weight.shape)}, expected a linear layer or a 1x1 convolution."
        )
    if (len(B), A.shape[1]) != tuple(weight.shape[:2]) or B.shape[1] != len(A):
        raise ConfigError(
            f"{file} has matrices {tuple(B.shape)} and {tuple(A.shape)} for {stem!r}, expected "
            f"({weight.shape[0]}, rank) and (rank, {weight.shape[1]}): it belongs to another model."
        )
    change: Tensor = factor * (B @ A)
    if not torch.isfinite(change).all():
        raise IntegrityError(f"{file} holds NaN or infinity for {stem!r}, expected numbers. Copy it again.")
    return change.reshape(weight.shape)


def _matrix(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 with its last axes flattened."""
    return tensor.double().flatten(1) if tensor.ndim > 1 else tensor.double().reshape(-1, 1)


def _factor(
    file: Path, stem: str, rank: int, ranks: dict[str, int], tensors: dict[str, Tensor], settings: dict[str, Any]
) -> float:
    """Return alpha over the rank."""
    if f"{stem}.alpha" in tensors:
        return float(tensors[f"{stem}.alpha"]) / rank
    if "lora_alpha" in settings:
        return float(settings["lora_alpha"]) / rank
    if len(set(ranks.values())) > 1:
        raise ConfigError(
            f"{file} has matrices of the ranks {sorted(set(ranks.values()))} and no alpha, expected one rank or alpha: "
            "libraries differ in what is meant. Save it again with its metadata."
        )
    return 1.0


def _settings(file: Path) -> dict[str, Any]:
    """Return PEFT's config in the metadata of a file; {} if there is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(METADATA, "{}")
        read = json.loads(text)
    except (SafetensorError, OSError) as exc:
        raise BundleError(f"{file} cannot be read: {exc}. Copy it again.") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{file} has metadata {METADATA} that is no JSON: {exc}.") from exc
    found = {key.removeprefix("transformer."): value for key, value in read.items()} if isinstance(read, dict) else {}
    for name, plain in _PLAIN.items():
        if found.get(name, plain) not in (plain, None):
            raise ConfigError(
                f"{file} was trained with {name} = {found[name]!r}, expected {plain!r}. Merge it with PEFT first."
            )
    alpha = found.get("lora_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise ConfigError(f"{file} has lora_alpha {alpha!r} in its metadata, expected a number.")
    return {name: value for name, value in found.items() if value is not None}
