"""Import optional libraries on first use, without telemetry; a missing one raises the install command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .._version import __version__
from ..errors import BackendUnavailable
from .telemetry import without_telemetry

_DISTRIBUTION = "scm-sdk"


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it.

    A bare folder of this name, as some stub packages leave, is not the module.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing
        return False
    return spec is not None and spec.loader is not None and spec.origin is not None


def distribution_version(*names: str) -> str | None:
    """Return the version of the first of some distributions that is installed, without an import of it; or None.

    What states no version, such as a folder that an uninstallation left, is not installed.
    """
    from importlib import metadata  # inside: it loads Python's e-mail package

    for name in names:
        try:
            about = metadata.distribution(name).metadata
        except metadata.PackageNotFoundError:
            continue
        if "Version" in about and (version := about["Version"]):  # reading a missing one warns
            return version
    return None


def installed_version(module: str) -> str:
    """Return the version of the distribution that provides a module, or "unknown"."""
    return _provider(module)[1]


def _provider(module: str) -> tuple[str, str]:
    """Return name and version of the distribution that provides a module; the version is "unknown" without one.

    A distribution with the name of the module comes first: to find another one, the files of all are read. Of several
    with a part of the same package, such as ``google``, the one that holds the module comes first.
    """
    from importlib.metadata import files, packages_distributions

    own, folder = module.replace(".", "-"), f"{module.replace('.', '/')}/"
    if version := distribution_version(own):
        return own, version

    def holds(name: str) -> bool:
        return any(file.as_posix().startswith(folder) for file in files(name) or ())

    names = packages_distributions().get(module.partition(".")[0], ())
    found = {name: version for name in names if (version := distribution_version(name))}
    name = max(found, key=holds, default=own)
    return name, found.get(name, "unknown")


def outdated(*modules: str) -> dict[str, str]:
    """Return the modules whose installed version is excluded by the metadata of scm-sdk.

    Returns:
        Found and expected version by module: ``{"onnxscript": "0.5.0, expected >=0.7.2"}``.
    """
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    try:
        asked = [Requirement(line) for line in requires(_DISTRIBUTION) or ()]
    except PackageNotFoundError:  # run from a checkout without installation
        return {}
    broken = dict[str, str]()
    for module in modules:
        name, found = _provider(module)
        try:
            version = Version(found)
        except InvalidVersion:  # "unknown", or that of a build of one's own, which compares with none
            continue
        for each in asked:
            same = canonicalize_name(each.name) == canonicalize_name(name)
            if same and not each.specifier.contains(version, prereleases=True):
                broken[module] = f"{found}, expected {each.specifier}"
    return broken


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise an error with the command that installs it.

    Args:
        module: Import name, for example ``"onnxruntime"``.
        extra: The extra of scm-sdk that installs it.
        purpose: What needs the module; the subject of the message, for example
            ``"backend 'onnxruntime'"``.

    Raises:
        BackendUnavailable: If the module is absent or fails to import.
    """
    try:
        with without_telemetry(module):
            return import_module(module)
    except Exception as exc:  # a broken library, or one that a memory limit keeps from loading, may raise anything
        if not is_installed(module):
            found, command = "is not installed", install_command(extra)
        else:
            reason = str(exc) or f"{type(exc).__name__} without a reason, as when it was built for another NumPy"
            found = f"is installed, but could not be imported ({reason})"
            command = install_command(extra, "--force-reinstall", "--no-cache-dir")
            if (limit := address_space_limit()) is not None:
                raise BackendUnavailable(
                    f"{purpose} needs {module}, which {found}. This process may use {limit >> 20} MiB of address "
                    f"space: raise the limit (ulimit -v). If that does not help, install it again: {command}"
                ) from exc
        twins = " First uninstall both onnxruntime and onnxruntime-gpu: they share a folder." * (
            module == "onnxruntime" and is_installed(module)
        )
        raise BackendUnavailable(
            f"{purpose} needs {module}, which {found}.{twins} Install it with: {command}. See what runs here: "
            "scm-export doctor"
        ) from exc


def address_space_limit() -> int | None:
    """Return the address space limit of this process in bytes, None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def install_command(extra: str, *options: str) -> str:
    """Return the pip command that installs the requirements of an extra on this machine.

    The command names the requirements, because ``scm-sdk`` is installed from a checkout or a wheel and is not on a
    package index.

    Args:
        extra: Name of the extra.
        *options: Options of ``pip install``.
    """
    from importlib.metadata import PackageNotFoundError

    try:
        found = list(dict.fromkeys(_requirements(extra)))
    except PackageNotFoundError:  # run from a checkout without installation
        return f"pip install --editable '.[{extra}]', in the checkout"
    return shlex.join(["pip", "install", *options, *found]) if found else f"no package of {extra!r} is for this machine"


def wheel_command(*extras: str) -> str:
    """Return the pip command that installs scm-sdk with extras from a wheel built by ``pip wheel``."""
    return f"pip install 'dist/{_DISTRIBUTION.replace('-', '_')}-{__version__}-py3-none-any.whl[{','.join(extras)}]'"


def _requirements(extra: str) -> Iterator[str]:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    for line in requires(_DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == _DISTRIBUTION:
            for part in sorted(requirement.extras):
                yield from _requirements(part)
        else:
            yield f"{requirement.name}{requirement.specifier}"
