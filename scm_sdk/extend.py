"""Add artifacts to a bundle that is there: a new folder with links to the old files takes its place.

A reader sees the bundle without the new artifacts or with all of them. Nothing is copied where the
file system has hard links; files are never changed in place, so the links are safe. They are made last: while
a draft is open each file has one name only, as readers that suspect hard links of an attack expect.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._bundle_checks import require_own
from .bundle import Bundle, publish_bundle, write_bundle
from .errors import BundleError
from .files import check_replaceable, safe_join
from .manifest import Artifact, Role


@dataclass
class Draft:
    """A bundle that is being extended.

    Attributes:
        bundle: The bundle as it is.
        folder: The files that are being added; what stays is read from ``bundle``.
        artifacts: What can be run, by path.
        built_from: Sources of each file, by path.
        roles: Roles of files whose name does not tell it, by path.
        versions: Versions of the libraries that built it.
    """

    bundle: Bundle
    folder: Path
    artifacts: dict[str, Artifact]
    built_from: dict[str, tuple[str, ...]]
    roles: dict[str, Role] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def path(self, relative: str) -> Path:
        """Return where a new file or folder goes; what the bundle has under that name is let go of."""
        target = safe_join(self.folder, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._drop(relative)
        return target

    def add(self, artifact: Artifact, built_from: Sequence[str], *, files: Sequence[str] = ()) -> None:
        """Add an artifact, or replace that of the same path.

        Args:
            artifact: What can be run now.
            built_from: Relative paths of what it was made from.
            files: Further files that were made with it, from the same sources.
        """
        self.artifacts[artifact.path] = artifact
        for path in (artifact.path, *files):
            self.built_from[path] = tuple(built_from)

    def remove(self, path: str) -> None:
        """Remove an artifact with the files in its folder."""
        self.artifacts.pop(path)
        for listed in self._drop(path.rpartition("/")[0]):
            self.built_from.pop(listed, None)

    def link_the_rest(self) -> None:
        """Link what stays as it was into the folder."""
        for entry in self.bundle.manifest.files:
            target = self.folder / entry.path
            if entry.path not in self.dropped and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(self.bundle.file(entry.path), target)

    def _drop(self, relative: str) -> list[str]:
        """Let go of a file, or of all files of a folder; return their paths."""
        files = [entry.path for entry in self.bundle.manifest.files]
        gone = [path for path in files if path == relative or path.startswith(f"{relative}/")]
        self.dropped.update(gone)
        return gone


def check_extendable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether ``extend_bundle`` can replace a bundle.

    Raises:
        BundleError: If the bundle lies in a cache, or ``check_replaceable`` refuses it.
    """
    require_own(Path(path))
    check_replaceable(path)


@contextmanager
def extend_bundle(path: str | os.PathLike[str]) -> Iterator[Draft]:
    """Change what a bundle holds; it takes the place of the old one when the ``with`` block ends well.

    Recorded parity stays with artifacts that stay as they were.

    Yields:
        The draft. Write files into ``draft.path(...)`` and name them with ``draft.add``.

    Raises:
        BundleError: If the bundle is damaged, lies in a cache, cannot be written, or was replaced meanwhile.
    """
    require_own(Path(path))
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    with publish_bundle(path, overwrite=True) as folder:
        draft = Draft(
            bundle=bundle,
            folder=folder,
            artifacts={artifact.path: artifact for artifact in manifest.artifacts},
            built_from={entry.path: entry.built_from for entry in manifest.files},
            roles={entry.path: entry.role for entry in manifest.files},
            versions=dict(manifest.versions),
        )
        yield draft
        draft.link_the_rest()
        kept = [r for r in manifest.parity if r.artifact in draft.artifacts and _unchanged(draft, r.artifact)]
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        write_bundle(
            folder,
            name=manifest.name,
            samplers=manifest.samplers,
            artifacts=list(draft.artifacts.values()),
            roles={p: role for p, role in draft.roles.items() if p in there},
            built_from={p: [s for s in sources if s in there] for p, sources in draft.built_from.items() if p in there},
            parity=kept,
            budgets=manifest.budgets,
            provenance=manifest.provenance,
            versions=draft.versions,
            cut_from=manifest.cut_from,
        )
        if Bundle.open(path, verify="none").manifest.build_id != manifest.build_id:
            raise BundleError(
                f"{os.fspath(path)} was replaced while it was being extended, expected one writer at a time. "
                "Nothing was changed; run the command again."
            )


def recipe_of(bundle: Bundle, path: str) -> Mapping[str, Any]:
    """Return the recipe of an artifact; empty if the bundle has none of that path."""
    return next((a.recipe for a in bundle.manifest.artifacts if a.path == path), {})


def _unchanged(draft: Draft, path: str) -> bool:
    """Return whether an artifact's file is still the one that was there: the very same link, or bytes."""
    old, new = draft.bundle.path / path, draft.folder / path
    if new.is_dir():
        return True
    return new.exists() and (os.path.samefile(old, new) or old.read_bytes() == new.read_bytes())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
