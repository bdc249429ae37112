"""A bundle: one folder with a model in several formats and a manifest with the hash of each file.

``export`` fills a folder and calls ``write_bundle``; ``Generator`` calls ``Bundle.open``. Bundles are untrusted: path
and size limits are checked first, then the schema, then size and sha256 of every file, before a library gets a file.
Files that the manifest does not list are never opened. A bundle holds no pickle.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from .._util.files import (
    atomic_write_bytes,
    map_files,
    remove_leftovers,
    safe_join,
    scratch_folder,
    sha256_bytes,
    sha256_file,
)
from .._util.publish import Staged, staged_folder, undisturbed
from ..errors import BundleError, ConfigError, IntegrityError, SchemaError
from ..spec import Precision, SamplerSpec
from .archive import SUFFIX
from .archive import pack as pack_folder
from .card import CARD_PATH, bundle_card, generated_for
from .digest_cache import recall_digest, remember_digest
from .goldens import GOLDEN_PATH, Golden, read_goldens, write_goldens
from .graph_checks import check_graph_file
from .hub import HUB_PREFIX, push
from .manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Artifact,
    FileEntry,
    Format,
    Manifest,
    ParityRecord,
    Role,
    Size,
    files_of,
    image_size,
    role_of,
)
from .scores import SCORES_PATH, read_scores
from .signing import check_current, warn_if_signed
from .status import ModelStatus
from .subset import cut
from .verify import (
    BUILD_ROLES,
    Stamp,
    check_content,
    check_manifest,
    check_present,
    finish_change,
    is_settled,
    read_manifest,
    require_own,
    seal,
    stamp,
)

logger = logging.getLogger(__name__)

Verify = Literal["none", "digest", "remembered"]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk. Create it with ``Bundle.open``.

    Attributes:
        path: Folder of the bundle.
        manifest: Content of the bundle.
    """

    path: Path
    manifest: Manifest
    _seen: dict[str, Stamp] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Stamps of the files when the bundle was opened."""
    _hashed: dict[str, Stamp] = field(default_factory=dict, init=False, repr=False, compare=False)
    _is_further: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether it is a view of a further image size, as ``at_size`` returns."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: Verify = "digest") -> Bundle:
        """Open and check a bundle.

        Args:
            path: The folder.
            verify: ``digest`` compares every file with its sha256, and ``remembered`` too, but takes that of a file
                that this user hashed before and that did not change since (``digest_cache``); ``none`` compares only
                the sizes of the existing files, for callers that check the files they open (``check_unchanged``) and
                for verified folders.

        Raises:
            BundleError: If the folder is not a bundle, or a path leaves it.
            SchemaError: If the manifest is malformed or from a newer version.
            IntegrityError: If a file is missing, altered or truncated.
            ConfigError: If ``verify`` is none of these.
        """
        if verify not in get_args(Verify):
            raise ConfigError(f"verify is {verify!r}, expected one of {', '.join(get_args(Verify))}.")
        return cls._read_settled(Path(path), verify)

    @classmethod
    def written(cls, path: str | os.PathLike[str], manifest: Manifest, *, hashed: Collection[str]) -> Bundle:
        """Open a bundle that this process has just written, without reading its files again.

        Args:
            path: The folder.
            manifest: What was written. If the one on disk differs, every file is hashed, as ``open`` does.
            hashed: Paths of the files that this process hashed as it wrote them, or earlier, unchanged since.

        Raises:
            BundleError: As ``open`` does.
        """
        bundle = cls._read_settled(Path(path), "none")
        if bundle.manifest != manifest:
            return cls.open(path)
        bundle._hashed.update({path: bundle._seen[path] for path in hashed})
        return bundle

    def refreshed(self, *, verify: Verify = "digest") -> Bundle:
        """Open the bundle again as it is on disk now; files that did not change since they were hashed are not read.

        Args:
            verify: ``digest`` and ``remembered`` check all other files now, ``none`` when ``check_unchanged`` needs
                them; see ``open``.

        Raises:
            BundleError: As ``open`` does.
        """
        again = self._read_settled(self.path, verify, before=self)
        return again.at_size(*image_size(self.manifest.samplers)) if self._is_further else again

    def unchanged_files(self, entries: Iterable[FileEntry]) -> set[str]:
        """Return the paths of those listed files that were hashed, with this result, and did not change since."""
        digests = {entry.path: entry.sha256 for entry in self.manifest.files}
        return {
            entry.path
            for entry in entries
            if digests.get(entry.path) == entry.sha256
            and self._hashed.get(entry.path, ()) == stamp(self.path / entry.path) != ()
        }

    @classmethod
    def _read_settled(cls, folder: Path, verify: Verify, *, before: Bundle | None = None) -> Bundle:
        finish_change(folder)
        try:
            return cls._read(folder, verify, before)
        except IntegrityError:  # damaged, or another process published a change while it was read
            with undisturbed(folder, shared=True, purpose=f"open {folder}"):
                return cls._read(folder, verify, before)

    @classmethod
    def _read(cls, folder: Path, verify: Verify, before: Bundle | None) -> Bundle:
        bundle = cls(folder, read_manifest(folder))
        bundle._check(verify, before)
        return bundle

    def _check(self, verify: Verify, before: Bundle | None) -> None:
        known = before.unchanged_files(self.manifest.files) if before is not None else set()
        for entry in self.manifest.files:
            self._seen[entry.path] = stamp(self.path / entry.path)
            if verify != "none" or os.path.lexists(self.path / entry.path):
                check_present(self.path, entry)
        if before is not None:
            known = {path for path in known if before._hashed[path] == self._seen[path]}
            self._hashed.update({path: self._seen[path] for path in known})
        if verify != "none":
            logger.debug("open %s: %d files, %d known", self.path, len(self.manifest.files), len(known))
            self._verify(known, remembered=verify == "remembered")

    @property
    def status(self) -> ModelStatus:
        """State of the model: its kind, the length of its training, whether its quality was measured."""
        measured = bool(_scores(self.path, self.manifest))
        return ModelStatus.of(self.manifest.provenance, quality_measured=measured)

    def verify(self) -> None:
        """Compare every file with its recorded size and sha256; check the headers of tensor files, and every graph.

        Raises:
            BundleError: If a graph holds an operator that is not allowed, or names an unlisted file.
            IntegrityError: If a file differs; the message names it.
        """
        self._verify(set())

    def _verify(self, known: Collection[str], *, remembered: bool = False) -> None:
        entries = [entry for entry in self.manifest.files if entry.path not in known]
        check = partial(self._check_content, remembered=remembered)
        map_files(check, entries, num_bytes=sum(entry.size for entry in entries))
        for path in self._graphs:
            if not {path, *(entry.path for entry in files_of(self.manifest, path))} <= set(known):
                self.check_graph(path)

    def check_graph(self, path: str) -> None:
        """Check a listed ONNX graph before a library reads it; see ``graph_checks``.

        Raises:
            BundleError: If the graph holds an operator that is not allowed, or names an unlisted file.
            IntegrityError: If it is not a graph, or not a graph of its artifact's sampler.
        """
        bundle = self.holding(path)
        steps = next((a.num_inference_steps for a in bundle.manifest.artifacts if a.path == path), 0)
        # Weights must be in files that are hashed with the artifact, in its folder.
        hashed = {entry.path.rpartition("/"): entry.size for entry in files_of(self.manifest, path)}
        beside = {name: size for (folder, _, name), size in hashed.items() if folder == path.rpartition("/")[0]}
        check_graph_file(self.file(path), beside, bundle.graph_spec(steps) if steps else None)

    def check_unchanged(self, artifact: str, *, verify: Verify = "digest") -> tuple[Stamp, ...]:
        """Compare the files of an artifact on disk with the opened manifest.

        A file with unchanged inode, size and times is not hashed again.

        Args:
            artifact: Path of the artifact, or of another listed file.
            verify: ``digest`` compares sha256; ``remembered`` too, as in ``open``; ``none`` compares sizes and the
                current manifest on disk.

        Returns:
            The stamp of each file. If ``stamps`` returns others later, a file was changed in between.

        Raises:
            IntegrityError: If a file is missing or damaged, or the bundle was replaced or edited since it was opened.
        """
        return tuple(self._check_unchanged(entry, verify) for entry in self._files(artifact))

    @contextmanager
    def check_while_loading(self, artifact: str, *, verify: Verify = "digest") -> Iterator[None]:
        """Compare the files of an artifact, as ``check_unchanged``, for a block that loads them.

        The weights next to an ONNX graph are numbers, which no library interprets: they are hashed while the block
        runs, on another core. All other files are hashed before. What the block loads is usable only after its end.

        Args:
            artifact: Path of the artifact, or of another listed file.
            verify: As in ``check_unchanged``.

        Raises:
            IntegrityError: As ``check_unchanged``, before or at the end of the block.
        """
        numbers = []
        for entry in self._files(artifact):
            if verify != "none" and artifact.endswith(".onnx") and entry.path != artifact:
                with self._explained(entry) as found:  # its size, which the check of the graph relies on
                    check_present(self.path, entry)
                if self._hashed.get(entry.path) != found:
                    numbers.append(entry)
            else:
                self._check_unchanged(entry, verify)
        if not numbers:
            yield
            return
        from concurrent.futures import ThreadPoolExecutor  # slow to import, and only large graphs need it

        with ThreadPoolExecutor(1, "scm-hash") as thread:
            hashing = [thread.submit(self._check_unchanged, entry, verify) for entry in numbers]
            try:
                yield
            finally:  # first, because damaged weights explain what the block raised
                for each in hashing:
                    each.result()

    def check_file(self, relpath: str, *, verify: Verify = "digest") -> None:
        """Compare one file, if it is listed, with the opened manifest, as ``check_unchanged``.

        Raises:
            IntegrityError: As ``check_unchanged``.
        """
        for entry in self.manifest.files:
            if entry.path == relpath:
                self._check_unchanged(entry, verify)

    def check_text_encoder(self, artifact: str, *, verify: Verify = "digest") -> None:
        """Compare the text encoder and tokenizer of a pipeline with the opened manifest, as ``check_unchanged``.

        Args:
            artifact: The checkpoint that holds the text encoder.
            verify: As in ``check_unchanged``.

        Raises:
            IntegrityError: As ``check_unchanged``.
        """
        for entry in files_of(self.manifest, artifact):
            if _encodes_prompts(entry, artifact) or entry.role != "weights":
                self._check_unchanged(entry, verify)

    def stamps(self, artifact: str) -> tuple[Stamp, ...]:
        """Return the stamp of each file of an artifact."""
        return tuple(stamp(self.path / entry.path) for entry in self._files(artifact))

    @property
    def build_files(self) -> frozenset[tuple[str, str]]:
        """Path and sha256 of each file that decides the images."""
        return frozenset((entry.path, entry.sha256) for entry in self.manifest.files if entry.role in BUILD_ROLES)

    def file(self, relpath: str) -> Path:
        """Return the path of a listed file, or of a folder that holds listed files.

        Raises:
            BundleError: If the manifest lists no such file.
        """
        if not any(e.path == relpath or e.path.startswith(f"{relpath}/") for e in self.manifest.files):
            raise BundleError(
                f"{self.path} lists no {relpath!r}, expected one of: "
                f"{', '.join(e.path for e in self.manifest.files)}. Export the bundle again with that part."
            )
        return safe_join(self.path, relpath)

    def artifacts(
        self,
        *,
        format: Format | None = None,
        precision: Precision | None = None,
        num_inference_steps: int | None = None,
    ) -> tuple[Artifact, ...]:
        """Return the artifacts in the order of the manifest, filtered by each given argument.

        A checkpoint matches any ``num_inference_steps``, because PyTorch unrolls it on demand.
        """
        return tuple(
            a
            for a in self.manifest.artifacts
            if (format is None or a.format == format)
            and (precision is None or a.precision == precision)
            and (num_inference_steps is None or a.num_inference_steps in (0, num_inference_steps))
        )

    def at_size(self, height: int, width: int) -> Bundle:
        """Return the bundle with the samplers and artifacts of one of its image sizes, for reading.

        Raises:
            ConfigError: If the bundle does not have this size.
        """
        manifest = self.manifest.at_size(height, width)
        if manifest is self.manifest:
            return self
        view = Bundle(self.path, manifest)
        object.__setattr__(view, "_seen", self._seen)  # shared: the files are the same, and are hashed once
        object.__setattr__(view, "_hashed", self._hashed)
        object.__setattr__(view, "_is_further", True)
        return view

    def holding(self, artifact: str) -> Bundle:
        """Return the bundle at the image size that an artifact is of; itself for any other path."""
        sizes = self.manifest.sizes
        found = next((size for size in sizes if any(a.path == artifact for a in size.artifacts)), None)
        return self if found is None else self.at_size(*found.image)

    def spec(self, num_inference_steps: int) -> SamplerSpec:
        """Return the sampler with this number of steps.

        If the bundle holds a checkpoint, which runs any number of steps, a number that was not exported is derived
        from the first sampler.

        Raises:
            ConfigError: If the bundle cannot run this number of steps.
        """
        samplers = self.manifest.samplers
        for spec in samplers:
            if spec.num_inference_steps == num_inference_steps:
                return spec
        if any(a.num_inference_steps == 0 for a in self.manifest.artifacts):
            return samplers[0].with_steps(num_inference_steps)
        raise ConfigError(
            f"num_inference_steps is {num_inference_steps}, expected one of "
            f"{', '.join(str(s.num_inference_steps) for s in samplers)}, which {self.path} was exported with."
            f"{self.manifest.cut_note}"
        )

    def graph_spec(self, num_inference_steps: int) -> SamplerSpec:
        """Return the spec of the graphs and engines with this number of steps; those of a split bundle end in latents.

        Raises:
            ConfigError: As ``spec``.
        """
        spec = self.spec(num_inference_steps)
        return spec.before_decoder if self.manifest.is_split else spec

    def check_not_split(self, purpose: str) -> None:
        """Refuse a bundle whose decoder is a graph of its own.

        Args:
            purpose: What needs graphs that return images, the subject of the message.

        Raises:
            ConfigError: If it is one.
        """
        if self.manifest.is_split:
            raise ConfigError(
                f"{purpose} needs graphs that return images, but those of {self.path} end in latents, and the decoder "
                "is a graph of its own. Import or export the model without --split and --frame-decoder for this."
            )

    def goldens(self) -> dict[int, Golden]:
        """Return the recorded samples by number of steps; empty if the bundle has none, as at further image sizes.

        Raises:
            IntegrityError: If the file does not match the samplers.
        """
        if self._is_further or not any(entry.path == GOLDEN_PATH for entry in self.manifest.files):
            return {}
        return read_goldens(self.file(GOLDEN_PATH), self.manifest.samplers)

    def with_parity(self, *records: ParityRecord) -> Bundle:
        """Record comparisons in the manifest on disk; each replaces the previous one with the same ``key``.

        Changes that other processes made since the bundle was opened are kept.

        Returns:
            The bundle with the new manifest.

        Raises:
            ConfigError: If a record holds NaN or infinity.
            BundleError: If the manifest cannot be written, or an artifact of a record was replaced in the meantime.
        """

        def change(manifest: Manifest) -> Manifest:
            for path in {path for record in records for path in (record.artifact, record.reference)}:
                if set(files_of(manifest, path)) != set(files_of(self.manifest, path)):
                    raise BundleError(
                        f"{path} of {self.path} was replaced while it was being compared, expected the file that was "
                        "compared. Nothing was recorded; run the command again."
                    )
            kept = {r.key: r for r in (*manifest.parity, *records)}
            return msgspec.structs.replace(manifest, parity=tuple(kept.values()))

        return self._with(change)

    def with_budgets(self, *budgets: str) -> Bundle:
        """Replace the latency budgets of the bundle; see ``evaluate.stored_budgets``.

        Raises:
            BundleError: If the manifest cannot be written.
        """
        return self._with(lambda manifest: msgspec.structs.replace(manifest, budgets=budgets))

    def with_card(self, *, where: str = "") -> Bundle:
        """Generate the model card; an edited or handwritten card is replaced.

        Every change of a bundle also regenerates a generated card.

        Args:
            where: Location in the usage examples, for example ``hf:owner/name``; "" for a placeholder.

        Raises:
            BundleError: If the bundle cannot be written.
        """
        return self._with(lambda manifest: manifest, where=where)

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Bundle:
        """Copy the bundle: every listed file, verified, and its signature, without unlisted files.

        Raises:
            BundleError: If the bundle is damaged, or ``path`` may not be replaced or cannot be written.
        """
        with (
            publish_bundle(path, overwrite=overwrite) as folder,
            undisturbed(self.path, shared=True, purpose=f"copy {self.path}"),
        ):
            self.verify()
            for name in self._names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(safe_join(self.path, name), folder / name)
        return Bundle.open(path)

    def subset(self, path: str | os.PathLike[str], only: Sequence[str], *, overwrite: bool = False) -> Bundle:
        """Write a bundle with only some artifacts and their records and samples.

        The result is a complete bundle without the checkpoint and the text encoder unless they are named. Its manifest
        names the original build. A signature of the full bundle is not copied.

        Args:
            path: The folder to write.
            only: Names of the artifacts: folders such as ``onnx/fp16/2step``, or ``onnx/fp16`` for several.
            overwrite: Replace an existing bundle.

        Raises:
            ConfigError: If an artifact does not exist.
            BundleError: If a file of it is damaged, or ``path`` may not be replaced or cannot be written.
        """
        manifest = cut(self.manifest, only)
        with publish_bundle(path, overwrite=overwrite) as folder:
            for entry in manifest.files:
                (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
                check_present(self.path, entry)
                shutil.copyfile(safe_join(self.path, entry.path), folder / entry.path)
                check_content(folder, entry)
            write_manifest(folder, _with_goldens_cut(folder, manifest, self.manifest.samplers))
        return Bundle.open(path)

    def pack(self, out: str | os.PathLike[str], *, only: Sequence[str] = (), overwrite: bool = False) -> Path:
        """Write the bundle, or a ``subset`` of it, as one ``.scmz`` file or as a folder.

        Args:
            out: A file whose name ends in ``.scmz``, replaced if it exists, or a folder.
            only: Names of the artifacts to keep, as for ``subset``; () keeps the full bundle.
            overwrite: Replace the bundle in the folder ``out``.

        Raises:
            ConfigError: If an artifact does not exist.
            BundleError: If the bundle is damaged, or ``out`` may not be replaced or cannot be written.
        """
        out = Path(out)
        if out.suffix != SUFFIX:
            if only:
                return self.subset(out, only, overwrite=overwrite).path
            return self.save_pretrained(out, overwrite=overwrite).path
        if not only:
            return pack_folder(self.path, out)
        with scratch_folder() as folder:
            return pack_folder(self.subset(folder / "bundle", only).path, out)

    def push_to_hub(
        self, repo_id: str, *,
        revision: str | None = None, private: bool | None = None, message: str = "", create_pr: bool = False,
    ) -> str:  # fmt: skip
        """Upload every listed file, checked, to the Hugging Face hub; see ``hub.push``.

        The uploaded card is current and names the hub id, unless it was edited. A signed bundle is uploaded unchanged,
        with the signature. The bundle on disk is not changed.

        Returns:
            URL of the commit.

        Raises:
            BundleError: If the bundle is damaged, or the hub refuses or cannot be reached.
            BackendUnavailable: If huggingface_hub is not installed.
        """
        self.verify()
        card = None
        if not check_current(self.path):
            card = _fresh_card(
                self.manifest,
                old=_card_in(self.path),
                quality=_scores(self.path, self.manifest),
                where=f"{HUB_PREFIX}{repo_id}",
            )
        contents = {}
        if card is not None:
            contents = {CARD_PATH: card, MANIFEST_NAME: _encode(_with_card(self.manifest, card))}
        names = list(dict.fromkeys([*self._names, *contents]))
        return push(
            self.path, names, repo_id, contents=contents, revision=revision, private=private, message=message,
            create_pr=create_pr,
        )  # fmt: skip

    def _check_unchanged(self, entry: FileEntry, verify: Verify) -> Stamp:
        with self._explained(entry) as found:
            if verify != "none":
                if self._hashed.get(entry.path) != found:
                    self._check_content(entry, remembered=verify == "remembered")
                return found
            check_present(self.path, entry)
            same = entry in read_manifest(self.path).files
        if not same:
            raise self._changed(entry)
        return found

    @contextmanager
    def _explained(self, entry: FileEntry) -> Iterator[Stamp]:
        """Give the stamp of a file; an error of the block states whether the file changed since the bundle was opened.

        Raises:
            IntegrityError: If the block raised, and the file changed.
        """
        found = stamp(self.path / entry.path)
        try:
            yield found
        except BundleError as exc:
            if self._seen.get(entry.path) == found or isinstance(exc.__cause__, PermissionError):
                raise  # damaged or missing before the bundle was opened
            raise self._changed(entry) from exc

    def _check_content(self, entry: FileEntry, *, remembered: bool = False) -> None:
        path = self.path / entry.path
        found = stamp(path)  # before it is read
        known = remembered and recall_digest(path, found) == entry.sha256
        check_content(self.path, entry, sha256=entry.sha256 if known else "")
        if is_settled(found):
            self._hashed[entry.path] = found
            if remembered and not known:
                remember_digest(path, found, entry.sha256)

    def _files(self, artifact: str) -> list[FileEntry]:
        """Return the files loaded with an artifact, in order; a text encoder is loaded with the first prompt."""
        found = (entry for entry in files_of(self.manifest, artifact) if not _encodes_prompts(entry, artifact))
        return sorted(found, key=lambda entry: entry.path)

    def _changed(self, entry: FileEntry) -> IntegrityError:
        return IntegrityError(
            f"the bundle at {self.path} was changed since it was opened; open it again. {entry.path} is not the file "
            f"that was listed then, expected {entry.size} bytes of sha256 {entry.sha256[:12]}.."
        )

    @property
    def _graphs(self) -> list[str]:
        named = {artifact.path for artifact in self.manifest.all_artifacts if artifact.format == "onnx"}
        return sorted(named | {entry.path for entry in self.manifest.files if entry.path.endswith(".onnx")})

    @property
    def _names(self) -> list[str]:
        """Files to copy: the listed ones, and the signature if it is valid."""
        signature = [SIGNATURE_NAME] if check_current(self.path) else []
        return [MANIFEST_NAME, *signature, *(entry.path for entry in self.manifest.files)]

    def _with(self, change: Callable[[Manifest], Manifest], *, where: str | None = None) -> Bundle:
        require_own(self.path)
        with undisturbed(self.path, purpose=f"write to {self.path}"):
            remove_leftovers(self.path)
            manifest = change(read_manifest(self.path))
            return Bundle(self.path, write_manifest(self.path, manifest, where=where))


@contextmanager
def publish_bundle(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder that becomes the bundle at ``path`` if the ``with`` block succeeds.

    Call ``write_bundle`` at the end of the block. With ``overwrite`` an existing bundle is replaced and stays complete
    if anything fails; a folder that is not a bundle is never replaced. Files that the existing bundle does not list
    stay.

    Yields:
        The folder to fill.

    Raises:
        BundleError: If ``path`` may not be replaced or cannot be written.
    """
    with staged_bundle(path, overwrite=overwrite) as staged:
        yield staged.folder
        if not (staged.folder / MANIFEST_NAME).is_file():
            raise BundleError(f"no {MANIFEST_NAME} was written for {os.fspath(path)}. Call write_bundle last.")
        staged.publish()


def staged_bundle(path: str | os.PathLike[str], *, overwrite: bool) -> AbstractContextManager[Staged]:
    """Fill a folder that becomes the bundle at ``path`` when it is published; see ``publish.staged_folder``."""
    return staged_folder(path, overwrite=overwrite, marker=MANIFEST_NAME, owned=_listed, error=BundleError)


def _listed(folder: Path) -> set[str]:
    """Return the listed files of a bundle; all files if its manifest cannot be read."""
    try:
        signature = {SIGNATURE_NAME} if os.path.lexists(folder / SIGNATURE_NAME) else set()
        return {MANIFEST_NAME, *signature, *(entry.path for entry in read_manifest(folder).files)}
    except BundleError:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def write_bundle(
    folder: Path,
    *,
    name: str,
    samplers: Sequence[SamplerSpec],
    artifacts: Sequence[Artifact],
    roles: Mapping[str, Role] | None = None,
    built_from: Mapping[str, Sequence[str]] | None = None,
    parity: Sequence[ParityRecord] = (),
    budgets: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    cut_from: str = "",
    digests: Mapping[str, str] | None = None,
    sizes: Sequence[Size] = (),
) -> Manifest:
    """Write the manifest of a folder that already holds all other files.

    Args:
        folder: The folder, normally that of ``publish_bundle`` or ``atomic_folder``.
        name: Human name of the model.
        samplers: One spec for each number of steps, at least one.
        artifacts: Artifacts with relative paths.
        roles: Role by relative path, for files whose name does not determine it.
        built_from: Sources of a file; relative paths.
        parity: Recorded comparisons.
        budgets: Latency budgets.
        provenance: Origin of weights and data; JSON values.
        versions: Versions of the libraries that built the bundle.
        cut_from: Build id of the full bundle, if this one is a subset.
        digests: sha256 of files that were hashed when they were written; the others are hashed now.
        sizes: Further image sizes.

    Returns:
        The written manifest.

    Raises:
        ConfigError: If a role is unknown, or the parts are inconsistent.
        BundleError: If the folder holds a link or cannot be read or written.
    """
    entries = list_files(folder, roles=roles or {}, built_from=built_from or {}, digests=digests)
    manifest = Manifest(
        build_id="",
        name=name,
        samplers=tuple(samplers),
        artifacts=tuple(artifacts),
        files=tuple(entries),
        parity=tuple(parity),
        budgets=tuple(budgets),
        provenance=dict(provenance or {}),
        versions=dict(versions or {}),
        cut_from=cut_from,
        sizes=tuple(sizes),
    )
    return write_manifest(folder, manifest)


def list_files(
    folder: Path,
    *,
    roles: Mapping[str, Role],
    built_from: Mapping[str, Sequence[str]],
    digests: Mapping[str, str] | None = None,
) -> list[FileEntry]:
    """Return an entry for every file in a folder except the manifest.

    Args:
        folder: The folder.
        roles: As ``write_bundle``.
        built_from: As ``write_bundle``.
        digests: As ``write_bundle``.

    Raises:
        ConfigError: If a role is unknown.
        BundleError: If the folder holds a link or cannot be read.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise BundleError(f"{path} is a link, expected a file. Copy what it points at into the bundle.")
        if path.is_dir() or relative in (MANIFEST_NAME, SIGNATURE_NAME):
            continue
        entries.append(
            FileEntry(
                path=relative,
                size=path.stat().st_size,
                sha256=(digests or {}).get(relative) or sha256_file(path),
                role=roles.get(relative) or role_of(relative),
                built_from=tuple(built_from.get(relative, ())),
            )
        )
    return entries


def write_changes(folder: Path, manifest: Manifest, *, over: Path) -> None:
    """Write the manifest and a matching card into a folder that holds the changed files of a bundle.

    Args:
        folder: Folder of the changed files.
        manifest: The new manifest.
        over: The existing bundle.

    Raises:
        ConfigError: If the parts of the manifest are inconsistent.
        BundleError: If a file cannot be written.
    """
    warn_if_signed(over)
    if not (folder / CARD_PATH).exists():
        scores = folder if (folder / SCORES_PATH).exists() else over
        card = _fresh_card(manifest, old=_card_in(over), quality=_scores(scores, manifest), where=None)
        if card is not None and (fresh := _with_card(manifest, card)) != manifest:
            atomic_write_bytes(folder / CARD_PATH, card, error=BundleError)
            manifest = fresh
    atomic_write_bytes(folder / MANIFEST_NAME, _encode(manifest), error=BundleError)


def write_manifest(folder: Path, manifest: Manifest, *, where: str | None = None) -> Manifest:
    """Write a manifest with a matching card.

    A generated card is generated again; an edited one is kept. The bundle is valid at any time, also after a kill: the
    card is not listed while it changes.

    Args:
        folder: Folder of the bundle.
        manifest: The new manifest.
        where: Replace any card by one that names this location; None keeps the location and an edited card.

    Returns:
        The written manifest.

    Raises:
        ConfigError: If the parts of the manifest are inconsistent.
        BundleError: If a file cannot be written.
    """
    quality = _scores(folder, manifest)
    card = _fresh_card(manifest, old=_card_in(folder), quality=quality, where=where, replace=where is not None)
    data = _encode(manifest if card is None else _with_card(manifest, card))
    if not (folder / MANIFEST_NAME).is_file() or (folder / MANIFEST_NAME).read_bytes() != data:
        warn_if_signed(folder)
    if card is not None and card != _card_in(folder):
        if (folder / MANIFEST_NAME).exists():
            files = tuple(entry for entry in manifest.files if entry.path != CARD_PATH)
            unlisted = _encode(msgspec.structs.replace(manifest, files=files))
            atomic_write_bytes(folder / MANIFEST_NAME, unlisted, error=BundleError)
        atomic_write_bytes(folder / CARD_PATH, card, error=BundleError)
    atomic_write_bytes(folder / MANIFEST_NAME, data, error=BundleError)
    return Manifest.from_json(data)


def _fresh_card(
    manifest: Manifest, *, old: bytes | None, quality: list[dict[str, Any]], where: str | None, replace: bool = False
) -> bytes | None:
    """Return the generated card of a bundle; None if it has no card or keeps an edited one."""
    kept_place = None if old is None else generated_for(old)
    if not replace and kept_place is None and (old is not None or where is None):
        return None
    place = where if where is not None else kept_place
    return bundle_card(manifest, quality=quality, where=place or "").encode()


def _scores(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the scores of a bundle; unreadable scores count as absent."""
    try:
        return read_scores(folder, manifest)
    except SchemaError:
        return []


def _card_in(folder: Path) -> bytes | None:
    """Return the card in a folder, also one left unlisted by a kill; None if there is none."""
    path = safe_join(folder, CARD_PATH)
    return path.read_bytes() if path.is_file() else None


def _with_card(manifest: Manifest, card: bytes) -> Manifest:
    entry = FileEntry(path=CARD_PATH, size=len(card), sha256=sha256_bytes(card), role="card")
    files = [each for each in manifest.files if each.path != CARD_PATH]
    return msgspec.structs.replace(manifest, files=tuple(sorted([*files, entry], key=lambda each: each.path)))


def _with_goldens_cut(folder: Path, manifest: Manifest, samplers: Sequence[SamplerSpec]) -> Manifest:
    """Drop the recorded samples of samplers that a subset does not have."""
    entry = next((entry for entry in manifest.files if entry.path == GOLDEN_PATH), None)
    if entry is None:
        return manifest
    goldens = read_goldens(folder / GOLDEN_PATH, samplers)
    kept = {steps: goldens[steps] for steps in goldens if steps in {s.num_inference_steps for s in manifest.samplers}}
    files = {each.path: each for each in manifest.files}
    if not kept:
        (folder / files.pop(GOLDEN_PATH).path).unlink()
    elif kept.keys() != goldens.keys():
        path = write_goldens(folder, kept)
        files[GOLDEN_PATH] = msgspec.structs.replace(entry, size=path.stat().st_size, sha256=sha256_file(path))
    return msgspec.structs.replace(manifest, files=tuple(files.values()))


def _encodes_prompts(entry: FileEntry, artifact: str) -> bool:
    """Return whether a file of a pipeline belongs to its text encoder or tokenizer."""
    return entry.path.startswith((f"{artifact}/text_encoder/", f"{artifact}/tokenizer/"))


def _encode(manifest: Manifest) -> bytes:
    """Return the text of a sealed manifest, after parsing it as a check."""
    try:
        read = Manifest.from_json(manifest.to_json())  # a NaN or a missing file is detected here, not by the reader
        check_manifest(read)
        data = seal(read).to_json()
    except (BundleError, TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ConfigError(f"the parts of bundle {manifest.name!r} do not fit together: {exc}") from exc
    return data
