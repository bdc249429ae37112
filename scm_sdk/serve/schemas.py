"""Types of the HTTP API, its error codes, and the OpenAPI document that describes them.

``POST /v1/images/generations`` and ``/v1/images/edits`` have the shape of OpenAI's API, with ``seed``, ``label``,
``image``, ``start_time``, ``num_inference_steps``, ``guidance_scale``, ``fps`` and ``timeout`` as extensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from .._util.arguments import check_names
from .._version import __version__
from ..errors import ScmError, UnknownArgument
from ..images import MAX_FPS

MAX_PROMPT = 4000
"""Characters of a prompt or a label's name."""
Text = Annotated[str, msgspec.Meta(max_length=MAX_PROMPT)]
FileFormat = Literal["png", "jpeg", "webp", "gif", "mp4"]
MEDIA_TYPES: Mapping[FileFormat, str] = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "mp4": "video/mp4",
}  # fmt: skip
"""Formats of pictures and clips, with their media types."""

INVALID, AUTH, LIMIT, SERVER = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
CODES: Mapping[str, tuple[int, str, str]] = {
    "invalid_json": (400, INVALID, "The body is no JSON object."),
    "invalid_form": (400, INVALID, "The body is no multipart form."),
    "unknown_parameter": (400, INVALID, "The body holds a parameter that does not exist."),
    "invalid_value": (400, INVALID, "A parameter has a wrong type or is out of its range."),
    "invalid_api_key": (401, AUTH, "No API key, or one that this server does not know."),
    "forbidden_origin": (403, INVALID, "A web page of another site sent the request."),
    "not_found": (404, INVALID, "There is nothing at this path."),
    "model_not_found": (404, INVALID, "The model that is named is not the one that is served."),
    "method_not_allowed": (405, INVALID, "The path does not take this method."),
    "not_acceptable": (406, INVALID, "The Accept header allows nothing that this server sends."),
    "request_timeout": (408, INVALID, "The body did not arrive in time."),
    "payload_too_large": (413, INVALID, "The body is larger than the server's limit."),
    "unsupported_media_type": (415, INVALID, "The body has a type or an encoding that the path does not take."),
    "invalid_host": (421, INVALID, "The Host header names another server."),
    "queue_full": (429, LIMIT, "Too many images wait; Retry-After says when to come again."),
    "key_limit": (429, LIMIT, "Too many images of this API key wait."),
    "server_error": (500, SERVER, "The server failed; its log has the request id."),
    "deadline_exceeded": (503, SERVER, "The images were not made in time and were dropped."),
    "not_ready": (503, SERVER, "The model does not answer, or the canary found it out of bound."),
}
"""Every error code: status, type, meaning."""


class RequestError(ScmError):
    """A request that is answered with an error object.

    Args:
        code: One of ``CODES``.
        message: What was found and what was expected.
        param: The parameter at fault.
        retry_after: Seconds after which the same request may succeed.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.param, self.retry_after = code, param, retry_after
        self.status, self.type, _ = CODES[code]


class ErrorBody(msgspec.Struct, kw_only=True):
    """What went wrong.

    Attributes:
        message: For people.
        type: OpenAI's class of errors.
        code: For programs; one of a fixed list.
        param: The parameter at fault, or null.
    """

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorObject(msgspec.Struct, kw_only=True):
    """The body of every answer outside /v2 that is an error."""

    error: ErrorBody

    @classmethod
    def of(cls, error: RequestError) -> ErrorObject:
        """Return the body of an error's answer."""
        return cls(error=ErrorBody(message=str(error), type=error.type, code=error.code, param=error.param))


class ImageRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Ask for images.

    Attributes:
        prompt: Text for a model of text; else the name or number of a class. Empty draws the class from each seed.
        label: Name or number of a class, instead of a prompt.
        model: Name of the served model.
        n: Number of images.
        seed: Of the first image, 0..2^64-1, also in decimal as a text; the others follow it. A new one when absent.
        image: Image to start from, of the model's size: a PNG, JPEG or WebP file in base64, or a ``data:`` URL of it.
        start_time: Time, radians, at which noise is added to the image: one of ``start_times`` of the model.
        num_inference_steps: Number of network calls; with an image, that of a sampler which starts there.
        guidance_scale: For models that take one.
        fps: Frames per second of a clip, 16 when absent.
        size: Width and height, which the model decides: ``32x32`` or ``auto``.
        response_format: Only base64 in JSON; no addresses are served.
        output_format: Format of the files, one of ``formats`` of the model: png, jpeg or webp of a picture; webp, gif
            or mp4 of a clip.
        stream: Send each picture as a server-sent event as soon as it is made.
        timeout: Seconds in which to answer, at most the server's own deadline.
        user: Ignored.
    """

    prompt: Text | int | None = None
    label: Text | int | None = None
    model: Text | None = None
    n: int | None = None
    seed: int | Annotated[str, msgspec.Meta(pattern="^[0-9]{1,20}$")] | None = None
    image: str | None = None
    start_time: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    fps: Annotated[float, msgspec.Meta(gt=0, le=MAX_FPS)] | None = None
    size: Annotated[str, msgspec.Meta(pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$")] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: FileFormat | None = None
    stream: bool | None = None
    timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None
    user: Text | None = None


class Image(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One picture.

    Attributes:
        b64_json: The file, in base64.
        seed: Names the picture: the same request with it gives the same one.
        label: Its class, for models with classes.
    """

    b64_json: str
    seed: int
    label: int | None = None


class ImagesResponse(msgspec.Struct, kw_only=True):
    """The pictures of a request.

    Attributes:
        created: Seconds since 1970.
        data: The pictures, in the order of their seeds.
        model: Name of the model.
        build_id: Digest of everything that decides the pictures.
        output_format: Format of the pictures.
        size: Width and height.
    """

    created: int
    data: list[Image]
    model: str
    build_id: str
    output_format: FileFormat
    size: str


class ImageEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The data of a server-sent event: one picture of a stream.

    Attributes:
        type: ``image_generation.completed``, or ``image_edit.completed`` of an edit.
        index: Position of the picture in the request.
        b64_json: The file, in base64.
        seed: Names the picture.
        label: Its class, for models with classes.
        created_at: Seconds since 1970.
        output_format: Format of the picture.
        size: Width and height.
    """

    type: Literal["image_generation.completed", "image_edit.completed"]
    index: int
    b64_json: str
    seed: int
    label: int | None = None
    created_at: int
    output_format: FileFormat
    size: str


class Model(msgspec.Struct, kw_only=True):
    """What is served.

    Attributes:
        id: Name of the model.
        object: ``model``.
        created: 0: a bundle has no date.
        owned_by: ``scm-sdk``.
        build_id: Digest of everything that decides the pictures.
        backend: Library that runs it.
        precision: Precision of the artifact that runs.
        steps: Numbers of steps that are offered.
        default_steps: The number of steps when a request names none.
        size: Width and height of the pictures; null for what is no picture.
        num_classes: Number of classes; 0 for none.
        class_names: Their names in order, if they have any.
        takes_prompt: Whether it makes pictures of a text.
        guidance_range: Lowest and highest guidance scale; null for a model that takes none.
        max_images: Images of one request.
        start_times: The samplers that start from an image: start time, radians, by number of steps; none where the
            model takes no image.
        frames: Number of frames of a clip; null for pictures.
        formats: Formats of files, the usual one first; none for what is no picture and no clip.
    """

    id: str
    build_id: str
    backend: str
    precision: str
    steps: list[int]
    default_steps: int
    size: str | None
    num_classes: int
    class_names: list[str]
    takes_prompt: bool
    guidance_range: tuple[float, float] | None
    max_images: int
    start_times: dict[int, float]
    frames: int | None
    formats: list[FileFormat]
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "scm-sdk"


class ModelList(msgspec.Struct, kw_only=True):
    """The models of this server: one."""

    data: list[Model]
    object: Literal["list"] = "list"


def decode_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        RequestError: ``invalid_json``.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError("invalid_json", f"the body is no JSON ({exc}), expected a JSON object.") from None
    if not isinstance(found, dict):
        raise RequestError("invalid_json", f"the body is a JSON {type(found).__name__}, expected an object.")
    return found


def decode_image_request(body: bytes) -> ImageRequest:
    """Return a checked request; what depends on the model is checked later.

    Raises:
        RequestError: ``invalid_json``, ``unknown_parameter`` or ``invalid_value``.
    """
    return check_image_request(decode_object(body))


def check_image_request(found: Mapping[str, Any], *, from_text: bool = False) -> ImageRequest:
    """Return the request of some parameters; ``from_text`` reads numbers from the texts of a form.

    Raises:
        RequestError: ``unknown_parameter`` or ``invalid_value``.
    """
    try:
        check_names(found, ImageRequest.__struct_fields__, of="the request")
    except UnknownArgument as exc:
        unknown = next(name for name in found if name not in ImageRequest.__struct_fields__)
        raise RequestError("unknown_parameter", str(exc), param=unknown[:100]) from None
    try:
        return msgspec.convert(found, ImageRequest, strict=not from_text)
    except msgspec.ValidationError as exc:
        where = re.search(r"\$\.(\w+)", str(exc))
        raise RequestError("invalid_value", f"{exc}.", param=where[1] if where else None) from None


_TYPES = (ErrorObject, ImageRequest, ImagesResponse, ImageEvent, ModelList)


def openapi_document(paths: Mapping[str, tuple[str, str, str]]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server.

    Args:
        paths: Method, summary and operation id by path.
    """
    _, components = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    error = {"description": "An error.", "content": {"application/json": {"schema": _ref("ErrorObject")}}}
    described: dict[str, Any] = {}
    for path, (method, summary, name) in paths.items():
        operation: dict[str, Any] = {"summary": summary, "operationId": name, "responses": {"default": error}}
        operation["responses"]["200"] = {"description": "Success."}
        if parameters := re.findall(r"{(\w+)}", path):
            operation["parameters"] = [
                {"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in parameters
            ]
        described[path] = {method.lower(): operation}
    file = {"type": "string", "format": "binary"}
    form = {"allOf": [_ref("ImageRequest"), {"properties": {"image": file}, "required": ["image"]}]}
    bodies = {"generations": ("application/json", _ref("ImageRequest")), "edits": ("multipart/form-data", form)}
    by_status: dict[int, list[str]] = {}
    for code, (status, _, meaning) in CODES.items():
        by_status.setdefault(status, []).append(f"`{code}`: {meaning}")
    for name, (media_type, schema) in bodies.items():
        images = described[f"/v1/images/{name}"]["post"]
        images["requestBody"] = {"required": True, "content": {media_type: {"schema": schema}}}
        images["responses"]["200"]["content"] = {
            "application/json": {"schema": _ref("ImagesResponse")},
            "text/event-stream": {"schema": _ref("ImageEvent")},
            **{kind: {"schema": file} for kind in MEDIA_TYPES.values()},
        }
        for status, meanings in by_status.items():
            images["responses"][str(status)] = error | {"description": " ".join(meanings)}
    described["/v1/models"]["get"]["responses"]["200"]["content"] = {"application/json": {"schema": _ref("ModelList")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "scm-export serve", "version": __version__},
        "paths": described,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
