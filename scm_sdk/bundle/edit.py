"""Add artifacts to an existing bundle; unchanged files become hard links to the old ones.

A reader sees the bundle without the new artifacts or with all of them. Long work holds no lock: files that were read
are compared again when the change is published. Changes of other commands are kept; if one of them replaced a source of
the new files, nothing is published.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .._util.files import safe_join
from ..errors import BundleError
from .bundle import Bundle, list_files, staged_bundle, write_changes
from .manifest import SIGNATURE_NAME, Artifact, FileEntry, ImageSize, Manifest, Role
from .verify import check_present, read_manifest, require_own


@dataclass
class Draft:
    """A bundle that is being extended.

    Attributes:
        bundle: The bundle as it was read; the source of the new files.
        folder: Folder of the added files; other files are read from ``bundle``.
        built_from: Sources of each new file, by path.
        roles: Roles of files whose name does not determine it, by path.
        versions: Versions of the libraries that built the new files.
        sources: Further files or folders of ``bundle``, in addition to ``built_from``, that no other command may
            replace in the meantime.
        digests: sha256 of new files that were hashed when they were written, by path.
    """

    bundle: Bundle
    folder: Path
    built_from: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)
    _added: dict[ImageSize | None, dict[str, Artifact]] = field(default_factory=dict)
    """New artifacts by path, by their image size; None is the first."""
    _removed: set[str] = field(default_factory=set)
    _dropped: set[str] = field(default_factory=set)
    _written: Manifest | None = None
    _hashed: set[str] = field(default_factory=set)

    def path(self, relative: str) -> Path:
        """Return the path of a new file or folder; an existing one of this name is dropped."""
        target = safe_join(self.folder, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._dropped.add(relative)
        return target

    def add(
        self, artifact: Artifact, built_from: Sequence[str], *, files: Sequence[str] = (), size: ImageSize | None = None
    ) -> None:
        """Add an artifact, or replace the one with the same path.

        Args:
            artifact: The artifact.
            built_from: Relative paths of its sources.
            files: Further files built with it from the same sources.
            size: Its image size, one of the bundle's; None is the first.
        """
        first = size in (None, self.bundle.manifest.image_sizes[0])
        self._added.setdefault(None if first else size, {})[artifact.path] = artifact
        for path in (artifact.path, *files):
            self.built_from[path] = tuple(built_from)

    def remove(self, path: str) -> None:
        """Remove an artifact with the files in its folder."""
        self._removed.add(path)
        self._dropped.add(path.rpartition("/")[0])

    def merge_into(self, current: Manifest) -> list[str]:
        """Write the manifest of the extended bundle.

        Args:
            current: The current manifest on disk.

        Returns:
            The paths of the unchanged files.

        Raises:
            ConfigError: If the parts are inconsistent.
            BundleError: If a source of the new files was replaced or removed.
        """
        roles: dict[str, Role] = {entry.path: entry.role for entry in current.files}
        roles |= self.roles
        new = {
            entry.path: entry
            for entry in list_files(self.folder, roles=roles, built_from=self.built_from, digests=self.digests)
        }
        kept = {entry.path: entry for entry in current.files if entry.path not in new and not self._drops(entry.path)}
        self._check_sources(current, new)
        for entry in kept.values():
            check_present(self.bundle.path, entry)
        there = kept | new
        files = (_without(there[path], there.keys()) for path in sorted(there))
        sizes = tuple(
            msgspec.structs.replace(size, artifacts=self._with_added(size.artifacts, size.image))
            for size in current.sizes
        )
        extended = msgspec.structs.replace(current, artifacts=self._with_added(current.artifacts, None), sizes=sizes)
        before = {entry.path: entry.sha256 for entry in current.files}
        artifacts = {artifact.path for artifact in extended.all_artifacts}
        same = {path for path in artifacts if path not in new or new[path].sha256 == before.get(path)}
        manifest = msgspec.structs.replace(
            extended,
            files=tuple(files),
            parity=tuple(record for record in current.parity if record.artifact in same),
            versions=current.versions | self.versions,
        )
        unchanged = self.bundle.unchanged_files(kept.values())
        write_changes(self.folder, manifest, over=self.bundle.path)
        self._written = read_manifest(self.folder)
        here = {entry.path for entry in self._written.files if (self.folder / entry.path).exists()}
        self._hashed = here | unchanged
        # The signature becomes invalid; its verification must report that.
        signature = [SIGNATURE_NAME] if (self.bundle.path / SIGNATURE_NAME).is_file() else []
        return [path for path in (*kept, *signature) if not (self.folder / path).exists()]

    def reopen(self) -> Bundle:
        """Open the bundle after the change was published; files that were hashed for it are not read again."""
        assert self._written is not None, "merge_into was called to publish it"
        return Bundle.written(self.bundle.path, self._written, hashed=self._hashed)

    def _with_added(self, artifacts: Sequence[Artifact], size: ImageSize | None) -> tuple[Artifact, ...]:
        kept = {a.path: a for a in artifacts if a.path not in self._removed}
        return tuple((kept | self._added.get(size, {})).values())

    def _drops(self, path: str) -> bool:
        return any(path == dropped or path.startswith(f"{dropped}/") for dropped in self._dropped)

    def _check_sources(self, current: Manifest, new: Mapping[str, FileEntry]) -> None:
        """Refuse new files whose sources were replaced or removed."""
        then = {entry.path: entry.sha256 for entry in self.bundle.manifest.files}
        now = {entry.path: entry.sha256 for entry in current.files}
        sources = self.sources | {source for entry in new.values() for source in entry.built_from}
        for path in then:
            is_source = path in sources or any(path.startswith(f"{source}/") for source in sources)
            if is_source and path not in new and then[path] != now.get(path):
                raise BundleError(
                    f"{path} of {self.bundle.path} was replaced by another command while the bundle was being "
                    "extended, expected the file that was read. Nothing was changed; run the command again."
                )


@contextmanager
def extend_bundle(bundle: Bundle | str | os.PathLike[str]) -> Iterator[Draft]:
    """Change the content of a bundle if the ``with`` block succeeds.

    Unchanged artifacts keep their recorded parity.

    Args:
        bundle: The bundle, as ``open_to_extend`` returned it before the work, or its path.

    Yields:
        The draft. Write files into ``draft.path(...)`` and name them with ``draft.add``.

    Raises:
        BundleError: If the bundle is damaged, is in a cache or cannot be written, or a source of the new files was
            replaced in the meantime.
    """
    if not isinstance(bundle, Bundle):
        require_own(Path(bundle))
        bundle = Bundle.open(bundle)
    require_own(bundle.path)
    with staged_bundle(bundle.path, overwrite=True) as staged:
        draft = Draft(bundle=bundle, folder=staged.folder)
        yield draft
        staged.publish(lambda: draft.merge_into(read_manifest(bundle.path)))


def open_to_extend(path: str | os.PathLike[str] | Bundle) -> Bundle:
    """Open a bundle before work that ends in ``extend_bundle``; refuse one that cannot be changed.

    Args:
        path: The bundle's folder; or the open bundle, of which only what changed is read again.

    Raises:
        BundleError: If the bundle is damaged, is in a cache or cannot be written.
    """
    folder = path.path if isinstance(path, Bundle) else Path(path)
    require_own(folder)
    bundle = path.refreshed() if isinstance(path, Bundle) else Bundle.open(folder)
    with staged_bundle(bundle.path, overwrite=True):
        return bundle


def recipe_of(bundle: Bundle, path: str) -> Mapping[str, Any]:
    """Return the recipe of an artifact; empty if the bundle has no artifact with this path."""
    return next((a.recipe for a in bundle.manifest.all_artifacts if a.path == path), {})


def _without(entry: FileEntry, there: Any) -> FileEntry:
    return msgspec.structs.replace(entry, built_from=tuple(source for source in entry.built_from if source in there))
