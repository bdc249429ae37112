"""Convert an EDM-style pickle to a folder of safetensors with its license."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .._util.files import atomic_write_bytes, read_regular, remove_leftovers, sha256_file, staging
from .._util.publish import atomic_folder
from ..bundle.layout import CONFIG_MAX_BYTES, CONFIG_NAME, IMPORTED_CLASS, WEIGHTS_NAME
from ..errors import BundleError, ConfigError, IntegrityError
from .edm2_layout import CLASS_NAME as EDM2_CLASS
from .edm2_layout import Shape, edm2_shapes
from .network import PickledNetwork, read_network

SOURCE_LICENSE = "CC-BY-NC-SA-4.0"
"""License of NVIDIA's EDM and EDM2 weights, whose file format this module reads."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Result of a conversion.

    Attributes:
        path: Output folder.
        network: The network from the pickle.
        license: License of the weights, an SPDX id or text of the user.
        stated: Whether the user gave the license.
        source_sha256: Digest of the pickle.
    """

    path: Path
    network: PickledNetwork
    license: str
    stated: bool
    source_sha256: str

    @property
    def license_line(self) -> str:
        """One sentence about the permitted use of the weights."""
        if self.stated:
            return f"License of the weights, as stated at import: {self.license}."
        return (
            f"License of the weights: {self.license}, non-commercial, as NVIDIA publishes EDM and EDM2. "
            "If these are others, name theirs with --license."
        )


def convert_pickle(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    entry: str = "ema",
    license: str = "",
    expected: Mapping[str, Shape] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the tensors of a network as safetensors, with the names of its ``state_dict()``.

    float16 is kept; bfloat16 is widened to float32 without loss.

    Args:
        path: The pickle. Nothing in it is executed.
        out: Folder of ``config.json``, ``diffusion_pytorch_model.safetensors`` and ``README.md``.
        entry: Name of the network in the file.
        license: License of the weights; default: that of NVIDIA's published weights.
        expected: Name and shape of every tensor. By default those of an EDM2 network are derived from its arguments; of
            other classes every stored parameter and buffer is written.
        overwrite: Replace the folder of an earlier import.

    Raises:
        BundleError: If the file is refused, or ``out`` may not be replaced or cannot be written.
        IntegrityError: If the file is damaged, a tensor is missing, too many or misshapen, or a weight is not finite.
        ConfigError: If the file has no network of this name.
    """
    import numpy as np
    from safetensors.numpy import save_file

    if not license.isprintable():
        raise ConfigError("the license holds unprintable characters, expected an SPDX id such as MIT.")
    network = read_network(path, entry=entry)
    check_tensors(network, _layout(network, os.fspath(path)) if expected is None else expected, where=os.fspath(path))
    arrays = {name: tensor.numpy() for name, tensor in network.tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise IntegrityError(f"{os.fspath(path)}: {name} holds NaN or infinity, expected finite weights.")
    converted = Converted(
        path=Path(out),
        network=network,
        license=license or SOURCE_LICENSE,
        stated=bool(license),
        source_sha256=sha256_file(path),
    )
    with atomic_folder(out, overwrite=overwrite, marker=CONFIG_NAME, error=BundleError) as folder:
        save_file(arrays, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        atomic_write_bytes(folder / CONFIG_NAME, msgspec.json.format(msgspec.json.encode(_config(converted)), indent=2))
        atomic_write_bytes(folder / "README.md", _card(converted, Path(path).name).encode())
    return converted


def is_converted(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, entry: str = "ema", license: str = ""
) -> bool:
    """Return whether ``out`` already holds the result of ``convert_pickle`` with these arguments.

    Raises:
        ScmError: As ``convert_pickle``.
    """
    folder = Path(out)
    try:
        found = msgspec.json.decode(read_regular(folder / CONFIG_NAME, most=CONFIG_MAX_BYTES))["source_sha256"]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return False
    if found != sha256_file(path):
        return False
    remove_leftovers(folder.parent)
    with staging(folder.parent) as temp:
        made = convert_pickle(path, temp / "made", entry=entry, license=license).path
        names = sorted(file.name for file in made.iterdir())
        there = sorted(file.name for file in folder.iterdir())
        return names == there and all(sha256_file(made / name) == sha256_file(folder / name) for name in names)


def check_tensors(network: PickledNetwork, expected: Mapping[str, Shape], *, where: str) -> None:
    """Check names and shapes of tensors against an architecture, if given.

    Raises:
        IntegrityError: If tensors are missing, unexpected or of another shape; the message names the first of each.
    """
    found = {name: tensor.shape for name, tensor in network.tensors.items()}
    if not expected or found == dict(expected):
        return
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    shapes = f"{found[other[0]]}, expected {expected[other[0]]} of {other[0]}" if other else "none"
    raise IntegrityError(
        f"{where}: the tensors of {network.entry!r} ({network.class_name}) are not those of its architecture: "
        f"{len(missing)} missing (first: {missing[0] if missing else 'none'}), {len(extra)} unknown (first: "
        f"{extra[0] if extra else 'none'}), {len(other)} of another shape (first: {shapes}). It is another network."
    )


def _layout(network: PickledNetwork, where: str) -> Mapping[str, Shape]:
    if network.class_name != EDM2_CLASS:
        return {}
    try:
        return edm2_shapes(network.arguments)
    except ValueError as exc:
        raise IntegrityError(f"{where} says it is EDM2's {EDM2_CLASS}, but {exc}. It is another network.") from exc


def _config(converted: Converted) -> dict[str, object]:
    network = converted.network
    return {
        "_class_name": IMPORTED_CLASS,
        "network_class": network.class_name,
        "arguments": network.arguments,
        "facts": network.facts,
        "license": converted.license,
        "license_stated_at_import": converted.stated,
        "source_sha256": converted.source_sha256,
    }


def _card(converted: Converted, source: str) -> str:
    network = converted.network
    elements = sum(tensor.nbytes // tensor.storage.element_bytes for tensor in network.tensors.values())
    spdx = not converted.stated
    head = f"license: {converted.license.lower()}" if spdx else "license: other"
    name = "" if spdx else f"\nlicense_name: {msgspec.json.encode(converted.license).decode()}"
    return f"""---
library_name: scm-sdk
{head}{name}
---
# {network.class_name}

{converted.license_line}

The network `{network.entry}` of `{_plain(source)}` (sha256 `{converted.source_sha256}`),
{len(network.tensors)} tensors, {elements} elements, converted by scm-sdk. The names are those of the source's own
`state_dict()`; the code that the source carried was not run and is not here.
"""


def _plain(name: str) -> str:
    return "".join(c if c.isprintable() and c != "`" else "_" for c in name)
