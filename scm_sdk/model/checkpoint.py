"""Checkpoints on disk: Hugging Face's folder names, safetensors, no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._util.files import atomic_file, atomic_write_bytes, open_regular, read_regular
from .._util.json_struct import to_json
from ..bundle.layout import CONFIG_MAX_BYTES, CONFIG_NAME, DECODER_FOLDER, IMPORTED_CLASS, WEIGHTS_NAME
from ..errors import BundleError, ConfigError, IntegrityError
from .bounds import on_meta
from .consistency import ConsistencyModel, ModelConfig
from .decoder import DECODERS, Decoder, DecoderConfig
from .foreign.sana_folder import is_pipeline
from .networks.conditioning import PositionalEmbedding
from .networks.custom import NETWORKS, OwnConfig, unwrapped, wrapped_module
from .networks.magnitude import require_unbaked
from .networks.paper_unet import PaperUNetConfig
from .networks.transformer import TransformerConfig
from .networks.unet import UNetConfig
from .registry import Registry

BUILT_IN = (UNetConfig, TransformerConfig, PaperUNetConfig)
"""Configs of the built-in networks."""
_MAPPED_BYTES = 1 << 29
"""Bytes of a file that are read before it is mapped again."""
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
"""Prefixes that ``torch.compile`` and data parallelism add to the name of every weight."""
CLASS_NAME = "ScmModel"
"""``_class_name`` in ``config.json``; the ``type`` of the network selects the class."""


def read_config(path: Path) -> ModelConfig:
    """Parse a ``config.json``.

    Raises:
        BundleError: If the file is absent.
        ConfigError: If it is malformed, for another kind of model, not a regular file or too large.
    """
    try:
        raw = msgspec.json.decode(read_regular(path, most=CONFIG_MAX_BYTES), type=dict[str, msgspec.Raw])
    except FileNotFoundError as exc:
        raise BundleError(
            f"no {CONFIG_NAME} in {path.parent}, expected a checkpoint folder with {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from exc
    except (OSError, msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}. Save the checkpoint again.") from exc
    kind = bytes(raw.pop("_class_name", msgspec.Raw(b'""'))).decode(errors="replace")
    if kind == f'"{IMPORTED_CLASS}"':
        raise ConfigError(
            f"{path} describes an imported EDM or EDM2 network, weights without code, expected a {CLASS_NAME!r}. Put "
            "them into the network's own class and wrap it as a teacher in Python (ModuleDenoiser, EDM_DENOISER): "
            "docs/sharing.md, Pickles of EDM and EDM2."
        )
    if kind != f'"{CLASS_NAME}"':
        raise ConfigError(f"{path} describes a {kind}, expected a {CLASS_NAME!r} written by save_pretrained.")
    try:
        return msgspec.json.decode(msgspec.json.encode(raw), type=ModelConfig)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError(f"{path} breaks the model config: {exc}. Save the checkpoint again.") from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file.

    Raises:
        BundleError: If the file is missing, or does not fit in memory.
        IntegrityError: If it is truncated or no safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    try:
        stamp = _stamp(path)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        while names:
            # Copied, because aligned weights give reproducible bits; mapped again for each part, because mapped
            # pages count as memory until they are released.
            with safe_open(path, framework="pt") as file:
                done = 0
                while names and done < _MAPPED_BYTES:
                    name = names.pop()
                    tensors[name] = file.get_tensor(name).clone()
                    done += tensors[name].nbytes
            if _stamp(path) != stamp:
                raise IntegrityError(f"{path} was replaced while it was read. Load it again.")
        return tensors
    except FileNotFoundError as exc:
        raise BundleError(f"no {path.name} in {path.parent}, expected the weights there.") from exc
    except (SafetensorError, OSError) as exc:
        raise IntegrityError(
            f"{path} is truncated or no safetensors file ({exc}). Copy or train the checkpoint again."
        ) from exc
    except MemoryError as exc:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, more than this process may map into memory. Raise the limit "
            "(ulimit -v), or load it on a machine with more."
        ) from exc


def _stamp(path: Path) -> tuple[int, int, int]:
    with open_regular(path) as stream:  # the library would block on a pipe
        found = os.fstat(stream.fileno())
    return found.st_ino, found.st_mtime_ns, found.st_size


def load_checkpoint(
    folder: Path, network: nn.Module | None = None, decoder: nn.Module | None = None
) -> ConsistencyModel:
    """Load a checkpoint folder, or another library's; see ``ConsistencyModel.from_pretrained``."""
    if is_pipeline(folder):
        from .foreign.pipelines import load_pipeline

        return load_pipeline(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder, expected a checkpoint with {CONFIG_NAME} and {WEIGHTS_NAME}.")
    config = read_config(folder / CONFIG_NAME)
    tensors = read_tensors(folder / WEIGHTS_NAME)
    built_in = network is None and isinstance(config.network, BUILT_IN)
    # Built-in networks are created on the meta device and take the loaded tensors, so that memory holds them once.
    with on_meta() if built_in else nullcontext():
        model = ConsistencyModel(config, network)
    model.decoder = _load_decoder(folder / DECODER_FOLDER, decoder)
    subject = f"{folder / WEIGHTS_NAME} does not fit its {CONFIG_NAME}"
    bare = unwrapped(model.network)
    tensors = without_wrappers(bare, tensors)
    check_fits(bare, tensors, subject, remedy="The two files belong to different models.")
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    bare.load_state_dict(floats, assign=built_in)
    if built_in:
        for module in model.modules():
            if isinstance(module, PositionalEmbedding):  # the only networks with tensors that are not in the file
                module.make_frequencies()
    return model.eval().requires_grad_(False)


def check_reopens(model: ConsistencyModel) -> None:
    """Refuse a model whose checkpoint could not be opened: custom parts are created from their registered names.

    Raises:
        ConfigError: If a network or a decoder is not registered, or the registered factory has other weights.
    """
    parts: list[tuple[Registry, str, dict[str, Any], nn.Module]] = []
    if isinstance(own := model.config.network, OwnConfig):
        parts.append((NETWORKS, own.name, own.arguments, unwrapped(model.network)))
    if model.decoder is not None:
        decoder = model.decoder.config
        parts.append((DECODERS, decoder.name, decoder.arguments, unwrapped(model.decoder.module)))
    for registry, name, arguments, module in parts:
        subject = f"the {registry.kind} {name!r}"
        try:
            again = registry.make(name, arguments)
            check_fits(again, module.state_dict(), subject, remedy="Give the arguments={...} that make it again.")
        except (ConfigError, IntegrityError) as exc:
            raise ConfigError(
                f"{subject} of this model cannot be opened again from a bundle, which PyTorch must do to validate its "
                f"graphs: {exc}"
            ) from exc


def _load_decoder(folder: Path, module: nn.Module | None) -> Decoder | None:
    path = folder / CONFIG_NAME
    if not path.exists():
        return None
    try:
        config = msgspec.json.decode(read_regular(path, most=CONFIG_MAX_BYTES), type=DecoderConfig)
    except (OSError, msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}. Save the checkpoint again.") from exc
    decoder = config.make(module)
    tensors = read_tensors(folder / WEIGHTS_NAME)
    check_fits(
        decoder.module, tensors, f"{folder / WEIGHTS_NAME} does not fit its {CONFIG_NAME}",
        remedy="The two files belong to different decoders.",
    )  # fmt: skip
    decoder.module.load_state_dict(tensors)
    return decoder


def check_fits(network: nn.Module, tensors: Mapping[str, Tensor], subject: str, *, remedy: str) -> None:
    """Check names and shapes of tensors against a network.

    Args:
        network: The network that will hold the tensors.
        tensors: The loaded tensors.
        subject: Subject of the error message.
        remedy: Advice of the error message.

    Raises:
        IntegrityError: If a tensor is missing, unexpected, of another shape, or integer instead of floating point; the
            message names the first.
    """
    state = network.state_dict()
    expected = {name: tuple(p.shape) for name, p in state.items()}
    found = {name: tuple(p.shape) for name, p in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise IntegrityError(
            f"{subject}: {len(wrong)} tensors differ, first {name!r}: found {found.get(name, 'nothing')}, expected "
            f"{expected.get(name, 'nothing')}. {remedy}"
        )
    for name, tensor in tensors.items():
        if _kind(tensor) != _kind(state[name]):
            raise IntegrityError(f"{subject}: {name!r} is {tensor.dtype}, expected {state[name].dtype}. {remedy}")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Return the kind of a dtype, which a conversion must not change."""
    return tensor.is_floating_point(), tensor.is_complex()


def without_wrappers(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the name prefixes of wrappers from tensors.

    Args:
        network: The network that will hold the tensors.
        tensors: The loaded tensors; unchanged unless every name begins with ``_orig_mod.`` (``torch.compile``) or
            ``module.`` (``DataParallel``) and the network does not use such names itself.
    """
    found, expected = dict(tensors), network.state_dict().keys()
    for prefix in WRAPPER_PREFIXES * 2:  # nested in either order
        if found and not found.keys() & expected and all(name.startswith(prefix) for name in found):
            found = {name[len(prefix) :]: tensor for name, tensor in found.items()}
    return found


def _bare_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network under their names without wrappers at any depth."""
    state = network.state_dict()
    names = {name: name for name in state}
    found = [
        path for path, module in network.named_modules(remove_duplicate=False) if wrapped_module(module) is not None
    ]
    for path in sorted(
        found, key=len, reverse=True
    ):  # inner wrappers first, because their paths include the outer ones
        start = f"{path}." if path else ""
        for name, short in names.items():
            if short.startswith(start):
                names[name] = start + short[len(start) :].partition(".")[2]
    return {names[name]: tensor for name, tensor in state.items()}


def save_checkpoint(model: ConsistencyModel, folder: Path) -> None:
    """Write a checkpoint folder; see ``ConsistencyModel.save_pretrained``."""
    require_unbaked(model.network)
    if model.decoder is not None:
        _save(model.decoder.config, model.decoder.module, folder / DECODER_FOLDER)
    _save({"_class_name": CLASS_NAME, **msgspec.to_builtins(model.config)}, model.network, folder)


def _save(config: object, module: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = _unshared(_bare_state(module))
    text = to_json(config)
    with atomic_file(folder / WEIGHTS_NAME, error=BundleError) as path:
        try:
            save_file(weights, path, metadata={"format": "pt"})
        except SafetensorError as exc:  # the library wraps errors of the disk in it
            raise BundleError(f"{folder / WEIGHTS_NAME} cannot be written: {exc}. Check the disk.") from exc
    atomic_write_bytes(folder / CONFIG_NAME, text, error=BundleError)


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights on the CPU with separate copies of tied weights, which safetensors requires."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        weights[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    return weights
