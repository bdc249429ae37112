"""Option types for names: an unknown name is exit code 2, with the known names and the nearest one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from scm_sdk._util.arguments import nearest_hint

if TYPE_CHECKING:
    _ParamType = click.ParamType[str]  # generic since click 8.4
    _Path = click.Path[Path]
else:
    _ParamType = click.ParamType
    _Path = click.Path


class Name(_ParamType):
    """One of the known names of a kind.

    Args:
        kind: Noun for messages: ``backend``, ``precision``.
        known: Returns the names; called when the option is parsed, so that the help imports nothing.
        more: Additional names, such as ``auto``.
    """

    def __init__(self, kind: str, known: Callable[[], Sequence[str]], more: Sequence[str] = ()) -> None:
        self.name = kind
        self._known, self._more = known, tuple(more)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the option takes."""
        return (*self._more, *self._known())

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help shows for the value."""
        return f"[{'|'.join(self.names)}]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, or fail with the known ones."""
        if value in self.names:
            return str(value)
        hint = nearest_hint(value, self.names)
        self.fail(f"{self.name} is {value!r}, expected {_one_of(self.names)}.{hint}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Complete the name in a shell."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


class BackendName(Name):
    """A backend whose library is installed."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, fail with the known ones, or raise ``BackendUnavailable``: exit code 7."""
        from scm_sdk._util.lazy import install_command, is_installed
        from scm_sdk.errors import BackendUnavailable
        from scm_sdk.inference.backends import BACKENDS

        name = super().convert(value, param, ctx)
        info = BACKENDS.get(name)
        if info is not None and not is_installed(info.library):
            raise BackendUnavailable(
                f"backend {name!r} needs {info.library}, which is not installed. Install it with: "
                f"{install_command(info.extra)}. See what runs here: scm-export doctor"
            )
        return name


class BackendAndPrecision(_ParamType):
    """``NAME`` or ``NAME:PRECISION``."""

    name = "backend"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what the help shows for the value."""
        return "NAME[:PRECISION]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value with both names checked."""
        backend, colon, precision = str(value).partition(":")
        BACKEND.convert(backend, param, ctx)
        if colon:
            PRECISION.convert(precision, param, ctx)
        return str(value)


class OutputPath(_Path):
    """An output path outside any bundle: a bundle holds only what its manifest lists.

    Args:
        replaces: Whether the path may be a bundle itself, which is replaced or completed.
    """

    def __init__(self, *, replaces: bool = False) -> None:
        super().__init__(path_type=Path)
        self._replaces = replaces

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, or fail if a bundle holds it."""
        from scm_sdk.bundle.manifest import MANIFEST_NAME

        path = super().convert(value, param, ctx)
        whole = Path(os.path.abspath(path))
        for folder in whole.parents if self._replaces else (whole, *whole.parents):
            if os.path.isfile(folder / MANIFEST_NAME):
                self.fail(f"{path} is in the bundle {folder}, expected a path outside it. Choose another.", param, ctx)
        return path


class TargetName(_ParamType):
    """A GPU or a compute capability, as ``resolve_target`` knows them."""

    name = "gpu"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, or fail with close ones."""
        from scm_sdk.engines.targets import resolve_target
        from scm_sdk.errors import ConfigError

        try:
            resolve_target(str(value))
        except ConfigError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)


@contextmanager
def arguments_as_options() -> Iterator[None]:
    """Replace the names of Python arguments in error texts by the options of the running verb."""
    from scm_sdk.errors import ConfigError

    params = click.get_current_context().command.params
    options = {p.name: max(p.opts, key=len) for p in params if isinstance(p, click.Option)}
    flags = {flag for p in params for flag in p.opts}
    for argument, option in (("num_inference_steps", "steps"), ("num_threads", "threads"), ("min_psnr_db", "min_psnr")):
        options |= {argument: options[option]} if option in options else {}
    try:
        yield
    except ConfigError as exc:
        name = r"(?<![\w/.-])[a-z]+_[a-z_]+(?!\w|[/.]\w)"
        text = re.sub(name, lambda found: options.get(found[0], found[0]), str(exc))
        values = r"(?<![\w/.-])(backend|precision)='([\w-]+)'"
        text = re.sub(values, lambda f: f"--{f[1]} {f[2]}" if f"--{f[1]}" in flags else f[0], text)
        raise ConfigError(text) from exc


def one_of(kind: str, *names: str) -> Name:
    """Return the type of an option that takes one of a few fixed names."""
    return Name(kind, lambda: names)


def _backends() -> tuple[str, ...]:
    from scm_sdk.inference.backends import BACKENDS

    return tuple(BACKENDS)


def _precisions() -> tuple[str, ...]:
    from scm_sdk.spec import Precision

    return get_args(Precision)


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


BACKEND = BackendName("backend", _backends)
BACKEND_OR_AUTO = BackendName("backend", _backends, ("auto",))
PRECISION = Name("precision", _precisions)
PRECISION_OR_AUTO = Name("precision", _precisions, ("auto",))


def sampler_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--times`` and ``--sigmas``, which become the argument ``times``, ``--renoise`` and ``--start-time``."""
    from scm_sdk.spec import Renoise, flow_times

    def as_times(ctx: click.Context, param: click.Parameter, sigmas: tuple[float, ...]) -> None:
        if sigmas and ctx.params.get("times"):
            raise click.UsageError("--times and --sigmas are both given, expected one of them.")
        if sigmas:
            ctx.params["times"] = flow_times(sigmas)

    for option in (
        click.option(
            "--start-time", type=float,
            help="Start time of a further sampler with one step, for generate --image, radians.",
        ),
        click.option(
            "--renoise", type=one_of("renoise", *get_args(Renoise)),
            help="Noise of later steps: new, that of the first step, or of the ODE; default: the model's rule.",
        ),
        click.option(
            "--sigmas", multiple=True, type=float, expose_value=False, callback=as_times,
            help="Flow-matching noise levels of one sampler, 0 to 1, instead of --times.",
        ),
        click.option(
            "--times", multiple=True, type=float, is_eager=True,
            help="Times of one sampler, radians, instead of --steps.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


split_option = click.option(
    "--split", is_flag=True, help="Make the decoder of latents a graph of its own, for generate --offload."
)
"""Option of the verbs that make a bundle."""
STEPS = click.IntRange(1, 64)
"""Number of network calls of a sampler."""
