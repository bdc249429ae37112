"""``Generator``: generate images from a bundle or a checkpoint with any backend.

    with Generator.from_pretrained("runs/avatars") as gen:
        out = gen(num_images=4, class_labels="robot", seed=1234)
        out.images[0].save("robot.png")

Threads: one generator may be called from many threads. Opening is done once under a lock; running is as parallel as the
backend allows (ONNX Runtime: fully, torch: one call at a time). ``batcher`` runs the calls of threads in shared
batches.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, overload

import numpy as np

from .._util.arguments import check_names, checked_names
from .._util.events import SILENT, Events
from .._util.publish import undisturbed
from ..bundle.bundle import Bundle
from ..bundle.manifest import ImageSize
from ..bundle.signing import Signer
from ..errors import BundleError, ConfigError, IntegrityError, UnknownArgument
from .backends import Backend
from .batching import Job, run_in_order
from .output import GeneratorOutput, make_output
from .prompts import EMBEDS, MASK
from .request import (
    Labels,
    OutputType,
    Request,
    Seeds,
    check_count,
    check_image_size,
    check_num_images,
    check_output_type,
    make_request,
)
from .selection import Measured, Plan
from .session import Fallback, Opened, Opener
from .sources import Source, open_source
from .start import StartImages

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

    from .batcher import Batcher
    from .latency import Latency
    from .parity.compare import Parity

Verify = Literal["none", "digest", "remembered", "smoke", "full"]


class OpenOptions(TypedDict, total=False):
    """Options of ``Generator.reopen``, documented at ``Generator.from_pretrained``."""

    backend: str
    precision: str
    device: str | None
    fallback: Fallback
    verify: Verify
    num_threads: int | None
    max_batch: int | None
    num_inference_steps: int | None
    height: int | None
    width: int | None
    trust_engines: bool
    offload: bool
    require_signature: Signer | None


class Generator:
    """Generates images from a bundle or a checkpoint. Create it with ``from_pretrained``.

    Attributes:
        source: The model on disk.
    """

    def __init__(self, source: Source, opener: Opener, arguments: Mapping[str, Any]) -> None:
        self.source = source
        self._opener = opener
        self._arguments = dict(arguments)
        self._prompts = source.prompts(device=arguments["device"], turn=opener.turn)
        self._starts = self._start_images(opener)
        self._others: dict[ImageSize, tuple[Opener, StartImages]] = {}
        """What opens each image size that was asked for."""
        self._max_batch: int | None = arguments["max_batch"]
        self._default_steps: int = arguments["num_inference_steps"]

    def __new__(cls, *made: object, **parts: object) -> Generator:
        """Refuse calls that were meant for ``from_pretrained``."""
        if len(made) + len(parts) != 3 or isinstance(made[0] if made else None, str | os.PathLike):
            raise UnknownArgument(
                "Generator(...) opens no model, expected Generator.from_pretrained(path), where path is a bundle, a "
                "checkpoint, a .scmz file or hf:owner/name."
            )
        return super().__new__(cls)

    @classmethod
    @checked_names("from_pretrained")
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | Bundle,
        *,
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
        fallback: Fallback = "error",
        verify: Verify = "digest",
        num_threads: int | None = None,
        max_batch: int | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        trust_engines: bool = False,
        offload: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        require_signature: Signer | None = None,
    ) -> Generator:
        """Open a model and load it for its default number of steps; other numbers load on first use.

        Args:
            path: Folder of a bundle or a checkpoint (torch only), a ``.scmz`` file, ``hf:owner/name`` on the
                Hugging Face hub, or an open ``Bundle``.
            backend: ``"auto"`` or a name such as ``"torch"``, ``"onnxruntime"``. ``auto`` considers the fp32
                reference and artifacts with a passed parity record, and takes the fastest one measured on this machine
                by ``benchmark``; without measurements ONNX Runtime is preferred over torch. A named backend also runs
                artifacts that were not compared, and, with a warning, artifacts that failed.
            precision: ``"auto"`` or the only precision to use.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None is ``"cpu"``, and the first GPU for engines.
            fallback: Policy if the requested backend, precision or library is not available: ``"error"`` raises;
                ``"warn"`` runs another one with a warning; ``"allow"`` without a warning. Both record it in
                ``out.info.fallback``.
            verify: ``"digest"`` checks the sha256 of each file before it is opened, ``"none"`` its size; ``"smoke"``
                also runs the recorded sample of the default number of steps, ``"full"`` of each. ``"remembered"`` is
                ``"digest"``, but takes the sha256 of a bundle's file from the user's cache if it was hashed before and
                device, inode, size and times of the file are the same. Files that are not opened may be missing, so a
                product can leave out the PyTorch checkpoint.
            num_threads: CPU threads of one call; None is the default of the library.
            max_batch: Largest batch, from 1 to that of the sampler; None is that of the sampler.
            num_inference_steps: Default number of network calls; None is 2 if available.
            height: With ``width``, pixels: default image size of a bundle of several sizes; None is its first.
            width: See ``height``.
            trust_engines: A TensorRT engine is executable code. Engines built on this machine run; others only with
                True, or with ``SCM_TRUST_ENGINES=1`` in the environment.
            offload: Load the parts of the model in turn, for short memory: each call opens the text encoder, closes it,
                then so the sampler and the decoder, which are also loaded once here, as a check. The decoder is a part
                of its own in a split bundle (``scm-export import --split``). Graphs and engines only.
            revision: Branch, tag or commit of a hub id; only a commit is immutable.
            local_files_only: Read a hub id from the cache only, as ``HF_HUB_OFFLINE=1`` does for all.
            require_signature: Open only a model that is exactly as this signer signed it:
                ``PublicKey("key.pub")`` or ``Identity(...)``. All files are hashed.

        Raises:
            IntegrityError: If a required signature is missing, wrong, or does not match the files.
            BundleError: If ``path`` is not a model, or a file is missing or damaged.
            BackendUnavailable: If no suitable backend is installed.
            ConfigError: If an argument is invalid.
            BackendFailure: If a recorded sample is not reproduced.
        """
        for name, value, known in (("verify", verify, Verify), ("fallback", fallback, Fallback)):
            if value not in get_args(known):
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}.")
        size = check_image_size(height, width)
        open_whole = partial(
            open_source, path, verify="digest" if verify == "smoke" or verify == "full" else verify, revision=revision,
            local_files_only=local_files_only, require_signature=require_signature,
        )  # fmt: skip

        def find() -> Source:
            return open_whole() if size is None else open_whole().at_size(size)

        source = find()
        steps = source.default_steps if num_inference_steps is None else num_inference_steps
        arguments = {
            "backend": backend,
            "precision": precision,
            "device": device,
            "fallback": fallback,
            "verify": verify,
            "num_threads": num_threads,
            "max_batch": max_batch,
            "num_inference_steps": check_count("num_inference_steps", steps),
            "height": height,
            "width": width,
            "trust_engines": trust_engines,
            "offload": offload,
            "require_signature": require_signature,
        }
        opener_of = partial(
            Opener, backend=backend, precision=precision, device=device, fallback=fallback, num_threads=num_threads,
            trust_engines=trust_engines, turn=threading.Lock() if offload else None,
        )  # fmt: skip
        if offload and source.bundle is not None and source.num_parts == 1:
            raise ConfigError(
                f"offload is True, but {source.path} has one part, the sampler, expected several to load in turn. "
                "Import or export the model with --split, which makes the decoder a part of its own."
            )
        opener = opener_of(source)
        try:
            opened = opener.get(steps)
        except IntegrityError:  # damaged, or another process published a change since the manifest was read
            with undisturbed(source.path, shared=True, purpose=f"open {source.path}"):
                again = find()
                if again.bundle == source.bundle:
                    raise
                source, opener = again, opener_of(again)
                opened = opener.get(steps)
        if max_batch is not None:
            check_count("max_batch", max_batch, most=opened.spec.max_batch)
        if verify in ("smoke", "full"):
            opener.run_goldens(source.steps if verify == "full" else (steps,))
        return cls(source, opener, arguments)

    @checked_names("the generator")
    def __call__(
        self,
        num_images: int = 1,
        class_labels: Labels | None = None,
        num_inference_steps: int | None = None,
        seed: Seeds | None = None,
        noise: Sequence[np.ndarray] | np.ndarray | None = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        *,
        guidance_scale: float | Sequence[float] | None = None,
        conditioning: Mapping[str, np.ndarray] | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: np.ndarray | None = None,
        prompt_attention_mask: np.ndarray | None = None,
        image: Image | Sequence[Image] | np.ndarray | None = None,
        start_time: float | None = None,
        height: int | None = None,
        width: int | None = None,
        events: Events = SILENT,
    ) -> GeneratorOutput:
        """Generate images.

        Args:
            num_images: Number of images, 1 to 2^20 and at most 4 GiB of samples; run in batches.
            class_labels: One label for all images, or one per image, by name or number; a decimal string that is not a
                name is a number. None draws the label of each image from its seed.
            num_inference_steps: Network calls; None is the default of the generator.
            seed: ``s`` gives the images the seeds s, s+1, ...; a list gives each image its seed. None draws a random s
                and reports it. A seed determines its noise to the bit, for any batch size and position, and its image
                as far as the backend is reproducible; ``docs/gates.md`` states that for each backend.
            noise: Instead of seeds: one ``(num_images, *sample_shape)`` float32 array per step.
            output_type: ``"pil"`` list of PIL images; ``"frames"`` list of them for each clip of a video model, which
                ``out.save`` writes; ``"np"`` (N, H, W, C) or (N, T, H, W, C) float32 in [0, 1];
                ``"pt"`` torch tensor (N, C, H, W) float32 in [0, 1]; ``"uint8"`` (N, H, W, C) uint8;
                ``"raw"`` ``(N, *image_shape)`` float32 in data units, not clipped.
            batch_size: Batch size, at most ``max_batch``; None is ``max_batch``.
            guidance_scale: One number, or one per image, for models with this input.
            conditioning: ``(num_images, ...)`` arrays by name, for models with further inputs.
            prompt: One text for all images, or one per image, for text-to-image models.
            prompt_embeds: Embeddings instead of a prompt: (num_images, L, D) float32, or (1, L, D) for all.
            prompt_attention_mask: Mask of the embeddings, (num_images, L) or (1, L) int64; None keeps every token.
            image: Image to start from, of the model's size: a PIL image, a list of num_images, or an array (H, W, C) or
                (num_images, H, W, C), uint8 or float32 in [0, 1]. A latent model needs its encoder in the bundle.
            start_time: Time, radians, at which noise is added to the image: the first time of a sampler of the bundle,
                which is then taken. A smaller time keeps more of the image.
            height: With ``width``, pixels: one of the bundle's image sizes; None is that of the generator. A seed's
                noise has the shape of the sample, so that images of two sizes have nothing in common.
            width: See ``height``.
            events: Receives a step after each batch, with the images done; ``ProgressBar`` shows it.

        Raises:
            ConfigError: If an argument is out of its range.
            ShapeError: If ``noise`` or ``conditioning`` has the wrong shape or dtype.
            BackendFailure: If the backend's library raised, or images hold NaN.
        """
        start = perf_counter()
        opened, request = self._prepare(
            output_type,
            num_inference_steps,
            num_images=num_images,
            class_labels=class_labels,
            seed=seed,
            noise=noise,
            guidance_scale=guidance_scale,
            conditioning=conditioning,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            image=image,
            start_time=start_time,
            height=height,
            width=width,
        )
        raw, batches, timings = opened.run(request, self._batch_size(opened, batch_size), events)
        info = opened.info(self.source, batches=batches, timings=timings)
        return make_output(request, raw, output_type, info.with_total((perf_counter() - start) * 1e3))

    @overload
    def stream(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[GeneratorOutput]: ...
    @overload
    def stream(
        self, requests: Iterable[Mapping[str, Any]], *, return_exceptions: bool
    ) -> Iterator[GeneratorOutput | Exception]: ...
    @checked_names("stream")
    def stream(
        self, requests: Iterable[Mapping[str, Any]], *, return_exceptions: bool = False
    ) -> Iterator[GeneratorOutput | Exception]:
        """Run many calls and return their outputs in order, with shared batches for small requests.

        Requests with the same number of steps are collected until they fill a batch; each image equals that of its own
        call. A few batches of requests are read ahead. For many threads use ``batcher``.

        Args:
            requests: Keyword arguments of ``__call__``, without ``events`` and ``batch_size``.
            return_exceptions: Yield the exception of a failed request in place of its output, and continue.

        Yields:
            One output per request; ``info.batches`` and ``info.timings`` are those of the shared run.

        Raises:
            ScmError: As ``__call__``, after the outputs of the earlier requests.
        """
        for result in run_in_order(requests, self._job, self.source):
            if isinstance(result, Exception) and not return_exceptions:
                raise result
            yield result

    @checked_names("batcher")
    def batcher(self, *, max_queue_size: int = 256, max_concurrent_batches: int | None = None) -> Batcher:
        """Return a ``Batcher``, which runs the requests of many threads in shared batches.

        Args:
            max_queue_size: Largest number of images that wait.
            max_concurrent_batches: Largest number of batches that run at the same time; None is as many as the cores
                hold calls of ``num_threads``, and 1 where a call takes all cores, a GPU, or the backend runs one at a
                time.
        """
        from .batcher import Batcher, concurrent_batches  # imported here, because futures are slow to import

        if max_concurrent_batches is None:
            max_concurrent_batches = concurrent_batches(self.opened(), self.num_threads)
        return Batcher(
            self._job, self.source, max_queue_size=max_queue_size, max_concurrent_batches=max_concurrent_batches
        )

    @checked_names("plan")
    def plan(self, num_inference_steps: int | None = None) -> Plan:
        """Return every artifact and backend with the reason why it runs or not; ``str()`` is a table.

        Raises:
            ConfigError: If the number of steps is not available.
        """
        return self._opener.plan(self._steps(num_inference_steps))

    @checked_names("opened")
    def opened(self, num_inference_steps: int | None = None) -> Opened:
        """Return the open backend with its artifact, spec and load time."""
        return self._opener.get(self._steps(num_inference_steps))

    @property
    def num_threads(self) -> int | None:
        """CPU threads of one call; None is the default of the library."""
        threads: int | None = self._arguments["num_threads"]
        return threads

    @checked_names("warmup")
    def warmup(self, num_images: int = 1, num_inference_steps: int | None = None) -> float:
        """Run once and discard the images, so that the next call is not the first; return the time in ms."""
        start = perf_counter()
        self(num_images, num_inference_steps=num_inference_steps, seed=0, output_type="raw")
        return (perf_counter() - start) * 1e3

    def reopen(self, **changes: Unpack[OpenOptions]) -> Generator:
        """Open the same model again with other arguments of ``from_pretrained``; this generator stays open.

        The bundle may have received further artifacts in the meantime.

        Raises:
            UnknownArgument: If an argument is unknown.
            IntegrityError: If the path now holds another model. Otherwise as ``from_pretrained``.
        """
        check_names(changes, tuple(self._arguments), of="reopen")
        gen = type(self).from_pretrained(self.source.path, **{**self._arguments, **changes})
        try:
            self.source.check_same_model(gen.source)
        except BundleError:
            gen.close()
            raise
        return gen

    @checked_names("compare")
    def compare(
        self,
        reference: Generator | Backend,
        *,
        seeds: Sequence[int] | None = None,
        batches: Sequence[int | None] | None = None,
        num_inference_steps: int | None = None,
        threshold: float | None = None,
        min_psnr_db: float | None = None,
        reason: str = "",
    ) -> Parity:
        """Compare with a reference on the same noise.

        The gate is that of the lower precision of the two, as in ``scm-export validate``.

        Args:
            reference: The reference: a generator or an open backend.
            seeds: One seed per sample; None is the seeds of ``scm-export validate``.
            batches: Batch sizes to run; an entry None is the largest. None is 1, 3 and the largest.
            num_inference_steps: Number of steps; None is the default of the generator.
            threshold: Largest difference that passes, units of sigma_data.
            min_psnr_db: PSNR that 95 % of the samples must reach, dB.
            reason: Reason for a ``threshold`` or ``min_psnr_db`` looser than the gate; every report prints it.

        Returns:
            The largest difference and whether it passes; see ``scm_sdk.compare``.

        Raises:
            ConfigError: If the two are different samplers, or a looser gate comes without a reason.
            BackendError: If one of them cannot run.
        """
        from .parity.compare import compare

        return compare(
            self, reference, seeds=seeds, batches=batches, num_inference_steps=num_inference_steps, threshold=threshold,
            min_psnr_db=min_psnr_db, reason=reason,
        )  # fmt: skip

    @checked_names("benchmark")
    def benchmark(
        self,
        *,
        batch: int = 1,
        rounds: int = 100,
        warmup: int | None = None,
        max_seconds: float | None = None,
        budget: str | None = None,
        num_inference_steps: int | None = None,
        events: Events = SILENT,
    ) -> Latency:
        """Measure every accepted row of the plan, interleaved, and use the fastest if the backend is ``"auto"``.

        The times are stored for generators that are opened later on this machine; one warning is given if they cannot
        be.

        Args:
            batch: Images per call; use the batch size of your application.
            rounds: Measured calls of each candidate.
            warmup: Discarded rounds after the first call; None continues until stable.
            max_seconds: Time limit for slow candidates; None is 60, or no limit with a budget.
            budget: Latency budgets; see ``scm_sdk.measure``.
            num_inference_steps: Number of steps; None is the default of the generator.
            events: Receives a step after each round.

        Returns:
            One entry ``PlanRow.name`` for each; ``str()`` is a table.

        Raises:
            ConfigError: If an argument is unknown (``UnknownArgument``) or out of its range.
            BackendError: If a candidate cannot run.
        """
        from .latency import measure

        if self._arguments["offload"]:
            raise ConfigError(
                "this generator was opened with offload=True and loads its parts in each call, expected one that stays "
                "open to be measured: gen.reopen(offload=False).benchmark()."
            )
        steps = self._steps(num_inference_steps)
        candidates = self._opener.open_accepted(steps)
        try:
            latency = measure(
                {o.row.name: o.backend for o in candidates},
                batch=batch,
                rounds=rounds,
                warmup=warmup,
                max_seconds=60.0 if max_seconds is None and budget is None else max_seconds,
                budget=budget,
                events=events,
            )
        finally:
            for opened in candidates:
                opened.backend.close()
        medians = {o.row.key: Measured(r.median_ms, latency.batch) for o, r in zip(candidates, latency, strict=True)}
        self._opener.remember(medians, steps)
        return latency

    def close(self) -> None:
        """Release all memory; may be called twice. A later call raises ``BackendFailure``."""
        self._prompts.close()
        for opener, starts in (*self._others.values(), (self._opener, self._starts)):
            opener.close()
            starts.close()
        self.source.release()

    def __repr__(self) -> str:
        opened = [
            f"{o.row.backend} {o.row.precision} of {o.spec.num_inference_steps} steps on {o.device}"
            for opener in dict.fromkeys((self._opener, *(other for other, _ in self._others.values())))
            for o in opener.opened
        ]
        return f"<Generator of {self.source.path}: {', '.join(opened) or 'not open here'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by reopening the model, because objects of the libraries belong to one process."""
        return _open_again, (type(self), self.source.path, self._arguments, self.source.build_id)

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _steps(self, asked: int | None) -> int:
        return self._default_steps if asked is None else check_count("num_inference_steps", asked)

    def _batch_size(self, opened: Opened, asked: int | None) -> int:
        most = self._max_batch or opened.spec.max_batch
        return most if asked is None else check_count("batch_size", asked, most=most)

    def _start_images(self, opener: Opener) -> StartImages:
        device, threads = self._arguments["device"], self._arguments["num_threads"]
        return StartImages(opener.source, device=device, num_threads=threads, turn=opener.turn)

    def _at_size(self, height: object, width: object) -> tuple[Opener, StartImages]:
        """Return the opener and the image encoder for one image size of the model."""
        size = check_image_size(height, width)
        if size is None:
            return self._opener, self._starts
        found = self._others.get(size)
        if found is None:
            opener = self._opener.at_size(size)
            made = opener, self._starts if opener is self._opener else self._start_images(opener)
            found = self._others.setdefault(size, made)
        return found

    def _prepare(self, output_type: str, steps: int | None, **arguments: Any) -> tuple[Opened, Request]:
        image = arguments.pop("image", None)
        opener, starts = self._at_size(arguments.pop("height", None), arguments.pop("width", None))
        steps = starts.steps(image, arguments.pop("start_time", None), steps)
        opened = opener.get(self._steps(steps))
        check_output_type(opened.spec, output_type)
        words = {name: arguments.pop(name, None) for name in ("conditioning", "prompt", EMBEDS, MASK)}
        count = check_num_images(arguments.get("num_images", 1), opened.spec)
        offset = starts.offset(opened.spec, count, image)  # a wrong image fails before the text encoder is loaded
        made = self._prompts.conditioning(opened.spec, count, **words)
        return opened, make_request(opened.spec, conditioning=made, offset=offset, **arguments)

    def _job(self, arguments: Mapping[str, Any]) -> Job:
        options = dict(arguments)
        output_type = options.pop("output_type", "pil")
        opened, request = self._prepare(output_type, options.pop("num_inference_steps", None), **options)
        size = self._batch_size(opened, None)
        return Job(opened=opened, request=request, output_type=output_type, batch_size=size)


def _open_again(kind: type[Generator], path: Path, arguments: Mapping[str, Any], build_id: str) -> Generator:
    """Open a pickled generator.

    Raises:
        BundleError: If the path now holds another model.
    """
    gen = kind.from_pretrained(path, **arguments)
    if gen.source.build_id != build_id:
        gen.close()
        raise BundleError(f"{path} holds another model than when its generator was pickled. Pickle a new one.")
    return gen
