"""Read the tensors of a ``.pt`` or ``.pth`` file, as ``torch.save`` writes it, without torch and without executing it.

Such a file is a zip file without compression: ``NAME/data.pkl``, a pickle of a dict of tensors, and ``NAME/data/KEY``,
the bytes of each storage. The pickle is read by ``machine``, storages are views of the mapped file.
"""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

from .._util.files import open_regular
from ..bundle.archive import ZIP_ERRORS, CappedReader
from ..errors import BundleError, ConfigError, IntegrityError
from .allowed import Allowed, Budget
from .machine import read_pickle
from .network import MAX_FILE_BYTES, MAX_NAMES, dict_of_pairs
from .tensors import STORAGE_DTYPES, Storage, StoredTensor, rebuild_parameter, rebuild_tensor

_MAX_MEMBERS = 100_000
_DIRECTORY_BYTES = _MAX_MEMBERS * 256
_LOCAL_HEADER = 30
"""Bytes of a member's header, before its name and its extra field, whose lengths are at bytes 26 and 28."""
_TABLE = {
    "collections.OrderedDict": Allowed(call=dict_of_pairs, new=dict),
    "torch._utils._rebuild_tensor_v2": Allowed(call=rebuild_tensor),
    "torch._utils._rebuild_parameter": Allowed(call=rebuild_parameter),
    **{f"torch.{name}": Allowed() for name in STORAGE_DTYPES},
}


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict by name; nothing of the file is executed.

    Raises:
        BundleError: If the file does not exist, is too large, is compressed, or names an unknown global.
        IntegrityError: If it is truncated or not such a file.
        ConfigError: If it holds something else than a dict of tensors.
    """
    path = Path(path)
    data, members = _open(path)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise IntegrityError(f"{path} holds {len(pickles)} files data.pkl, expected one, as torch.save writes it.")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and bytes(order) != b"little":
        raise BundleError(
            f"{path} was written by a big-endian machine, expected little-endian. Save it again elsewhere."
        )
    storages: dict[str, Storage] = {}

    def storage(persistent_id: Any) -> Storage:
        """Resolve ``("storage", type, key, device, count)``."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5 or persistent_id[0] != "storage":
            raise ValueError("a persistent id that is not a storage's")
        _, kind, key, _, count = persistent_id
        dtype, size = STORAGE_DTYPES[str(getattr(kind, "name", "")).removeprefix("torch.")]
        if type(key) is not str or type(count) is not int:
            raise ValueError("a storage without a key and a number of elements")
        if key not in storages:
            found = members.get(f"{folder}data/{key}")
            if found is None or len(found) != count * size:
                raise ValueError(f"storage {key!r} has {-1 if found is None else len(found)} bytes, not {count * size}")
            storages[key] = Storage(dtype, size, found)
        if (storages[key].dtype, storages[key].count) != (dtype, count):
            raise ValueError(f"storage {key!r} has two types")
        return storages[key]

    root, _ = read_pickle(members[pickles[0]], _TABLE, where=str(path), budget=Budget(), persistent=storage)
    if type(root) is not dict or not root or not all(isinstance(value, StoredTensor) for value in root.values()):
        kind = type(root).__name__
        raise ConfigError(f"{path} holds a {kind}, expected a dict of tensors alone, a state dict. Save that one.")
    if len(root) > MAX_NAMES:
        raise BundleError(f"{path} holds {len(root)} tensors, expected at most {MAX_NAMES}. It is refused.")
    unfolded = sum(tensor.nbytes for tensor in root.values())
    if unfolded > 2 * len(data):  # many tensors may share a storage; a genuine file uses each about once
        raise BundleError(f"{path} would unfold to {unfolded} bytes, expected at most twice its {len(data)}.")
    return root


def _open(path: Path) -> tuple[memoryview, dict[str, memoryview]]:
    """Map a file; return its bytes, and those of each member of the zip file."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if not 0 < size <= MAX_FILE_BYTES:
                raise BundleError(f"{path} has {size} bytes, expected 1 to {MAX_FILE_BYTES}. It is refused.")
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            reader = CappedReader(io.FileIO(os.dup(stream.fileno())))
        with reader:
            reader.limit = _DIRECTORY_BYTES
            with zipfile.ZipFile(reader) as archive:
                found = archive.infolist()
    except ZIP_ERRORS as exc:
        raise IntegrityError(
            f"{path} is damaged or no file of torch.save: {exc}. Expected a .pt file in the format of torch 1.6 or "
            "later."
        ) from exc
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror or exc}. Check the path.") from exc
    if len(found) > _MAX_MEMBERS:
        raise BundleError(f"{path} holds {len(found)} files, expected at most {_MAX_MEMBERS}. It is refused.")
    members: dict[str, memoryview] = {}
    for member in found:
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != member.file_size
            or member.flag_bits & 1
        ):
            raise BundleError(f"{path}: {member.filename} is compressed or encrypted, expected a plain stored file.")
        header = data[member.header_offset : member.header_offset + _LOCAL_HEADER]
        if len(header) != _LOCAL_HEADER or bytes(header[:4]) != b"PK\x03\x04":
            raise IntegrityError(f"{path}: {member.filename} has no header. The file is damaged; copy it again.")
        start = (
            member.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        )
        if start + member.file_size > len(data) or member.filename in members:
            raise IntegrityError(f"{path}: {member.filename} is cut off or there twice. Copy the file again.")
        members[member.filename] = data[start : start + member.file_size]
    return data, members
