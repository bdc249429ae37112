"""Add artifacts to an existing bundle; unchanged files become hard links to the old ones.

A reader sees the bundle without the new artifacts or with all of them. Work that takes minutes holds no lock: what was
read before is compared with what is there when the change is published. Other commands' changes are kept; if one of
them replaced a file that the new ones were made from, nothing is published.
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
from .manifest import SIGNATURE_NAME, Artifact, FileEntry, Manifest, Role
from .verify import check_present, read_manifest, require_own


@dataclass
class Draft:
    """A bundle that is being extended.

    Attributes:
        bundle: The bundle as it was read; new files are made from it.
        folder: The files that are being added; what stays is read from ``bundle``.
        built_from: Sources of each new file, by path.
        roles: Roles of files whose name does not tell it, by path.
        versions: Versions of the libraries that built what is new.
        sources: Files of ``bundle``, or folders of them, that no other command may replace meanwhile, beside those in
            ``built_from``.
    """

    bundle: Bundle
    folder: Path
    built_from: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    _added: dict[str, Artifact] = field(default_factory=dict)
    _removed: set[str] = field(default_factory=set)
    _dropped: set[str] = field(default_factory=set)

    def path(self, relative: str) -> Path:
        """Return where a new file or folder goes; what the bundle has under that name is dropped."""
        target = safe_join(self.folder, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._dropped.add(relative)
        return target

    def add(self, artifact: Artifact, built_from: Sequence[str], *, files: Sequence[str] = ()) -> None:
        """Add an artifact, or replace that of the same path.

        Args:
            artifact: What can be run now.
            built_from: Relative paths of what it was made from.
            files: Further files that were made with it, from the same sources.
        """
        self._added[artifact.path] = artifact
        for path in (artifact.path, *files):
            self.built_from[path] = tuple(built_from)

    def remove(self, path: str) -> None:
        """Remove an artifact with the files in its folder."""
        self._removed.add(path)
        self._dropped.add(path.rpartition("/")[0])

    def merge_into(self, current: Manifest) -> list[str]:
        """Write the manifest of the extended bundle.

        Args:
            current: The manifest that is on disk.

        Returns:
            The paths of the files that stay as they are.

        Raises:
            ConfigError: If the parts do not fit together.
            BundleError: If a file that the new ones were made from was replaced or removed.
        """
        roles = {entry.path: entry.role for entry in current.files} | self.roles
        new = {entry.path: entry for entry in list_files(self.folder, roles=roles, built_from=self.built_from)}
        kept = {entry.path: entry for entry in current.files if entry.path not in new and not self._drops(entry.path)}
        self._check_sources(current, new)
        for entry in kept.values():
            check_present(self.bundle.path, entry)
        there = kept | new
        files = (_without(there[path], there.keys()) for path in sorted(there))
        artifacts = {a.path: a for a in current.artifacts if a.path not in self._removed} | self._added
        before = {entry.path: entry.sha256 for entry in current.files}
        unchanged = {path for path in artifacts if path not in new or new[path].sha256 == before.get(path)}
        manifest = msgspec.structs.replace(
            current,
            artifacts=tuple(artifacts.values()),
            files=tuple(files),
            parity=tuple(record for record in current.parity if record.artifact in unchanged),
            versions=current.versions | self.versions,
        )
        write_changes(self.folder, manifest, over=self.bundle.path)
        # A signature no longer fits, which whoever checks it is to be told.
        signature = [SIGNATURE_NAME] if (self.bundle.path / SIGNATURE_NAME).is_file() else []
        return [path for path in (*kept, *signature) if not (self.folder / path).exists()]

    def _drops(self, path: str) -> bool:
        return any(path == dropped or path.startswith(f"{dropped}/") for dropped in self._dropped)

    def _check_sources(self, current: Manifest, new: Mapping[str, FileEntry]) -> None:
        """Refuse what was made from files that are no longer there."""
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
    """Change what a bundle holds, when the ``with`` block ends well.

    Recorded parity stays with artifacts that stay as they were.

    Args:
        bundle: The bundle, as ``open_to_extend`` returned it before the work that is to be added, or its path.

    Yields:
        The draft. Write files into ``draft.path(...)`` and name them with ``draft.add``.

    Raises:
        BundleError: If the bundle is damaged, lies in a cache, cannot be written, or a file that the new ones were made
            from was replaced meanwhile.
    """
    if not isinstance(bundle, Bundle):
        require_own(Path(bundle))
        bundle = Bundle.open(bundle)
    require_own(bundle.path)
    with staged_bundle(bundle.path, overwrite=True) as staged:
        draft = Draft(bundle=bundle, folder=staged.folder)
        yield draft
        staged.publish(lambda: draft.merge_into(read_manifest(bundle.path)))


def open_to_extend(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle before work that ends in ``extend_bundle``, and refuse at once what could not be published then.

    Raises:
        BundleError: If the bundle is damaged, lies in a cache or cannot be written.
    """
    require_own(Path(path))
    bundle = Bundle.open(path)
    with staged_bundle(bundle.path, overwrite=True):
        return bundle


def recipe_of(bundle: Bundle, path: str) -> Mapping[str, Any]:
    """Return the recipe of an artifact; empty if the bundle has none of that path."""
    return next((a.recipe for a in bundle.manifest.artifacts if a.path == path), {})


def _without(entry: FileEntry, there: Any) -> FileEntry:
    return msgspec.structs.replace(entry, built_from=tuple(source for source in entry.built_from if source in there))
