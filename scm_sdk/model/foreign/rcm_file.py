"""rCM's flat ``.pt`` files of Wan 2.1 as a pipeline of diffusers: names of the weights, and the parts that they lack.

Such a file holds the student's weights under ``net.*``, and counters of the training under ``accum_*``. Names are those
of Wan's own code; the patch embedding is a linear layer over patches (C, T, H, W), a convolution in diffusers.
Autoencoder, scheduler and the transformer's config come from a ``WanPipeline`` folder of the same size.

Source: the layout of NVlabs/rcm; Zheng et al. 2025, arXiv 2510.08431.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..._util.files import staging
from ...bundle.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from ...errors import BundleError, ConfigError
from ...pickles.tensors import StoredTensor
from ...pickles.torch_file import read_torch_file
from .component import CONFIG_SUFFIXES, weight_files
from .few_step import SLA_WEIGHT, refuse_sla_names
from .few_step_folder import Settings, pipeline_class, read_few_step_folder

SUFFIXES = (".pt", ".pth")
PREFIX, COUNTERS = "net.", re.compile(r"(net\.)?accum_")
_WHOLE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head": "scale_shift_table",
}
_IN_BLOCK = {
    "self_attn.o": "attn1.to_out.0", "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2",
    **{
        f"{kind}_attn.{name}": f"attn{i}.{'norm' if name.startswith('norm') else 'to'}_{name[-1]}"
        for i, kind in ((1, "self"), (2, "cross"))
        for name in ("q", "k", "v", "norm_q", "norm_k")
    },
}  # fmt: skip
"""Module in a block of Wan's code: that of diffusers. The affine norm is Wan's third and diffusers' second."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_REMEDY = "Give a .pt file of rCM for Wan 2.1 text-to-video."


def diffusers_name(name: str) -> str | None:
    """Return the name in ``WanTransformer3DModel`` of a weight of Wan's code; None if it has none."""
    if (table := re.fullmatch(r"blocks\.(\d+)\.modulation", name)) is not None:
        return f"blocks.{table[1]}.scale_shift_table"
    if name == "head.modulation":
        return "scale_shift_table"
    if (block := _BLOCK.fullmatch(name)) is not None:
        module = _IN_BLOCK.get(block[2])
        return None if module is None else f"blocks.{block[1]}.{module}.{block[3]}"
    module, _, end = name.rpartition(".")
    found = _WHOLE.get(module)
    return f"{found}.{end}" if found is not None and end in ("weight", "bias") else None


def diffusers_tensors(stored: dict[str, StoredTensor], config: dict[str, Any], where: Path) -> dict[str, Tensor]:
    """Return the weights of the transformer under the names of diffusers, in their stored dtype.

    Args:
        stored: The tensors of the file.
        config: Config of the transformer, for the shape of its patches.
        where: The file, for messages.

    Raises:
        ConfigError: If they are not those of a student of Wan 2.1.
    """
    kept = {name: tensor for name, tensor in stored.items() if not COUNTERS.match(name)}
    if not kept or not all(name.startswith(PREFIX) for name in kept):
        other = next((name for name in kept if not name.startswith(PREFIX)), "nothing")
        raise ConfigError(
            f"{where} holds {other!r}, expected weights under {PREFIX}*, as rCM writes a student's; those of Wan "
            f"itself have no such prefix: they are the full model of about 50 steps. {_REMEDY}"
        )
    refuse_sla_names([name for name in kept if SLA_WEIGHT in name.split(".")], where)
    named = {name: diffusers_name(name.removeprefix(PREFIX)) for name in kept}
    if unknown := sorted(name for name, found in named.items() if found is None):
        raise ConfigError(f"{where} holds {len(unknown)} unknown weights, first {unknown[0]!r}. {_REMEDY}")
    tensors = {found: _tensor(kept[name]) for name, found in named.items() if found is not None}
    patches = tensors.get("patch_embedding.weight")
    if patches is not None and patches.ndim == 2:
        shape = (config["in_channels"], *config["patch_size"])
        try:
            tensors["patch_embedding.weight"] = patches.reshape(len(patches), *shape)
        except RuntimeError as exc:
            raise ConfigError(
                f"{where}: the patch embedding has {patches.shape[1]} inputs, expected {shape} of the base's config."
            ) from exc
    return tensors


def _tensor(stored: StoredTensor) -> Tensor:
    data = bytearray(stored.tobytes())
    dtype: torch.dtype = getattr(torch, stored.storage.dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(stored.shape)


@contextmanager
def student_pipeline(file: Path, base: Path, scratch: Path) -> Iterator[Path]:
    """Provide a ``WanPipeline`` folder with the student's transformer; it is removed when the block ends.

    Args:
        file: rCM's ``.pt``; read without executing it.
        base: A ``WanPipeline`` folder of the same size, for everything else. Its transformer's weights are not used.
        scratch: An existing folder to work in.

    Raises:
        BundleError: If a file cannot be read or written, or the pickle names an unknown global.
        IntegrityError: If the file is damaged.
        ConfigError: If it holds another model, or the base is another pipeline.
    """
    if (kind := pipeline_class(base)) not in ("WanPipeline", "WanDMDPipeline"):
        raise ConfigError(f"{base} is a {kind}, expected the WanPipeline that {file.name} is a student of.")
    found = read_few_step_folder(base, Settings(distilled=True))
    tensors = diffusers_tensors(read_torch_file(file), found.transformer, file)
    try:
        with staging(scratch) as folder:
            made = folder / "pipeline"
            for name in ("transformer", "scheduler", "vae"):
                (made / name).mkdir(parents=True)
            copied = [base / INDEX_NAME, base / "transformer" / CONFIG_NAME, *weight_files(base / "vae")]
            copied += [path for name in ("vae", "scheduler") for path in sorted((base / name).glob("*.json"))]
            if found.has_text_encoder:
                parts = (path for name in ("text_encoder", "tokenizer") for path in sorted((base / name).iterdir()))
                copied += [path for path in parts if path.suffix in (*CONFIG_SUFFIXES, ".safetensors")]
            for path in copied:
                target = made / path.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            save_file(tensors, made / "transformer" / WEIGHTS_NAME, metadata={"format": "pt"})
            yield made
    except OSError as exc:
        raise BundleError(f"{scratch} cannot be written: {exc.strerror or exc}. Free some space.") from exc
