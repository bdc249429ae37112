"""The ASGI application: the routes, and the checks that precede them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from importlib.resources import files
from typing import Any, Literal, TypeVar

import h11
import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._version import __version__
from ..errors import ConfigError, ScmError
from ..inference.output import GeneratorOutput
from ..inference.request import fresh_seed
from ..noise import check_seed
from . import inference_protocol as v2
from .limits import ApiKeys, check_caller, check_host, check_origin
from .metrics import CONTENT_TYPE
from .schemas import (
    MAX_PROMPT,
    MEDIA_TYPES,
    ErrorObject,
    FileFormat,
    Image,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    ModelList,
    RequestError,
    check_image_request,
    decode_image_request,
    openapi_document,
)
from .service import Call, Service, in_order
from .traces import Attribute, RequestSpan

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
EventType = Literal["image_generation.completed", "image_edit.completed"]
MAX_FIELDS = 32
"""Parameters, and files, of a form."""
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json"})
"""What needs no API key: the page, the API's description, and probes."""
PROBES = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths that accept any ``Host``, because load balancers choose its value."""
QUIET = PROBES | {"/metrics"}
"""Paths that are polled every few seconds; only failures are logged."""
LOG = logging.getLogger("scm_sdk.serve")
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def make_app(service: Service, keys: ApiKeys | None = None) -> ASGIApp:
    """Return the application that serves an open model; the service is closed when its server ends.

    It may be mounted in another application, whose owner then closes the service: a server sends its end to the
    outermost application alone. Time limits of connections are those of the server that runs it.

    Args:
        service: The model.
        keys: The accepted API keys; None asks for none.
    """
    api = _Api(service)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    routes = [Route(path, endpoint, methods=[method]) for method, path, endpoint, _ in api.routes]
    handlers: dict[Any, Any] = {ScmError: _handle, HTTPException: _handle_http_error, Exception: _handle}
    return Gate(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), service, keys)


class Gate:
    """What every request passes: its id, ``Host``, ``Origin`` and API key; then its line in the log and the metrics.

    Args:
        app: The application behind it.
        service: The model.
        keys: The accepted API keys; None asks for none.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: ApiKeys | None) -> None:
        self._app, self._service, self._keys = app, service, keys
        self._allowed = (*service.options.allowed_hosts, service.options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request, start = Request(scope), time.perf_counter()
        is_quiet = _path(scope) in QUIET
        with nullcontext() if is_quiet else self._service.traces.request(request.headers) as span:
            await self._answer(request, span, start, receive, send)

    async def _answer(
        self, request: Request, span: RequestSpan | None, start: float, receive: Receive, send: Send
    ) -> None:
        scope = request.scope
        given = request.headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state["key"], status = "", 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [*_HEADERS.items(), (b"x-request-id", state["request_id"].encode())]
            try:
                await send(message)
            except h11.LocalProtocolError:  # the rest of the request was no HTTP, and uvicorn has answered that
                raise ClientDisconnect from None

        try:
            try:
                if _path(scope) not in PROBES:
                    check_host(request.headers.get("host", ""), self._allowed)
                    check_origin(request.headers.get("origin"), request.headers.get("host", ""))
                if _path(scope) not in OPEN_PATHS:
                    state["key"] = check_caller(self._keys, request.headers.get("authorization", ""))
            except RequestError as exc:
                return await _answer_error(request, exc)(scope, receive, send_with_headers)
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499  # as nginx logs it
        except Exception as exc:  # Starlette answers what it can and raises it again
            state.setdefault("failure", exc)
        finally:
            self._record(scope, span, status, time.perf_counter() - start)

    def _record(self, scope: Scope, span: RequestSpan | None, status: int, seconds: float) -> None:
        state = scope["state"]
        endpoint = getattr(scope.get("route"), "path", "other")
        path = scope["raw_path"].decode("latin-1")[:200]  # as it was sent, without line ends
        metrics = self._service.metrics
        metrics.requests.labels(endpoint, str(status)).inc()
        metrics.seconds.labels(endpoint).observe(seconds)
        if code := state.get("code", ""):
            metrics.rejected.labels(code).inc()
        failed = state.get("failure")
        fields = {
            "request_id": state["request_id"], "method": scope["method"], "path": path,
            "status": status, "ms": round(seconds * 1e3, 2), "client": (scope.get("client") or ("",))[0],
            "key": state["key"], "code": code, "images": state.get("images", 0),
        }  # fmt: skip
        if span is not None:
            fields["trace_id"] = span.trace_id
            attributes: dict[str, Attribute] = {
                "http.request.method": scope["method"], "http.route": endpoint, "url.path": path.partition("?")[0],
                "http.response.status_code": status, "client.address": fields["client"],
                "scm.request_id": state["request_id"], "scm.key": state["key"], "scm.images": fields["images"],
            }  # fmt: skip
            span.finish(f"{scope['method']} {endpoint}", attributes | ({"error.type": code} if code else {}), failed)
        LOG.log(
            logging.ERROR if failed else logging.DEBUG if _path(scope) in QUIET else logging.INFO,
            "%s %s %d", scope["method"], path, status,
            exc_info=failed,
            extra={"fields": fields},
        )  # fmt: skip


class _Api:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        page = (files(__package__) / "playground.html").read_text("utf-8")  # pyright: ignore[reportArgumentType]
        self._page, self._policy = page.encode(), _content_security_policy(page)
        name, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        self.routes: list[tuple[str, str, Endpoint, str]] = [
            ("POST", "/v1/images/generations", self.generate, "Make images."),
            ("POST", "/v1/images/edits", self.edit, "Make images that start from an image, a file of a form."),
            ("GET", "/v1/models", self.models, "List the model that is served."),
            ("GET", "/healthz", self.live, "The process answers."),
            ("GET", "/readyz", self.ready, "An inference succeeds."),
            ("GET", "/metrics", self.metrics, "Metrics for Prometheus."),
            ("GET", "/openapi.json", self.openapi, "This document."),
            ("GET", "/", self.playground, "A page to try the model."),
            ("GET", "/v2", self.server_metadata, "Name and extensions of the server."),
            ("GET", "/v2/health/live", self.live, "The process answers."),
            ("GET", "/v2/health/ready", self.ready, "An inference succeeds."),
            *(
                ("GET", prefix + suffix, endpoint, summary)
                for prefix in (name, version)
                for suffix, endpoint, summary in (
                    ("", self.model_metadata, "Inputs and outputs of the model."),
                    ("/ready", self.model_ready, "An inference succeeds."),
                )
            ),
            ("POST", f"{name}/infer", self.infer, "Make images from tensors."),
            ("POST", f"{version}/infer", self.infer, "Make images from tensors."),
        ]
        self._openapi = msgspec.json.encode(
            openapi_document({path: (method, text, _operation(method, path)) for method, path, _, text in self.routes})
        )

    async def generate(self, request: Request) -> Response:
        """``POST /v1/images/generations``."""
        self._check_room(request, 1)
        _check_content_type(request, "application/json")
        async with _body(request, self._service) as body:
            asked = decode_image_request(body)
            call, kind = await self._call(request, asked, asked.image)
        return await self._answer(request, asked, call, kind, "image_generation.completed")

    async def edit(self, request: Request) -> Response:
        """``POST /v1/images/edits``."""
        self._check_room(request, 1)
        _check_content_type(request, "multipart/form-data")
        async with _body(request, self._service) as body:
            asked, image = await _read_form(request, body)
            times = set(self._service.model.start_times.values())
            if asked.start_time is None and len(times) == 1:  # so that OpenAI's clients need no extension
                asked.start_time = times.pop()
            call, kind = await self._call(request, asked, image)
        return await self._answer(request, asked, call, kind, "image_edit.completed")

    async def _answer(
        self, request: Request, asked: ImageRequest, call: Call, kind: FileFormat, event: EventType
    ) -> Response:
        """Make the images of a request and return them as it asks."""
        fps = 16.0 if asked.fps is None else asked.fps
        if asked.stream:
            events = self._events(request, call, kind, fps, event)
            first = await _unless_disconnected(request, anext(events))  # an error before it has its own answer
            return StreamingResponse(_chain(first, events), media_type="text/event-stream", headers=_NO_STORE)
        images = await _unless_disconnected(request, self._images(call, kind, fps, request.state.key))
        if request.state.as_file:
            (seed, _, content), model = images[0], self._service.model
            headers = _NO_STORE | {"X-Seed": str(seed), "X-Build-Id": model.build_id}
            return Response(content, media_type=MEDIA_TYPES[kind], headers=headers)
        return _json(
            ImagesResponse(
                created=int(time.time()),
                data=[Image(b64_json=_base64(content), seed=seed, label=label) for seed, label, content in images],
                model=self._service.model.id,
                build_id=self._service.model.build_id,
                output_format=kind,
                size=self._service.model.size or "",
            )
        )

    def _check_room(self, request: Request, images: int) -> None:
        """Refuse images for which there is no room, before their request costs more; ``Service.run`` takes them."""
        service = self._service
        service.admission.check(images, request.state.key, retry_after=service.retry_after)

    async def _call(self, request: Request, asked: ImageRequest, image: str | bytes | None) -> tuple[Call, FileFormat]:
        """Check what depends on the model, then decode the image."""
        service, model = self._service, self._service.model
        if not model.formats:
            raise RequestError(
                "invalid_value",
                f"{model.id} makes no pictures and no clips, expected a call of /v2/models/{model.id}/infer.",
            )
        if asked.fps is not None and model.frames is None:
            raise RequestError("invalid_value", f"fps is given, but {model.id} makes pictures, no clips.", param="fps")
        if asked.model not in (None, model.id):
            raise RequestError("model_not_found", f"model is {asked.model!r}, expected {model.id!r}.", param="model")
        if asked.size not in (None, "auto", model.size):
            raise RequestError("invalid_value", f"size is {asked.size}, expected {model.size} or auto.", param="size")
        count = service.check_count(1 if asked.n is None else asked.n)
        kind = _negotiate(request, asked, count, model.formats)
        others: dict[str, Any] = {}
        labels = asked.label
        if asked.guidance_scale is not None:
            others["guidance_scale"] = asked.guidance_scale
        if model.takes_prompt:
            others["prompt"] = "" if asked.prompt is None else str(asked.prompt)
        elif asked.prompt not in (None, ""):
            if labels is not None:
                raise RequestError("invalid_value", "prompt and label both name a class, expected one.", param="label")
            if not model.num_classes:
                raise RequestError(
                    "invalid_value", f"{model.id} takes no prompt, expected an empty one.", param="prompt"
                )
            labels = asked.prompt
        call = Call(
            seeds=_seeds(asked.seed, count),
            steps=service.check_start(image is not None, asked.start_time, asked.num_inference_steps),
            labels=labels,
            others=others,
            start_time=asked.start_time,
            split=bool(asked.stream) or not model.takes_prompt,  # a prompt is encoded once
            deadline=service.due(asked.timeout),
        )
        request.state.images = count
        self._check_room(request, count)
        return call if image is None else replace(call, image=await service.decode_image(image)), kind

    async def _each(
        self, call: Call, kind: FileFormat, fps: float, key: str
    ) -> AsyncGenerator[tuple[int, tuple[int, int | None, bytes]], None]:
        """Yield position, and seed, label and file, of each image as it is ready."""
        async with aclosing(self._service.run(call, key)) as outputs:
            async for start, output in outputs:
                for i, content in enumerate(await self._service.files(output, kind, fps)):
                    yield start + i, (output.seeds[i], _label(output, i), content)

    async def _images(self, call: Call, kind: FileFormat, fps: float, key: str) -> list[tuple[int, int | None, bytes]]:
        async with aclosing(self._each(call, kind, fps, key)) as images:
            return [image async for _, image in in_order(images)]

    async def _events(
        self, request: Request, call: Call, kind: FileFormat, fps: float, event_type: EventType
    ) -> AsyncGenerator[bytes, None]:
        sent = False
        async with aclosing(self._each(call, kind, fps, request.state.key)) as images:
            try:
                async for index, (seed, label, content) in images:
                    event = ImageEvent(
                        type=event_type, index=index, b64_json=_base64(content), seed=seed,
                        label=label, created_at=int(time.time()), output_format=kind,
                        size=self._service.model.size or "",
                    )  # fmt: skip
                    sent = True
                    yield b"event: " + event.type.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
                yield b"data: [DONE]\n\n"
            except Exception as exc:
                if not sent:
                    raise
                error = ErrorObject.of(_as_request_error(request, exc))
                yield b"event: error\ndata: " + msgspec.json.encode(error) + b"\n\n"

    async def infer(self, request: Request) -> Response:
        """``POST /v2/models/{model}/infer``."""
        self._check_room(request, 1)
        service = self._service
        known = self._known_model(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError("unsupported_media_type", "the body is compressed, expected it as it is.")
        async with _body(request, service) as body:
            asked, inputs = await service.apart(v2.decode, body, request.headers.get(v2.HEADER_LENGTH), known)
        outputs = v2.asked_outputs(asked, known)
        count = service.check_count(len(next(iter(inputs.values()))), "the number of images")
        request.state.images = count
        steps, timeout = asked.parameters.get("num_inference_steps"), asked.parameters.get("timeout")
        start_time = asked.parameters.get("start_time")
        if type(start_time) not in (int, float, type(None)):
            raise RequestError("invalid_value", "start_time is no number, expected radians.", param="parameters")
        if type(steps) not in (int, type(None)) or not (timeout is None or (type(timeout) is int and timeout > 0)):
            raise RequestError(
                "invalid_value", "num_inference_steps or timeout is no whole number, expected steps and microseconds.",
                param="parameters",
            )  # fmt: skip
        if service.model.takes_prompt and "prompt" not in inputs:
            raise RequestError(
                "invalid_value", "there is no input prompt, expected a text for each image.", param="prompt"
            )
        call = Call(
            seeds=tuple(inputs["seed"].tolist()) if "seed" in inputs else _seeds(None, count),
            steps=service.check_start("image" in inputs, start_time, steps),
            labels=inputs["class_labels"].tolist() if "class_labels" in inputs else None,
            others={
                name: inputs[name] if name == "prompt" else inputs[name].tolist()
                for name in ("guidance_scale", "prompt")
                if name in inputs
            },
            image=inputs.get("image"),
            start_time=start_time,
            split=not service.model.takes_prompt,
            deadline=service.due(None if timeout is None else timeout / 1e6),
        )
        output = await _unless_disconnected(request, service.run_whole(call, request.state.key))
        makers: dict[str, Callable[[], Any]] = {
            "images": lambda: service.arrays(output),
            "samples": lambda: output.images,
            "seed": lambda: np.array(output.seeds, np.uint64),
            "class_labels": lambda: np.array(output.class_labels, np.int64),
        }
        arrays = {name: makers[name]() for name in outputs}
        content, length = v2.encode(service.model.id, asked.id, arrays, outputs)
        if length is None:
            return Response(content, media_type="application/json", headers=_NO_STORE)
        headers = _NO_STORE | {v2.HEADER_LENGTH: str(length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def _known_model(self, request: Request) -> v2.Metadata:
        """Return the metadata of the model that a path names."""
        model, asked = self._service.model, request.path_params
        if asked["model"] != model.id or asked.get("version", v2.VERSION) != v2.VERSION:
            raise RequestError(
                "model_not_found",
                f"the path names {asked['model'][:100]!r}, expected {model.id!r}, version {v2.VERSION}.",
            )
        takes_image = bool(model.start_times)
        return v2.describe(model.id, f"scm_{model.backend}", self._service.spec, takes_image=takes_image)

    async def models(self, _request: Request) -> Response:
        """``GET /v1/models``."""
        return _json(ModelList(data=[self._service.model]))

    async def live(self, _request: Request) -> Response:
        """``GET /healthz``, ``GET /v2/health/live``."""
        return _json({"live": True})

    async def ready(self, _request: Request) -> Response:
        """``GET /readyz``, ``GET /v2/health/ready``."""
        if (problem := await self._service.check_ready()) is not None:
            raise RequestError("not_ready", problem)
        return _json({"ready": True})

    async def metrics(self, _request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, _request: Request) -> Response:
        """``GET /openapi.json``."""
        return Response(self._openapi, media_type="application/json")

    async def playground(self, _request: Request) -> Response:
        """``GET /``."""
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def server_metadata(self, _request: Request) -> Response:
        """``GET /v2``."""
        return _json({"name": "scm-sdk", "version": __version__, "extensions": v2.EXTENSIONS})

    async def model_metadata(self, request: Request) -> Response:
        """``GET /v2/models/{model}``."""
        return _json(self._known_model(request))

    async def model_ready(self, request: Request) -> Response:
        """``GET /v2/models/{model}/ready``."""
        known = self._known_model(request)
        if (problem := await self._service.check_ready()) is not None:
            raise RequestError("not_ready", problem)
        return _json({"name": known.name, "ready": True})


_NO_STORE = {"Cache-Control": "no-store"}


def _path(scope: Scope) -> str:
    """Return a request's path below the place where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


@asynccontextmanager
async def _body(request: Request, service: Service) -> AsyncIterator[bytes]:
    """Read a request's body; what is held of all bodies is counted until the context ends.

    Raises:
        RequestError: ``payload_too_large``, ``request_timeout``, or ``queue_full`` where the bodies of other requests
            are as large as those of all that may wait.
    """
    limit, seconds = service.max_body, service.options.read_timeout
    held = 0
    declared = request.headers.get("content-length", "")
    too_large = RequestError("payload_too_large", f"the body is larger than {limit} bytes, expected at most that many.")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large

    async def read() -> bytes:
        nonlocal held
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
            held += len(chunk)
            service.body_bytes += len(chunk)
            if service.body_bytes > limit * service.options.max_queue:
                raise RequestError(
                    "queue_full", f"other requests hold {service.body_bytes - held} bytes, expected room for this one.",
                    retry_after=service.retry_after,
                )  # fmt: skip
        return bytes(body)

    try:
        try:
            body = await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise RequestError(
                "request_timeout", f"the body was not there after {seconds:g} s, expected all of it."
            ) from None
        yield body
    finally:
        service.body_bytes -= held


class _FormInMemory(MultiPartParser):
    """A parser of forms that writes no temporary files; the size of a body is limited already."""

    spool_max_size = sys.maxsize


async def _read_form(request: Request, body: bytes) -> tuple[ImageRequest, bytes]:
    """Return the parameters of a form and the file of its image.

    Raises:
        RequestError: ``invalid_form``, ``unknown_parameter`` or ``invalid_value``.
    """

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _FormInMemory(
            request.headers, whole(), max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=4 * MAX_PROMPT
        ).parse()
    except (MultiPartException, ValueError, LookupError) as exc:
        raise RequestError(
            "invalid_form", f"the body is no form ({exc}), expected parameters and the file of an image."
        ) from None
    try:
        return await _check_form(form)
    finally:
        await form.close()


async def _check_form(form: FormData) -> tuple[ImageRequest, bytes]:
    parameters: dict[str, str] = {}
    image: bytes | None = None
    for name, value in form.multi_items():
        if name == "mask":
            raise RequestError("invalid_value", "mask is given, expected none: the whole image changes.", param="mask")
        if name in ("image", "image[]"):
            if isinstance(value, str):
                raise RequestError("invalid_value", "image is a text, expected a file of the form.", param="image")
            if image is not None:
                raise RequestError("invalid_value", "the form has several images, expected one.", param="image")
            image = await value.read()
        elif not isinstance(value, str):
            raise RequestError("invalid_value", f"{name[:100]} is a file, expected a text.", param=name[:100])
        elif name in parameters:
            raise RequestError("invalid_value", f"{name[:100]} is given twice, expected one.", param=name[:100])
        else:
            parameters[name] = value
    if image is None:
        raise RequestError("invalid_value", "the form has no image, expected a file of this name.", param="image")
    return check_image_request(parameters, from_text=True), image


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await work whose body was read, but cancel it when the client goes.

    Raises:
        ClientDisconnect: If it went.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for each in rest:
            yield each


def _negotiate(request: Request, asked: ImageRequest, count: int, formats: Collection[FileFormat]) -> FileFormat:
    """Return the format of the files; note whether the answer is one file in place of JSON.

    Args:
        request: The request.
        asked: Its body.
        count: Number of images.
        formats: Formats of the model's files, the usual one first.
    """
    types = {MEDIA_TYPES[kind]: kind for kind in formats}
    if asked.output_format not in (None, *formats):
        why = "; mp4 needs the extra video on the server, and an even height and width" if "gif" in formats else ""
        raise RequestError(
            "invalid_value", f"output_format is {asked.output_format}, expected one of {', '.join(formats)}{why}.",
            param="output_format",
        )  # fmt: skip
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "*/*").split(",")]
    wanted = next((types[each] for each in accepted if each in types), None)
    usual = {"*/*", "application/*", "application/json", "text/event-stream", ""}
    request.state.as_file = wanted is not None and not usual & set(accepted) and not asked.stream
    if wanted is None or not request.state.as_file:
        if not usual & set(accepted):
            raise RequestError(
                "not_acceptable", f"Accept is {', '.join(accepted)[:100]!r}, expected application/json or one of "
                f"{', '.join(types)}."
            )  # fmt: skip
        return next(iter(formats)) if asked.output_format is None else asked.output_format
    if count != 1:
        raise RequestError("invalid_value", f"n is {count}, expected 1 where Accept asks for a file.", param="n")
    if asked.output_format not in (None, wanted):
        raise RequestError(
            "not_acceptable", f"Accept asks for {wanted}, output_format for {asked.output_format}, expected one format."
        )
    return wanted  # pyright: ignore[reportReturnType]


def _seeds(given: int | str | None, count: int) -> tuple[int, ...]:
    first = fresh_seed(count) if given is None else int(given)
    try:
        check_seed(first)
        check_seed(first + count - 1)
    except ConfigError as exc:
        raise RequestError("invalid_value", str(exc), param="seed") from None
    return tuple(range(first, first + count))


def _check_content_type(request: Request, expected: str) -> None:
    found = request.headers.get("content-type", "")
    if found.partition(";")[0].strip().lower() != expected:
        raise RequestError("unsupported_media_type", f"Content-Type is {found[:100]!r}, expected {expected}.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("unsupported_media_type", "the body is compressed, expected it as it is.")


def _answer_error(request: Request, exc: Exception) -> Response:
    """Return the answer to a request that failed."""
    error = _as_request_error(request, exc)
    headers = dict(_NO_STORE)
    if error.retry_after is not None:
        headers["Retry-After"] = str(round(error.retry_after))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    if _path(request.scope).startswith("/v2"):  # the protocol's own shape
        return _json({"error": str(error)}, error.status, headers)
    return _json(ErrorObject.of(error), error.status, headers)


def _as_request_error(request: Request, exc: Exception) -> RequestError:
    """Note an error for the log; return what the client may know of it."""
    if not isinstance(exc, RequestError):
        request.state.failure = exc
        exc = RequestError("server_error", f"the server failed, request {request.state.request_id}. Its log says why.")
    request.state.code = exc.code
    return exc


async def _handle(request: Request, exc: Exception) -> Response:
    if isinstance(exc, ClientDisconnect):
        raise exc
    return _answer_error(request, exc)


async def _handle_http_error(request: Request, exc: HTTPException) -> Response:
    """Answer where no route fits."""
    path = request.url.path[:100]
    if exc.status_code == 405:
        return _answer_error(request, RequestError("method_not_allowed", f"{path} does not take {request.method}."))
    return _answer_error(request, RequestError("not_found", f"there is nothing at {path}, see /openapi.json."))


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers or _NO_STORE, "application/json")


def _label(output: GeneratorOutput, index: int) -> int | None:
    return None if output.class_labels is None else output.class_labels[index]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _operation(method: str, path: str) -> str:
    """Return an operation's id: ``POST /v1/images/generations`` is ``post_v1_images_generations``."""
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def _content_security_policy(page: str) -> str:
    """Return a policy that lets a page run its own inline script and style and talk to its server, and nothing else."""
    allowed = {
        kind: " ".join(
            f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
