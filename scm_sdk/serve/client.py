"""``Client``: call a server of ``scm-export serve``, retry where that can help, and check the answers.

    with Client("http://127.0.0.1:8000", bundle="avatars") as client:
        result = client.generate(4, class_labels="red", seed=7, verify=True)
        result.images[0].save("red.png")

A seed names its image, so a request may be repeated without harm: the client draws the seed where none is given.
"""

from __future__ import annotations

import base64
import io
import os
import random
import secrets
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._util.lazy import require
from ..errors import (
    BackendFailure,
    BackendUnavailable,
    ConfigError,
    IntegrityError,
    ParityError,
    QueueFull,
    ScmError,
)
from ..images import encode_picture
from ..inference.request import check_count, fresh_seed
from ..noise import check_seed
from .schemas import ErrorObject, FileFormat, ImageRequest, ImagesResponse, Model, ModelList

if TYPE_CHECKING:
    from PIL import Image

    from ..inference.generator import Generator

T = TypeVar("T")
REPEATED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0
"""Seconds before the second attempt, doubled for each further one, and at most; each is drawn between 0 and that."""
ONE_LEVEL_DB = 48.13
"""PSNR, dB, of a picture that is one 8-bit level off everywhere: what rounding alone can do."""


@dataclass(frozen=True, kw_only=True)
class ClientOutput:
    """Images from a server.

    Attributes:
        images: PIL images, in the order of their seeds; none for a model of clips.
        clips: The frames of each clip, PIL images, for a model of clips.
        seeds: The seed of each image.
        class_labels: The label of each image; None for an unconditional model.
        model: Name of the model.
        build_id: Digest of everything that decides the images.
        attempts: Requests that were sent, 1 where none had to be repeated.
        verified: Seed of the image that was computed again here, if one was.
    """

    images: list[Image.Image]
    clips: list[list[Image.Image]]
    seeds: tuple[int, ...]
    class_labels: tuple[int, ...] | None
    model: str
    build_id: str
    attempts: int
    verified: int | None = None


class Client:
    """Calls a server; safe for threads.

    Args:
        url: Address of the server.
        api_key: One that the server accepts; None is the value of ``SCM_API_KEY`` in the environment, if there is one.
        timeout: Seconds for one attempt.
        max_retries: Further attempts after the first.
        bundle: The same model on this machine, for ``generate(..., verify=True)``.

    Raises:
        ConfigError: If an argument is out of its range.
        BackendUnavailable: If httpx is not here.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        bundle: str | os.PathLike[str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {url!r}, expected an address such as http://127.0.0.1:8000.")
        if max_retries < 0 or not timeout > 0:
            raise ConfigError(
                f"max_retries is {max_retries}, timeout {timeout}, expected 0 or more, and seconds above 0."
            )
        self._httpx = require("httpx", extra="serve", purpose="scm_sdk.serve.client")
        key = os.environ.get("SCM_API_KEY") if api_key is None else api_key
        self._http = self._httpx.Client(
            base_url=url.rstrip("/"), timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self._max_retries, self._bundle = max_retries, bundle
        self._local: Generator | None = None
        self._opening = threading.Lock()
        self._model: Model | None = None

    def generate(
        self,
        num_images: int = 1,
        *,
        class_labels: int | str | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image: Image.Image | NDArray[np.uint8] | None = None,
        start_time: float | None = None,
        verify: bool = False,
    ) -> ClientOutput:
        """Ask for images.

        Args:
            num_images: How many; the server has a limit.
            class_labels: Name or number of the class of all images; None lets each seed draw its own.
            prompt: Instead of a class, for models of text.
            seed: Of the first image; the others follow it. None draws a new one.
            num_inference_steps: Network calls; None is the server's default.
            guidance_scale: For models that take one.
            image: Image to start from, of the model's size: a PIL image, or an array (H, W, C), uint8; for all.
            start_time: Time, radians, at which noise is added to the image; ``model().start_times`` lists them.
            verify: Compute one of the images, drawn at random, again with ``bundle`` on this machine, and compare.

        Raises:
            ConfigError: If the server refused the request as wrong, or ``verify`` has no bundle or is asked for clips,
                whose files are lossy.
            QueueFull: If the server was full at each attempt.
            BackendUnavailable: If no server answered.
            BackendFailure: If the server failed at each attempt.
            IntegrityError: If the server runs another model than ``bundle``.
            ParityError: If the image that was computed again is another one.
        """
        check_count("num_images", num_images)
        if verify and self._bundle is None:
            raise ConfigError("verify is True without a bundle, expected Client(url, bundle=PATH) of the same model.")
        if verify and self.model().frames is not None:
            raise ConfigError(
                "verify is True for clips, expected pictures: files of clips are lossy. Ask for samples by /v2."
            )
        first = fresh_seed(num_images) if seed is None else check_seed(seed)
        pixels = None if image is None else _pixels_of(image)
        asked = ImageRequest(
            prompt=prompt,
            label=class_labels,
            n=num_images,
            seed=str(first),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image=None if pixels is None else base64.b64encode(encode_picture(pixels, ".png")).decode(),
            start_time=start_time,
        )
        body = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
        found, attempts = self._send("POST", "/v1/images/generations", ImagesResponse, body)
        if [image.seed for image in found.data] != list(range(first, first + num_images)):
            raise BackendFailure(
                f"the server answered with {len(found.data)} images of other seeds, expected {num_images} from {first}."
            )
        labels = [image.label for image in found.data if image.label is not None]
        frames = [_frames_of(image.b64_json, found.output_format) for image in found.data]
        is_clip = found.output_format != "png"
        output = ClientOutput(
            images=[] if is_clip else [picture for (picture,) in frames],
            clips=frames if is_clip else [],
            seeds=tuple(image.seed for image in found.data),
            class_labels=tuple(labels) if labels else None,
            model=found.model,
            build_id=found.build_id,
            attempts=attempts,
        )
        if not verify:
            return output
        index = secrets.randbelow(num_images)
        wanted = self._compute(output, index, num_inference_steps, prompt=prompt, guidance_scale=guidance_scale,
                               image=pixels, start_time=start_time)  # fmt: skip
        self._verify(output.images[index], output.seeds[index], wanted)
        return replace(output, verified=output.seeds[index])

    def model(self) -> Model:
        """Return what the server serves.

        Raises:
            ScmError: As ``generate``.
        """
        if self._model is None:
            self._model = self._send("GET", "/v1/models", ModelList)[0].data[0]
        return self._model

    def close(self) -> None:
        """Close the connections, and the model of ``verify``."""
        self._http.close()
        if self._local is not None:
            self._local.close()
            self._local = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, method: str, path: str, kind: type[T], body: dict[str, Any] | None = None) -> tuple[T, int]:
        """Send a request until it is answered; return the answer and the number of attempts."""
        error: ScmError = BackendFailure("no attempt was made, expected at least one.")
        for attempt in range(1, self._max_retries + 2):
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            try:
                response = self._http.request(method, path, json=body)
            except self._httpx.TransportError as exc:
                error = BackendUnavailable(
                    f"{self._http.base_url} did not answer ({type(exc).__name__}: {exc}), {attempt} attempts, "
                    "expected a server of scm-export serve. Is it running, and is this its address?"
                )
            else:
                if response.status_code == 200:
                    return _decode(response.content, kind), attempt
                error = _error_of(response.status_code, response.content, attempt)
                if response.status_code not in REPEATED:
                    raise error
                given = response.headers.get("retry-after", "")
                wait = max(wait, float(given)) if given.isdecimal() else wait
            if attempt <= self._max_retries:
                time.sleep(random.uniform(0, min(wait, LONGEST_WAIT)))
        raise error

    def _compute(self, output: ClientOutput, index: int, steps: int | None, **arguments: Any) -> NDArray[np.uint8]:
        """Compute one image of an output again, (H, W, C); see ``generate``."""
        served, local = self.model(), self._open_local()
        if not local.source.build_id == output.build_id == served.build_id:
            raise IntegrityError(
                f"the server runs build {output.build_id[:12]}.., expected {local.source.build_id[:12]}.. of "
                f"{local.source.path}. Give the bundle that it serves."
            )
        if steps is None and arguments["image"] is None:
            steps = served.default_steps
        label = None if output.class_labels is None else output.class_labels[index]
        made = local(1, label, num_inference_steps=steps, seed=[output.seeds[index]], output_type="uint8", **arguments)
        image: NDArray[np.uint8] = made.images[0]
        return image

    def _verify(self, picture: Image.Image, seed: int, wanted: NDArray[np.uint8]) -> None:
        """Compare an image of the server with the one computed here."""
        from ..inference.parity.compare import MIN_PSNR_DB

        served, row = self.model(), self._open_local().opened().row
        found = np.asarray(picture).reshape(wanted.shape) if _fits(picture, wanted) else None
        least = min(ONE_LEVEL_DB, *(MIN_PSNR_DB.get(p, ONE_LEVEL_DB) for p in (served.precision, row.precision)))
        psnr = -np.inf if found is None else _psnr_db(found, wanted)
        if psnr < least:
            raise ParityError(
                f"the server's image of seed {seed} has a PSNR of {psnr:.1f} dB against the same computed here by "
                f"{row.backend} {row.precision}, expected at least {least:.1f} dB for {served.precision}. Do not use "
                "its images: compare its artifact where it runs, with scm-export validate"
            )

    def _open_local(self) -> Generator:
        from ..inference.generator import Generator

        with self._opening:
            if self._local is None:
                assert self._bundle is not None
                self._local = Generator.from_pretrained(self._bundle)
            return self._local


def _decode(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BackendFailure(
            f"the server answered what is no {kind.__name__} ({exc}), expected one of this version."
        ) from exc


def _error_of(status: int, content: bytes, attempts: int) -> ScmError:
    """Return the exception of this package for an error answer."""
    try:
        body = msgspec.json.decode(content, type=ErrorObject).error
        found = f"the server answered {status}, {body.code}: {body.message}"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = f"the server answered {status} without an error object, expected one of scm-export serve."
    found += f" ({attempts} attempts)" if attempts > 1 else ""
    if status == 429:
        return QueueFull(found)
    return ConfigError(found) if 400 <= status < 500 and status not in REPEATED else BackendFailure(found)


def _frames_of(text: str, kind: FileFormat) -> list[Image.Image]:
    """Return the picture of a PNG file, or the frames of a WebP file."""
    from PIL import Image, ImageSequence

    if kind not in ("png", "webp"):
        raise BackendFailure(f"the server answered with {kind} files, expected png for pictures or webp for clips.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=[kind]) as file:
            if kind == "png":
                file.load()
                return [file.copy()]
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    except Exception as exc:  # Pillow raises many
        raise BackendFailure(f"the server answered what is no {kind} file ({exc}), expected one.") from exc


def _pixels_of(image: Any) -> NDArray[np.uint8]:
    """Return the pixels of an image to start from, (H, W, C)."""
    if not isinstance(image, np.ndarray):
        if not (hasattr(image, "mode") and hasattr(image, "size")):
            raise ConfigError(f"image is {type(image).__name__}, expected a PIL image or an array (H, W, C).")
        if image.mode not in ("L", "RGB"):
            raise ConfigError(f"image has mode {image.mode}, expected L or RGB: image.convert('RGB').")
        image = np.asarray(image)
        image = image if image.ndim == 3 else image[:, :, None]
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise ConfigError(f"image is {image.shape} {image.dtype}, expected (H, W, C) uint8 with C = 1 or 3.")
    return image


def _fits(picture: Image.Image, wanted: np.ndarray) -> bool:
    return np.asarray(picture).size == wanted.size and picture.size == (wanted.shape[1], wanted.shape[0])


def _psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    square = float(np.mean(np.square(found.astype(np.float64) - wanted)))
    return 10 * np.log10(255**2 / square) if square else np.inf
