"""The modules of the checkout, found on disk."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "scm_sdk": ROOT / "scm_sdk",
    "scm_sdk.export": ROOT / "export",
    "scm_sdk.runtimes": ROOT / "runtimes",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the project with its import name.

    The links inside ``scm_sdk/`` are not followed; folders ``*_files`` hold scripts that are copied, not imported.
    """
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(folder).with_suffix("").parts
            if any(part.endswith("_files") for part in below[:-1]):
                continue
            if package != "scm_sdk" or below[0] not in ("export", "runtimes"):
                name = ".".join((package, *below))
                yield name.removesuffix(".__init__"), path


MODULES = dict(modules())
