"""Command arguments for a model: a folder, a ``.scmz`` file or ``hf:OWNER/NAME``, resolved to its local folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .common import say
from .names import arguments_as_options

Command = TypeVar("Command", bound=Callable[..., Any])


def model_argument(name: str, *, required: bool = True, one_size: bool = False) -> Callable[[Command], Command]:
    """Add a model argument, as ``from_pretrained`` takes it, and ``--revision`` for hub ids.

    The command receives the local folder under this name; ``scm_sdk.bundle.resolve.locate`` documents the errors.

    Args:
        name: Name of the argument.
        required: Whether the argument is required; the command receives None if it is absent.
        one_size: Whether the command acts on the first image size of a bundle of several, which is then stated.
    """

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def located(*args: Any, revision: str | None, **options: Any) -> Any:
            given: Path | None = options[name]
            with arguments_as_options():
                if given is not None:
                    options[name] = local_folder(given, revision)
                    if one_size:
                        say_first_size(options[name])
                elif revision is not None:
                    raise click.UsageError(f"--revision is given without {name.upper()}, expected a hub id for it.")
                return command(*args, **options)

        argument = click.argument(name, required=required, type=click.Path(path_type=Path))
        return argument(revision_option(located))  # type: ignore[return-value]

    return add


def say_first_size(folder: Path, what: str = "") -> None:
    """State that a verb acts on the first image size of a bundle, if it has several.

    Args:
        folder: The bundle.
        what: Subject and verb of the message; "" is the command itself.
    """
    from scm_sdk.bundle.manifest import MANIFEST_NAME, describe_size
    from scm_sdk.bundle.verify import read_manifest
    from scm_sdk.errors import BundleError

    if not (folder / MANIFEST_NAME).is_file():
        return
    try:
        first, *others = map(describe_size, read_manifest(folder).image_sizes)
    except BundleError:  # which the verb reports
        return
    if others:
        what = what or f"{click.get_current_context().info_name} takes"
        say(f"  {folder} has the image sizes {', '.join([first, *others])}: {what} the first, {first}")


def revision_option(command: Command) -> Command:
    """Add ``--revision``."""
    return click.option(
        "--revision", metavar="REV", help="Branch, tag or commit of hf:OWNER/NAME; only a commit never changes."
    )(command)


def local_folder(path: Path, revision: str | None, *, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """Return the local folder of a model, as ``locate`` does; print what was downloaded or unpacked.

    Raises:
        BundleError: If there is none.
        ConfigError: If a revision is given for what is no hub id.
    """
    from scm_sdk.bundle.resolve import find_and_hold

    folder, lease = find_and_hold(path, revision=revision, check=check)
    if lease is not None:
        click.get_current_context().call_on_close(lease.release)
    if folder != path:
        say(f"  {path}{f'@{revision}' if revision else ''} is {folder}")
    return folder
