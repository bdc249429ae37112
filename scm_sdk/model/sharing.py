"""Load models from a bundle, a ``.scmz`` file or the hub; upload them with a model card."""

from __future__ import annotations

import os
from pathlib import Path

from .._util.files import scratch_folder
from ..bundle.bundle import Bundle
from ..bundle.card import model_card
from ..bundle.hub import HUB_PREFIX, push
from ..bundle.layout import CONFIG_NAME
from ..bundle.manifest import MANIFEST_NAME
from ..bundle.resolve import locate
from ..errors import BundleError
from .checkpoint import save_checkpoint
from .consistency import ConsistencyModel


def find_checkpoint(
    path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the checkpoint folder of a model; of a bundle, its verified checkpoint.

    Raises:
        BundleError: If there is no checkpoint.
    """
    folder = locate(path, revision=revision, local_files_only=local_files_only)
    if (folder / CONFIG_NAME).exists() or not (folder / MANIFEST_NAME).exists():
        return folder
    bundle = Bundle.open(folder, verify="none")
    checkpoints = bundle.artifacts(format="safetensors")
    if not checkpoints:
        note = bundle.manifest.cut_note or " Ask who made it."
        raise BundleError(f"{folder} is a bundle without a checkpoint, expected one with weights.{note}")
    bundle.check_unchanged(checkpoints[0].path)
    return bundle.file(checkpoints[0].path)


def push_model(
    model: ConsistencyModel, repo_id: str, *,
    revision: str | None = None, private: bool | None = None, message: str = "", create_pr: bool = False,
) -> str:  # fmt: skip
    """Upload config, weights and a card; see ``ConsistencyModel.push_to_hub``."""
    specs = tuple(model.spec(steps) for steps in (1, 2))
    card = model_card(repo_id.partition("/")[2], specs, model.config.provenance, where=f"{HUB_PREFIX}{repo_id}")
    with scratch_folder() as folder:
        save_checkpoint(model, folder)
        weights = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        (folder / "README.md").write_text(card, encoding="utf-8")
        return push(
            folder, [*weights, "README.md"], repo_id, revision=revision, private=private,
            message=message, create_pr=create_pr,
        )  # fmt: skip
