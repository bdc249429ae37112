"""The plan of a batch generation: all that determines its images, and nothing about who computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from .._util.files import sha256_bytes
from .._util.lazy import require
from ..errors import ConfigError
from ..inference.generator import Generator
from ..inference.request import check_count, make_request
from ..noise import check_seed
from .store import Store

ShardFormat = Literal["tar", "npz", "parquet"]
SHARD_FORMATS: tuple[str, ...] = get_args(ShardFormat)
PLAN_NAME = "plan.json"
PROMPTS_NAME = "prompts.txt"
DEFAULT_SHARD_SIZE = 1000


class SamplePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is generated. Image i has the seed ``first_seed + i`` and is in shard ``i // shard_size``.

    Attributes:
        num_images: Number of images of all shards.
        shard_size: Images of a shard; the last one may hold fewer.
        first_seed: Seed of image 0.
        class_labels: Labels by number, image i has ``class_labels[i % len]``; () lets each seed draw its own.
        num_prompts: Number of prompts, image i has prompt ``i % num_prompts``; 0 for models without.
        prompts_sha256: Hash of the prompts, a line each.
        guidance_scale: Guidance scale; None is the model's default.
        num_inference_steps: Network calls of an image.
        batch_size: Images that run at once; a shard is always cut into the same batches.
        backend: Library that runs the artifact.
        precision: Precision of the artifact.
        artifact_sha256: Hash of the artifact.
        build_id: Identity of the bundle.
        shape: (height, width, channels) of an image.
        format: ``tar``, a PNG and a JSON file for each image, as WebDataset reads it; ``parquet``, a row with a
            PNG file for each image, as Hugging Face's ``datasets`` reads it; or ``npz``, arrays ``images`` (N, H, W, C)
            uint8, ``seeds`` uint64 and ``class_labels`` int64.
    """

    num_images: int
    shard_size: int
    first_seed: int
    class_labels: tuple[int, ...]
    num_prompts: int
    prompts_sha256: str
    guidance_scale: float | None
    num_inference_steps: int
    batch_size: int
    backend: str
    precision: str
    artifact_sha256: str
    build_id: str
    shape: tuple[int, int, int]
    format: ShardFormat

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_images // self.shard_size)

    @property
    def fingerprint(self) -> str:
        """Hash of the plan; every shard names it."""
        return sha256_bytes(msgspec.json.encode(self))

    def images_of(self, shard: int) -> range:
        """Return the numbers of the images of a shard."""
        return range(shard * self.shard_size, min(self.num_images, (shard + 1) * self.shard_size))


def make_plan(
    generator: Generator,
    *,
    num_images: int,
    shard_size: int = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    class_labels: Sequence[int | str] = (),
    prompts: Sequence[str] = (),
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    format: ShardFormat = "tar",
) -> SamplePlan:
    """Return the plan of images of a generator that was opened for its number of steps.

    The backend and the artifact that the generator chose are part of the plan, so that every machine runs the same.

    Args:
        generator: The model.
        num_images: Number of images.
        shard_size: Images of a shard.
        seed: Seed of the first image.
        class_labels: Labels by number or name, repeated in order; () lets each seed draw its own.
        prompts: Prompts of a text-to-image model, repeated in order.
        guidance_scale: Guidance scale; None is the model's default.
        batch_size: Images that run at once; None is the largest batch.
        format: Format of the shards.

    Raises:
        ConfigError: If an argument is out of range or the model returns no pictures.
        BackendUnavailable: If the format's library is not installed.
    """
    opened = generator.opened()
    spec, row = opened.spec, opened.row
    if format not in SHARD_FORMATS:
        raise ConfigError(f"format is {format!r}, expected one of {', '.join(SHARD_FORMATS)}.")
    if format == "parquet":
        require("pyarrow.parquet", extra="parquet", purpose="format 'parquet'")
    if spec.output != "pixels" or len(spec.image_shape) != 3 or spec.image_shape[0] not in (1, 3):
        raise ConfigError(
            f"the model returns {spec.output} of shape {spec.image_shape}, expected pictures (C, H, W) with 1 or 3 "
            "channels. Call the Generator with output_type='raw' for anything else."
        )
    if any("\n" in prompt or not prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty or has several lines, expected one line of text each.")
    check_count("num_images", num_images)
    check_seed(check_seed(seed) + num_images - 1)
    size = check_count("batch_size", batch_size or spec.max_batch, most=spec.max_batch)
    labels: tuple[int, ...] = ()
    if class_labels:
        checked = make_request(spec, num_images=len(class_labels), seed=0, class_labels=list(class_labels))
        labels = checked.class_labels or ()
    channels, height, width = spec.image_shape
    text = "\n".join(prompts).encode()
    return SamplePlan(
        num_images=num_images,
        shard_size=min(check_count("shard_size", shard_size), num_images),
        first_seed=seed,
        class_labels=labels,
        num_prompts=len(prompts),
        prompts_sha256=sha256_bytes(text) if prompts else "",
        guidance_scale=guidance_scale,
        num_inference_steps=spec.num_inference_steps,
        batch_size=size,
        backend=row.backend,
        precision=row.precision,
        artifact_sha256=generator.source.sha256(row.artifact),
        build_id=generator.source.build_id,
        shape=(height, width, channels),
        format=format,
    )


def start_or_resume(store: Store, plan: SamplePlan, prompts: Sequence[str] = ()) -> None:
    """Write a plan to a new place, or check that the plan there is the same.

    Raises:
        ConfigError: If other images were begun there; the message names the first field that differs.
    """
    there = read_plan(store)
    if there is None:
        if prompts:
            store.write(PROMPTS_NAME, "\n".join(prompts).encode())
        store.write(PLAN_NAME, msgspec.json.format(msgspec.json.encode(plan), indent=1))
        return
    if there != plan:
        name = next(f for f in plan.__struct_fields__ if getattr(plan, f) != getattr(there, f))
        raise ConfigError(
            f"{store.root} holds images with {name} {getattr(there, name)!r}, expected {getattr(plan, name)!r} as "
            "asked for now. Write to another place, or ask for the same images."
        )


def read_plan(store: Store) -> SamplePlan | None:
    """Return the plan of a place, or None if there is none.

    Raises:
        ConfigError: If it cannot be read.
    """
    text = store.read(PLAN_NAME)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=SamplePlan)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{PLAN_NAME} in {store.root} cannot be read: {exc}. Write to another place.") from exc


def read_prompts(store: Store, plan: SamplePlan) -> list[str]:
    """Return the prompts of a plan.

    Raises:
        ConfigError: If they are not those of the plan.
    """
    if not plan.num_prompts:
        return []
    text = store.read(PROMPTS_NAME) or b""
    if sha256_bytes(text) != plan.prompts_sha256:
        raise ConfigError(
            f"{PROMPTS_NAME} in {store.root} was changed since the plan was written. Write to another place."
        )
    return text.decode().split("\n")
