"""What the stages of one process share about a bundle: its checked files and its parsed graphs.

Every verb starts from a path. Where verbs are chained, as by ``all``, they are given one ``Workspace`` in place of the
path: then a file is hashed and a graph parsed once, until the file changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scm_sdk._util.files import sha256_bytes
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.edit import Draft, extend_bundle, open_to_extend

from .graph.io import GRAPH_NAME, data_path_of, read_model

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)


class Workspace:
    """A bundle and what was read of it in this process. Not for several threads.

    Args:
        path: The bundle's folder, which need not be there yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bundle: Bundle | None = None
        self._graphs: dict[str, ir.Model] = {}

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Workspace) -> Workspace:
        """Return a workspace as it is, and a new one for a path."""
        return given if isinstance(given, Workspace) else cls(given)

    @property
    def bundle(self) -> Bundle:
        """The bundle as it is on disk now. Every file was hashed, at the first use or after it changed.

        Raises:
            BundleError: As ``Bundle.open``.
        """
        self._bundle = Bundle.open(self.path) if self._bundle is None else self._bundle.refreshed()
        return self._bundle

    def adopt(self, bundle: Bundle) -> None:
        """Take a bundle that was just written to the path as the one that is open."""
        self._bundle = bundle

    def open_to_extend(self) -> Bundle:
        """Return the bundle before work that ends in ``extend``; see ``bundle.edit.open_to_extend``."""
        self._bundle = open_to_extend(self.path if self._bundle is None else self._bundle)
        return self._bundle

    @contextmanager
    def extend(self, bundle: Bundle) -> Iterator[Draft]:
        """Change what the bundle holds; see ``bundle.edit.extend_bundle``.

        Args:
            bundle: As ``open_to_extend`` returned it before the work that is to be added.
        """
        with extend_bundle(bundle) as draft:
            yield draft
        self._bundle = draft.reopen()

    def graph(self, path: str) -> ir.Model:
        """Return a graph of the bundle, parsed once. Clone it before you change it.

        Args:
            path: Of an artifact or another graph, inside the bundle.

        Raises:
            ExportError: As ``read_model``.
        """
        bundle = self.opened
        digest = sha256_of(bundle, path)
        if digest not in self._graphs:
            logger.debug("parse %s", path)
            self._graphs[digest] = read_model(bundle.file(path))
        return self._graphs[digest]

    @property
    def opened(self) -> Bundle:
        """The bundle as it was when it was last opened, refreshed or extended; opened now if it was not.

        Raises:
            BundleError: As ``Bundle.open``.
        """
        return self.bundle if self._bundle is None else self._bundle


def sha256_of(bundle: Bundle, path: str) -> str:
    """Return the digest of a graph of a bundle together with its weights, as the manifest has them.

    The weights of a graph at a further image size are those of the first size; what differs is in the graph, or in its
    own file, whose places and sizes are in the graph.
    """
    entries = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    first = Path(path).with_name(GRAPH_NAME) if bundle.holding(path) is not bundle else Path(path)
    data = data_path_of(first).as_posix()
    return entries[path] if data not in entries else sha256_bytes(f"{entries[path]}{entries[data]}".encode())
