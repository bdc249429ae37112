"""Shards: write one, list those that are complete, read them back, join them into one file.

A shard is complete when its record, a JSON file with the hash of the shard and of the pixels of each image, is there.
The record is written last, so a process that is killed leaves a shard without a record, which is written again. Nothing
in a shard depends on the time or on who writes it: a shard that is written twice has the same bytes.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._util.events import SILENT, Events
from .._util.files import atomic_file, sha256_bytes, sha256_file, sha256_stream
from .._util.lazy import require
from ..errors import ConfigError, IntegrityError
from ..images import encode_picture
from ..inference.generator import Generator
from .plan import SamplePlan, read_plan
from .store import Store

_MOST_BYTES = 1 << 31
"""Largest file inside a shard that is read back."""
_ROWS = 100
"""Images of a row group of Parquet: what its readers hold in memory at a time."""
_FEATURES = b"""{"info": {"features": {"image": {"_type": "Image"}, "seed": {"dtype": "uint64", "_type": "Value"},
 "class_label": {"dtype": "int64", "_type": "Value"}, "sha256": {"dtype": "string", "_type": "Value"}}}}"""
"""Metadata by which Hugging Face's ``datasets`` shows the images as pictures."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image of a shard.

    Attributes:
        seed: Its seed.
        class_label: Its label; None for models without.
        sha256: Hash of its pixels, (H, W, C) uint8 in C order.
    """

    seed: int
    class_label: int | None
    sha256: str


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a complete shard holds.

    Attributes:
        plan: Fingerprint of the plan.
        file: Name of the shard.
        bytes: Its size.
        sha256: Its hash.
        images: Its images in order.
    """

    plan: str
    file: str
    bytes: int
    sha256: str
    images: tuple[ImageRecord, ...]


def shard_name(plan: SamplePlan, shard: int) -> str:
    """Return the name of a shard's file."""
    return f"shards/{shard:08d}.{plan.format}"


def record_name(shard: int) -> str:
    """Return the name of a shard's record."""
    return f"shards/{shard:08d}.json"


def read_record(store: Store, plan: SamplePlan, shard: int) -> ShardRecord | None:
    """Return the record of a complete shard, or None if the shard is to be written.

    Raises:
        IntegrityError: If the record belongs to another plan.
    """
    text = store.read(record_name(shard))
    if text is None:
        return None
    try:
        record = msgspec.json.decode(text, type=ShardRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # cut short by a disk that is not atomic
    if record.plan != plan.fingerprint or record.file != shard_name(plan, shard):
        raise IntegrityError(
            f"{record_name(shard)} in {store.root} belongs to plan {record.plan[:12]}, expected "
            f"{plan.fingerprint[:12]}. Write to another place."
        )
    return record if store.size(record.file) == record.bytes else None


def missing_shards(store: Store, plan: SamplePlan, shards: Sequence[int] | None = None) -> list[int]:
    """Return which shards of a plan, or of some of them, are not complete."""
    return [k for k in (range(plan.num_shards) if shards is None else shards) if read_record(store, plan, k) is None]


def write_shard(
    generator: Generator, store: Store, plan: SamplePlan, shard: int, prompts: Sequence[str] = ()
) -> ShardRecord:
    """Generate the images of one shard and write it, then its record.

    Args:
        generator: The model, opened with the plan's backend, precision and number of steps.
        store: Where to write.
        plan: The plan.
        shard: Number of the shard.
        prompts: The plan's prompts.

    Raises:
        ConfigError: If the generator runs another artifact than the plan's.
        BundleError: If the place cannot be written to.
        BackendFailure: If the model fails.
    """
    row = generator.opened().row
    if generator.source.sha256(row.artifact) != plan.artifact_sha256:
        raise ConfigError(
            f"{generator.source.path} runs {row.artifact}, another artifact than the plan's "
            f"({plan.artifact_sha256[:12]}). Use the bundle that the plan was made with."
        )
    numbers = plan.images_of(shard)
    seeds = [plan.first_seed + i for i in numbers]
    output = generator(
        len(seeds),
        seed=seeds,
        class_labels=[plan.class_labels[i % len(plan.class_labels)] for i in numbers] if plan.class_labels else None,
        prompt=[prompts[i % plan.num_prompts] for i in numbers] if plan.num_prompts else None,
        guidance_scale=plan.guidance_scale,
        num_inference_steps=plan.num_inference_steps,
        batch_size=plan.batch_size,
        output_type="uint8",
    )
    pixels: NDArray[np.uint8] = np.ascontiguousarray(output.images)
    labels = output.class_labels or [None] * len(seeds)
    images = tuple(
        ImageRecord(seed=seed, class_label=label, sha256=sha256_bytes(image.tobytes()))
        for seed, label, image in zip(seeds, labels, pixels, strict=True)
    )
    name = shard_name(plan, shard)
    with store.writing(name) as path:
        _WRITERS[plan.format](path, numbers, pixels, images)
        record = ShardRecord(
            plan=plan.fingerprint, file=name, bytes=path.stat().st_size, sha256=sha256_file(path), images=images
        )
    store.write(record_name(shard), msgspec.json.encode(record))
    return record


def _write_tar(path: Path, numbers: range, pixels: NDArray[np.uint8], images: Sequence[ImageRecord]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, array, image in zip(numbers, pixels, images, strict=True):
            parts = {"png": encode_picture(array, ".png"), "json": msgspec.json.encode(image)}
            if image.class_label is not None:
                parts["cls"] = str(image.class_label).encode()
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:010d}.{suffix}")  # time 0, no owner
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _write_npz(path: Path, numbers: range, pixels: NDArray[np.uint8], images: Sequence[ImageRecord]) -> None:
    arrays: dict[str, NDArray[np.generic]] = {
        "images": pixels,
        "seeds": np.array([image.seed for image in images], np.uint64),
    }
    if images[0].class_label is not None:
        arrays["class_labels"] = np.array([image.class_label for image in images], np.int64)
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_parquet(path: Path, numbers: range, pixels: NDArray[np.uint8], images: Sequence[ImageRecord]) -> None:
    pa, parquet = _pyarrow()
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "seed": pa.uint64(),
            "class_label": pa.int64(),
            "sha256": pa.string(),
        },
        metadata={"huggingface": _FEATURES},
    )
    # PNG files are compressed; without compression and dictionaries the size of the file bounds a reader's memory.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["seed", "class_label"]}
    with parquet.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, len(images), _ROWS):
            rows = [
                msgspec.structs.asdict(image)
                | {"image": {"bytes": encode_picture(array, ".png"), "path": f"{number:010d}.png"}}
                for number, array, image in zip(
                    numbers[start : start + _ROWS], pixels[start : start + _ROWS], images[start : start + _ROWS],
                    strict=True,
                )
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _pyarrow() -> tuple[Any, Any]:
    names, purpose = ("pyarrow", "pyarrow.parquet"), "shards of format 'parquet'"
    pyarrow, parquet = (require(name, extra="parquet", purpose=purpose) for name in names)
    return pyarrow, parquet


_WRITERS: dict[str, Callable[[Path, range, NDArray[np.uint8], Sequence[ImageRecord]], None]] = {
    "tar": _write_tar,
    "npz": _write_npz,
    "parquet": _write_parquet,
}


def read_shard(store: Store, plan: SamplePlan, shard: int) -> tuple[NDArray[np.uint8], ShardRecord]:
    """Return the pixels of a shard, (N, H, W, C) uint8, and its record; every hash is checked.

    Raises:
        IntegrityError: If the shard is not complete, or its bytes or pixels are not those of its record.
    """
    record = read_record(store, plan, shard)
    if record is None:
        raise IntegrityError(
            f"shard {shard} of {store.root} is not complete, expected all {plan.num_shards}. Run the same "
            "scm-export sample again: it writes what is missing."
        )
    count = len(plan.images_of(shard))
    if len(record.images) != count or record.bytes > max(_MOST_BYTES, 8 * count * int(np.prod(plan.shape))):
        raise _damaged(store, record, "has another number of images or another size than its plan")
    with store.reading(record.file) as file:
        if sha256_stream(file) != record.sha256:
            raise _damaged(store, record, "has other bytes than its record")
        file.seek(0)
        try:
            pixels = _READERS[plan.format](file, plan)
        except (OSError, ValueError, KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile) as exc:
            raise _damaged(store, record, f"cannot be read: {exc}") from exc
    if pixels.shape != (count, *plan.shape) or pixels.dtype != np.uint8:
        raise _damaged(store, record, f"holds {pixels.shape} {pixels.dtype}")
    for image, array in zip(record.images, pixels, strict=True):
        if sha256_bytes(array.tobytes()) != image.sha256:
            raise _damaged(store, record, f"has other pixels for seed {image.seed}")
    return pixels, record


def _damaged(store: Store, record: ShardRecord, what: str) -> IntegrityError:
    return IntegrityError(
        f"{record.file} in {store.root} {what}. Delete it and its .json file, and run the same scm-export sample again."
    )


def _read_tar(file: IO[bytes], plan: SamplePlan) -> NDArray[np.uint8]:
    pictures = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if not member.name.endswith(".png"):
                continue
            content = archive.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name} is no file")
            pictures.append(_read_picture(content, member.name, plan))
    return np.stack(pictures)


def _read_picture(content: IO[bytes], name: str, plan: SamplePlan) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(content, formats=["PNG"]) as picture:
            if picture.size != (plan.shape[1], plan.shape[0]):
                raise ValueError(f"{name} has {picture.size} pixels")
            return np.asarray(picture).reshape(plan.shape)
    except ValueError:
        raise
    except Exception as exc:  # Pillow raises many
        raise ValueError(f"{name} is no picture: {exc}") from exc


def _read_npz(file: IO[bytes], plan: SamplePlan) -> NDArray[np.uint8]:
    with np.load(file, allow_pickle=False) as arrays:
        images: NDArray[np.uint8] = arrays["images"]
    return images


def _read_parquet(file: IO[bytes], plan: SamplePlan) -> NDArray[np.uint8]:
    pa, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(file)
        found = table.metadata
        if found.num_rows > plan.shard_size:
            raise ValueError(f"it has {found.num_rows} rows")
        for group in map(found.row_group, range(found.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.compression != "UNCOMPRESSED" or not set(column.encodings) <= {"PLAIN", "RLE"}:
                    raise ValueError(f"{column.path_in_schema} is compressed")  # a small file could fill the memory
        pictures = [
            _read_picture(io.BytesIO(row["image"]["bytes"]), row["image"]["path"], plan)
            for batch in table.iter_batches(_ROWS, columns=["image"])
            for row in batch.to_pylist()
        ]
    except (pa.ArrowException, TypeError) as exc:
        raise ValueError(str(exc)) from exc
    return np.stack(pictures)


_READERS: dict[str, Callable[[IO[bytes], SamplePlan], NDArray[np.uint8]]] = {
    "tar": _read_tar,
    "npz": _read_npz,
    "parquet": _read_parquet,
}


def merge(store: Store, out: Path | None, *, events: Events = SILENT) -> SamplePlan:
    """Check every shard of a finished batch generation and join the images into one ``.npz`` file.

    The file has the form that FID tools of guided diffusion read: ``arr_0`` (N, H, W, C) uint8, and ``arr_1`` (N,)
    int64, the labels, where there are labels. Memory holds one shard at a time.

    Args:
        store: Where the shards are.
        out: The file; None checks only.
        events: Receives a step after each shard, with the images read.

    Raises:
        ConfigError: If the store has no plan.
        IntegrityError: If a shard is missing or damaged.
        ScmError: If the file cannot be written.
    """
    plan = read_plan(store)
    if plan is None:
        raise ConfigError(f"{store.root} holds no batch generation, expected a plan.json. Start one: scm-export sample")
    labels: list[int] = []

    def images() -> Iterator[bytes]:
        done = 0
        for shard in range(plan.num_shards):
            pixels, record = read_shard(store, plan, shard)
            labels.extend(image.class_label for image in record.images if image.class_label is not None)
            done += len(pixels)
            events.step("images", done, plan.num_images)
            yield pixels.tobytes()

    if out is None:
        for _ in images():
            pass
        return plan
    if out.suffix != ".npz":
        raise ConfigError(f"{out} ends in {out.suffix!r}, expected .npz.")
    with atomic_file(out) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            shape = (plan.num_images, *plan.shape)
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for data in images():
                member.write(data)
        if labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(labels, np.int64), allow_pickle=False)
    return plan
