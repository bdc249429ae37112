"""Pipelines of diffusers by their class: SANA-Sprint, or one of the table of few-step flow models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .few_step_folder import FewStepFolder, pipeline_class, read_few_step_folder
from .sana_folder import PIPELINE as SANA_PIPELINE
from .sana_folder import SanaFolder, is_pipeline, read_sana_folder

if TYPE_CHECKING:
    from ..consistency import ConsistencyModel


def is_sana(folder: Path) -> bool:
    """Return whether a pipeline's folder names the class of SANA-Sprint."""
    return pipeline_class(folder) == SANA_PIPELINE


def read_pipeline(folder: Path) -> SanaFolder | FewStepFolder:
    """Read and check a pipeline's folder, without torch and diffusers.

    Raises:
        BundleError: If a component or a shard is missing.
        ConfigError: If the pipeline is not supported, is not a few-step model, or has unknown settings.
    """
    return read_sana_folder(folder) if is_sana(folder) else read_few_step_folder(folder)


def load_pipeline(folder: Path) -> ConsistencyModel:
    """Load a pipeline's denoiser and decoder, float32, in evaluation mode.

    Raises:
        ScmError: As ``load_sana`` and ``load_few_step``.
    """
    if is_sana(folder):
        from .sana import load_sana

        return load_sana(folder)
    from .few_step import load_few_step

    return load_few_step(folder)


def usual_steps(folder: Path) -> tuple[int, ...]:
    """Return the numbers of steps that an export of a checkpoint's or a pipeline's folder has by default."""
    if not is_pipeline(folder) or is_sana(folder):
        return (1, 2)
    return read_few_step_folder(folder).row.steps
