"""``Service``: the open model behind the HTTP API: checks of requests, their execution, and readiness."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .._util.lazy import is_installed
from ..errors import BackendFailure, BackendUnavailable, ConfigError, QueueFull, ShapeError
from ..images import clips_to_uint8, encode_clip, encode_picture, to_uint8
from ..inference.generator import Generator
from ..inference.output import GeneratorOutput
from ..inference.prompts import EMBEDS, MASK
from ..inference.start import StartImages
from ..spec import SamplerSpec
from ..train.data.pictures import decode_picture
from .canary import Bound, Canary, open_reference
from .inference_protocol import is_clip, is_picture, takes_prompt
from .limits import Admission
from .metrics import Metrics
from .options import ServeOptions
from .schemas import FileFormat, Model, RequestError
from .traces import OtelTraces, Traces

P = ParamSpec("P")
T = TypeVar("T")
READY_SECONDS = 5.0
"""For how long an inference of the readiness check counts."""
READY_TIMEOUT = 30.0
SMALL_BODY = 1 << 20
"""Bytes of a request's body without an image."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats of an image to start from."""
MOST_SCANS = 100
"""Of a progressive JPEG file, which has about 10. Each costs a pass over the picture; an empty one takes 12 bytes."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request for images.

    Attributes:
        seeds: One for each image.
        steps: Number of network calls.
        labels: Names or numbers of classes: one for each image, or one for all; None draws them from the seeds.
        others: Further arguments of ``Generator.__call__``: guidance scale, prompt; a list is one for each image.
        image: Images to start from, (1 or N, H, W, C) uint8, one for each image, or one for all; None is noise.
        start_time: When its sampler starts, radians.
        split: Whether each image is a separate request of the batcher, which ends or is dropped separately.
        deadline: When the answer is due, seconds of ``time.monotonic``.
    """

    seeds: tuple[int, ...]
    steps: int
    labels: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
    image: NDArray[np.uint8] | None = None
    start_time: float | None = None
    split: bool
    deadline: float

    def parts(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the requests that it is made of: the position of each one's first image, and its arguments."""
        size = 1 if self.split else len(self.seeds)
        return [
            (
                start,
                {
                    "num_images": size,
                    "seed": list(self.seeds[start : start + size]),
                    "class_labels": self._slice(self.labels, start, size),
                    "num_inference_steps": self.steps,
                    "output_type": "raw",
                    **self.arguments(start, size),
                },
            )
            for start in range(0, len(self.seeds), size)
        ]

    def arguments(self, start: int, size: int) -> dict[str, Any]:
        """Return the arguments of some of its images other than number, seeds, labels and steps."""
        found = {name: self._slice(value, start, size) for name, value in self.others.items()}
        if self.image is not None:
            found["image"] = self.image if len(self.image) == 1 else self.image[start : start + size]
            found["start_time"] = self.start_time
        return found

    @staticmethod
    def _slice(value: Any, start: int, size: int) -> Any:
        return value[start : start + size] if isinstance(value, list) else value


class Service:
    """An open model. Its coroutines run on one event loop.

    Attributes:
        options: What the server was started with.
        metrics: The server's metrics.
        admission: The images that were accepted and are not yet made.
        model: What is served, for the API.
        spec: The sampler of the default number of steps.
        traces: Where spans of requests go.
        max_body: Bytes of a request's body.
        body_bytes: Of all bodies that are held now.
    """

    def __init__(
        self,
        gen: Generator,
        options: ServeOptions,
        canary: Canary | None,
        metrics: Metrics,
        traces: Traces | None = None,
    ) -> None:
        opened = gen.opened()
        spec = opened.spec
        name = gen.source.bundle.manifest.name if gen.source.bundle is not None else gen.source.path.name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "model"  # it is a part of paths
        self.options, self.metrics, self.spec = options, metrics, spec
        self.admission = Admission.of(options.max_queue, options.max_images_per_key)
        steps = options.steps or gen.source.steps
        self._starts = StartImages(gen.source, device=None, num_threads=None)
        starts = {count: time for count, time in self._starts.times().items() if count in steps}
        size = spec.image_shape[-2:] if is_picture(spec) or is_clip(spec) else None
        self.model = Model(
            id=name,
            build_id=gen.source.build_id,
            backend=opened.row.backend,
            precision=opened.row.precision,
            steps=sorted(steps),
            default_steps=spec.num_inference_steps,
            size=None if size is None else f"{size[1]}x{size[0]}",
            num_classes=spec.num_classes,
            class_names=list(spec.class_names),
            takes_prompt=takes_prompt(spec),
            guidance_range=spec.guidance_range,
            max_images=options.max_images,
            start_times=starts,
            frames=spec.image_shape[1] if is_clip(spec) else None,
            formats=_formats(spec),
        )
        room = 4 * (math.prod(spec.image_shape) // 3 + 1) if starts else 0  # of an image in base64
        self.max_body = SMALL_BODY + room if options.max_body is None else options.max_body
        self.body_bytes = 0
        self.traces = Traces() if traces is None else traces
        self._path = gen.source.path
        self._gen, self._canary = gen, canary
        self._batcher = gen.batcher(max_queue_size=max(options.max_queue, spec.max_batch))
        # Draw noise, make files: short work in NumPy and zlib, which leave the interpreter to others.
        self._threads = ThreadPoolExecutor(4, "scm-serve")
        self._dropping: set[asyncio.Future[None]] = set()
        self._seconds_per_image = 0.05
        self._ready: tuple[float, str | None] = (-math.inf, None)
        self._checking = asyncio.Lock()
        self._closed = threading.Event()

    @classmethod
    def open(cls, options: ServeOptions) -> Service:
        """Open the model, every number of steps that is offered, and run each once.

        Raises:
            ConfigError: If the bundle does not have what the options name.
            ScmError: If it cannot be opened.
        """
        traces = OtelTraces() if options.traces else Traces()
        gen = Generator.from_pretrained(
            options.bundle,
            backend=options.backend,
            precision=options.precision,
            device=options.device,
            num_threads=options.num_threads,
            trust_engines=options.trust_engines,
            num_inference_steps=_default(options.steps),
        )
        canary: Canary | None = None
        try:
            _check_inputs(gen)
            starts = StartImages(gen.source, device=None, num_threads=None).times()
            for steps in options.steps or gen.source.steps:
                probe = _probe(gen.opened(steps).spec, starts.get(steps))
                gen(1, seed=0, num_inference_steps=steps, output_type="raw", **probe)
            metrics = Metrics()
            if options.shadow:
                bounds = {steps: Bound.of(gen, steps) for steps in options.steps or gen.source.steps}
                canary = Canary(
                    open_reference(gen, options), bounds, share=options.shadow, tolerated=options.shadow_samples,
                    metrics=metrics,
                )  # fmt: skip
            return cls(gen, options, canary, metrics, traces)
        except BaseException:
            if canary is not None:
                canary.close()
            gen.close()
            traces.close()
            raise

    def close(self) -> None:
        """Finish what was accepted and close the model; may be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._batcher.close()
        self._threads.shutdown()
        if self._canary is not None:
            self._canary.close()
        self._gen.close()
        self.traces.close()
        self.metrics.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def retry_after(self) -> float:
        """Seconds after which there should be room, as fast as images were made lately."""
        return min(60.0, max(1.0, self.admission.images * self._seconds_per_image))

    def check_steps(self, steps: int | None) -> int:
        """Return the number of steps of a request.

        Raises:
            RequestError: If it is not offered.
        """
        if steps is None:
            return self.model.default_steps
        if steps not in self.model.steps:
            raise RequestError(
                "invalid_value",
                f"num_inference_steps is {steps}, expected one of {', '.join(map(str, self.model.steps))}.",
                param="num_inference_steps",
            )
        return steps

    def check_start(self, has_image: bool, start_time: float | None, steps: int | None) -> int:
        """Return the number of steps of a request, which with an image is that of a sampler that starts there.

        Raises:
            RequestError: If the model takes no image, there is one without the other, or no such sampler is offered.
        """
        if has_image and not self.model.start_times:
            raise RequestError(
                "invalid_value",
                f"image is given, but no sampler of {self.model.id} that is offered starts from an image. Add one to "
                "the bundle: scm-export onnx or import with --start-time, of a latent model with --encoder.",
                param="image",
            )
        if not has_image and start_time is None:
            return self.check_steps(steps)
        with self._translated("start_time"):
            found = self._starts.steps(has_image or None, start_time, steps, offered=tuple(self.model.start_times))
        assert found is not None, "an image has a sampler"
        return found

    async def decode_image(self, image: str | bytes) -> NDArray[np.uint8]:
        """Return the image of a request, (1, H, W, C), of the model's size.

        Args:
            image: A PNG, JPEG or WebP file, also as text: in base64, or a ``data:`` URL of it.

        Raises:
            RequestError: If it is none, or has another size; that is found before its pixels are decoded.
        """
        channels, height, width = self.spec.image_shape
        return await self.apart(_decode_image, image, (height, width, channels))

    async def apart(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on a thread for short work, so that the answers to others continue."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **kwargs))

    def check_count(self, count: int, param: str = "n") -> int:
        """Return the number of images of a request.

        Raises:
            RequestError: If one request may not ask for so many.
        """
        if not 1 <= count <= self.options.max_images:
            raise RequestError(
                "invalid_value", f"{param} is {count}, expected 1..{self.options.max_images} images.", param=param
            )
        return count

    def due(self, timeout: float | None) -> float:
        """Return the deadline of a request that arrives now, seconds of ``time.monotonic``."""
        return time.monotonic() + min(self.options.deadline, timeout or math.inf)

    async def run(self, call: Call, key: str) -> AsyncGenerator[tuple[int, GeneratorOutput], None]:
        """Make the images of a request, unless there is no room.

        Closing the iterator, or an error, cancels the images that are still queued.

        Args:
            call: The request.
            key: Name of the caller's key.

        Yields:
            The position of the first image, and the output, ``(N, *image_shape)`` float32 in data units.

        Raises:
            RequestError: If it is refused, not made in time, or wrong.
            ScmError: If the model fails.
        """
        self.admission.take(len(call.seeds), key, retry_after=self.retry_after)
        self.metrics.waiting.set(self.admission.images)
        loop, held = asyncio.get_running_loop(), len(call.seeds)
        futures: list[tuple[int, Future[GeneratorOutput]]] = []

        def release(images: int) -> None:
            self.admission.release(images, key)
            self.metrics.waiting.set(self.admission.images)

        def done(images: int, future: Future[GeneratorOutput]) -> None:
            if future.cancelled():
                self.metrics.canceled.inc(images)
            loop.call_soon_threadsafe(release, images)

        def submit() -> None:
            nonlocal held
            for start, arguments in call.parts():
                future = self._batcher.submit(timeout=0, **arguments)
                held -= arguments["num_images"]
                future.add_done_callback(partial(done, arguments["num_images"]))
                futures.append((start, future))

        pending: dict[asyncio.Future[GeneratorOutput], int] = {}
        generating = ExitStack()
        generating.enter_context(
            self.traces.part("generate", {"scm.images": len(call.seeds), "scm.num_inference_steps": call.steps})
        )
        late = RequestError(
            "deadline_exceeded", "the images were not made in time. Try again later.", retry_after=self.retry_after
        )

        async def drop() -> None:
            """Drop what is still submitted; an encoder of prompts or images may take seconds for it."""
            await asyncio.wait([submitted])
            submitted.exception()  # was raised before, or no request waits for it
            for _, future in futures:
                future.cancel()
            if held:  # never submitted
                release(held)

        submitted = loop.run_in_executor(self._threads, submit)
        try:
            with self._translated():
                try:
                    await asyncio.wait_for(asyncio.shield(submitted), max(0.0, call.deadline - time.monotonic()))
                except asyncio.TimeoutError:
                    raise late from None
            pending.update((asyncio.wrap_future(future), start) for start, future in futures)
            while pending:
                ready, _ = await asyncio.wait(
                    pending, timeout=max(0.0, call.deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
                )
                if not ready:
                    raise late
                for each in ready:
                    start = pending.pop(each)
                    with self._translated():
                        output = each.result()
                    self._observe(output, call, start)
                    yield start, output
        finally:
            generating.close()
            for waited in pending:
                waited.cancel()
            dropping = asyncio.ensure_future(drop())
            self._dropping.add(dropping)
            dropping.add_done_callback(self._dropping.discard)
            if submitted.done():
                await dropping

    async def run_whole(self, call: Call, key: str) -> GeneratorOutput:
        """Make the images of a request; return them as one output.

        Arguments and errors are those of ``run``.
        """
        async with aclosing(self.run(call, key)) as outputs:
            parts = [output async for _, output in in_order(outputs)]
        labels = [label for part in parts for label in part.class_labels or ()]
        return replace(
            parts[0],
            images=np.concatenate([part.images for part in parts]),
            seeds=call.seeds,
            class_labels=tuple(labels) if labels else None,
        )

    async def files(self, output: GeneratorOutput, kind: FileFormat, fps: float) -> list[bytes]:
        """Return an output's pictures or clips as files.

        Raises:
            BackendFailure: If one holds NaN or infinity.
            RequestError: If this machine cannot write the format.
        """
        with self.traces.part("encode", {"scm.images": len(output.seeds)}):
            return await self.apart(_files, self.arrays, output, kind, fps)

    def arrays(self, output: GeneratorOutput) -> NDArray[np.uint8]:
        """Return an output's pictures, (N, H, W, C), or clips, (N, T, H, W, C), uint8.

        Raises:
            BackendFailure: If one holds NaN or infinity.
        """
        if not np.isfinite(output.images).all():
            raise BackendFailure(f"{output.info.backend} returned NaN or infinity for one of the seeds {output.seeds}.")
        convert = clips_to_uint8 if is_clip(self.spec) else to_uint8
        return convert(output.images, self.spec.value_range)

    async def check_ready(self) -> str | None:
        """Return why the model is not ready, or None, by an inference at most every few seconds."""
        if self._canary is not None and self._canary.fault and not self.options.shadow_warn:
            return self._canary.fault
        async with self._checking:
            then, problem = self._ready
            if time.monotonic() - then < READY_SECONDS:
                return problem
            infer = partial(self._gen, 1, seed=0, output_type="raw", **_probe(self.spec))
            try:
                work = asyncio.get_running_loop().run_in_executor(None, infer)
                output = await asyncio.wait_for(work, READY_TIMEOUT)
                problem = None if np.isfinite(output.images).all() else "the model returns NaN or infinity"
            except asyncio.TimeoutError:
                problem = f"an inference did not end within {READY_TIMEOUT:.0f} s"
            except Exception as exc:
                _LOG.error("the readiness check failed", exc_info=exc)
                problem = f"an inference failed: {type(exc).__name__}"
            self._ready = time.monotonic(), problem
            return problem

    def _observe(self, output: GeneratorOutput, call: Call, start: int) -> None:
        """Update the metrics with an output, and offer it to the canary."""
        count, batches, sample = len(output.seeds), output.info.batches, output.info.timings["sample_ms"] / 1e3
        self.metrics.images.inc(count)
        for size in batches:
            for _ in range(size if len(batches) > 1 else count):
                self.metrics.batch_size.observe(size)
        self.metrics.sample_seconds.observe(sample)
        self._seconds_per_image += 0.1 * (sample / sum(batches) - self._seconds_per_image)
        if self._canary is not None:
            for i in range(count):
                self._canary.offer(output, i, call.arguments(start + i, 1))

    def _translated(self, param: str | None = None) -> _Translated:
        return _Translated(self, param)


async def in_order(parts: AsyncGenerator[tuple[int, T], None]) -> AsyncGenerator[tuple[int, T], None]:
    """Wait for all parts of an answer; yield them by position."""
    for part in sorted([part async for part in parts], key=lambda part: part[0]):
        yield part


class _Translated:
    """Translates errors of the caller to ``RequestError``, without paths of this machine."""

    def __init__(self, service: Service, param: str | None) -> None:
        self._service, self._param = service, param

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, QueueFull):
            raise RequestError("queue_full", str(exc), retry_after=self._service.retry_after) from exc
        if isinstance(exc, ConfigError | ShapeError):
            text = str(exc).replace(str(self._service._path), "the model")
            raise RequestError("invalid_value", text, param=self._param) from exc


def _check_inputs(gen: Generator) -> None:
    """Refuse a model with inputs that requests cannot provide."""
    names = {tensor.name for tensor in gen.opened().spec.conditioning}
    if unknown := names - {EMBEDS, MASK}:
        raise ConfigError(
            f"the model at {gen.source.path} needs the inputs {', '.join(sorted(unknown))}, expected class labels, a "
            "guidance scale or a prompt, which requests can name. Serve it with Generator in a program of your own."
        )
    if names and gen.source.text_encoder is None and gen.source.prompt_graph is None:
        raise ConfigError(
            f"the model at {gen.source.path} makes pictures of a text and came without its text encoder, expected "
            "both. Import it again with the text encoder."
        )


def _probe(spec: SamplerSpec, start_time: float | None = None) -> dict[str, Any]:
    """Return the arguments, other than the seed, of an inference for warm-up and readiness checks."""
    probe: dict[str, Any] = {}
    if start_time is not None:
        channels, height, width = spec.image_shape
        probe = {"image": np.zeros((height, width, channels), np.uint8), "start_time": start_time}
    if spec.guidance_range is not None and spec.default_guidance is None:
        probe["guidance_scale"] = spec.guidance_range[0]
    made = {t.name: np.zeros((1, *t.shape), t.dtype) for t in spec.conditioning if t.kind == "values"}
    return probe | ({"conditioning": made} if made else {})


def _formats(spec: SamplerSpec) -> list[FileFormat]:
    """Return the formats of a model's files, the usual one first."""
    if is_picture(spec):
        return ["png", "jpeg", "webp"]
    if not is_clip(spec):
        return []
    has_even_sides = not any(side % 2 for side in spec.image_shape[-2:])
    return ["webp", "gif", "mp4"] if has_even_sides and is_installed("av") else ["webp", "gif"]


def _files(arrays: Any, output: GeneratorOutput, kind: FileFormat, fps: float) -> list[bytes]:
    found = arrays(output)
    if found.ndim == 4:
        return [encode_picture(picture, f".{kind}") for picture in found]
    try:
        return [encode_clip(clip, f".{kind}", fps=fps) for clip in found]
    except BackendUnavailable as exc:  # a build of PyAV without H.264
        raise RequestError("invalid_value", str(exc), param="output_format") from exc


def _from_base64(text: str) -> bytes:
    head, comma, rest = text.partition(",") if text.startswith("data:") else ("", "", text)
    if comma and not head.endswith(";base64"):
        raise _wrong_image("a data: URL that is not in base64")
    try:
        return base64.b64decode(rest, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _wrong_image(f"no base64 ({exc})") from None


def _decode_image(image: str | bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """See ``Service.decode_image``; ``shape`` is (H, W, C)."""
    content = _from_base64(image) if isinstance(image, str) else image
    if (scans := content.count(b"\xff\xda")) > MOST_SCANS and content.startswith(b"\xff\xd8"):
        raise _wrong_image(f"a JPEG file of {scans} scans, of which {MOST_SCANS} are allowed")
    height, width, channels = shape
    try:
        pixels = decode_picture(content, shape=(height, width, 3), formats=IMAGE_FORMATS)
        if channels == 1 and (pixels != pixels[..., :1]).any():
            raise ValueError("it has colors")
        return np.ascontiguousarray(pixels[None, ..., :channels])
    except ValueError as exc:
        kind = "gray" if channels == 1 else "RGB"
        raise RequestError(
            "invalid_value",
            f"image cannot be taken: {exc}. The model takes a PNG, JPEG or WebP file of {height}x{width} pixels "
            f"(height x width), {kind}; in JSON it is in base64.",
            param="image",
        ) from None


def _wrong_image(found: str) -> RequestError:
    return RequestError(
        "invalid_value", f"image is {found}, expected a PNG, JPEG or WebP file, in JSON in base64.", param="image"
    )


def _default(steps: tuple[int, ...]) -> int | None:
    """Return the default of the offered numbers of steps: 2 if offered, else the first; None if none are named."""
    return None if not steps else 2 if 2 in steps else steps[0]
