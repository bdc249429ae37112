"""The complete export: checkpoint, bundle, precisions, engines; a second run resumes.

Each stage adds missing or outdated artifacts and keeps the others, so an interruption costs at most the current stage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from scm_sdk._util.arguments import checked_names
from scm_sdk._util.events import SILENT, Events
from scm_sdk.bundle.bundle import Bundle
from scm_sdk.bundle.engine_record import Flavor
from scm_sdk.bundle.manifest import MANIFEST_NAME
from scm_sdk.engines.targets import Target, resolve_targets
from scm_sdk.errors import ConfigError
from scm_sdk.inference.parity.compare import MIN_PSNR_DB
from scm_sdk.model.foreign.pipelines import usual_steps
from scm_sdk.model.foreign.sana_folder import is_pipeline
from scm_sdk.spec import CPU_PRECISIONS, Precision

from .bundle_export import export_bundle, is_current, kept_options
from .engines.add import AddOptions, add_engines, check_targets
from .precision.half import LowPrecision, default_plan
from .precision.int8_variants import Int8, QuantizeOptions, add_int8
from .precision.probe import bundle_examples
from .precision.variants import add_cpu_form, add_precision
from .sana import MAX_BATCH as PIPELINE_BATCH
from .workspace import Workspace

if TYPE_CHECKING:
    from typing_extensions import Unpack

MARGIN_DB = 2.0
"""Margin of the int8 target above its gate, dB: the PSNR varies between the selection and the judgment images."""


@checked_names("build_all", AddOptions)
def build_all(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | Workspace,
    *,
    precisions: Sequence[Precision] = ("fp16", "int8"),
    targets: Sequence[Target | str] = (),
    flavor: Flavor = "tensorrt_rtx",
    steps: Sequence[int] = (),
    max_batch: int | None = None,
    target_db: float | None = None,
    prompts: Path | None = None,
    events: Events = SILENT,
    **engine_options: Unpack[AddOptions],
) -> Bundle:
    """Create or complete a bundle.

    Args:
        checkpoint: Folder with ``config.json`` and safetensors, a pipeline of diffusers, or a bundle, ``out`` itself or
            another, whose checkpoint is taken.
        out: The bundle, or a workspace of it. One that was exported from other weights or for other samplers is
            exported again; a split one stays split, and one of several image sizes keeps them. INT8 graphs and
            engines are of the first size.
        precisions: What to add to fp32; ``fp32`` may be named, for engines of it.
        targets: GPUs, also by name, to build engines for; () builds none.
        flavor: Which library builds them.
        steps: Numbers of steps; () is those that ``out`` was exported for, else 1 and 2, or
            the usual ones of a few-step pipeline.
        max_batch: Largest batch; None is that of ``out``, else 32, or 8 of a pipeline.
        target_db: PSNR that 95 % of the images are to reach in int8, dB, for which the fewest layers are left out; None
            is ``MARGIN_DB`` above the gate's.
        prompts: File of conditioning inputs for calibration; see ``read_examples``. None draws them from the seed.
        events: Receives the stages, each graph of lower precision, each engine, and which engines are skipped.
        **engine_options: More arguments of ``add_engines``.

    Returns:
        The bundle, not validated yet: see ``scm_sdk.validate``.

    Raises:
        ConfigError: If a precision is unknown or cannot be built, or a target is not supported.
        ScmError: As the stages.
    """
    unknown = set(precisions) - {"fp32", "fp32-cpu", *get_args(LowPrecision), *get_args(Int8)}
    if unknown:
        raise ConfigError(
            f"precisions hold {', '.join(sorted(unknown))}, expected fp32, fp32-cpu, fp16, bf16, int8, int8-cpu, "
            "int8-weights or int4."
        )
    gpus = resolve_targets(targets) if targets else ()
    wanted: list[Precision] = [p for p in precisions if p not in CPU_PRECISIONS]
    if gpus and wanted:
        check_targets(gpus, flavor)
    workspace = Workspace.of(out)
    folder = Path(checkpoint)
    if (folder / MANIFEST_NAME).is_file():
        from scm_sdk.model.sharing import find_checkpoint

        folder = find_checkpoint(folder)
    if is_current(folder, workspace, steps=steps, max_batch=max_batch):
        events.note(f"{workspace.path}: exported already")
    else:
        events.stage(f"export {os.fspath(checkpoint)}")
        largest = max_batch or (PIPELINE_BATCH if is_pipeline(folder) else 32)
        split, further_sizes = kept_options(workspace)
        export_bundle(
            folder, workspace, steps=steps or usual_steps(folder), max_batch=largest, split=split,
            further_sizes=further_sizes, overwrite=True, events=events,
        )  # fmt: skip
    examples = None if prompts is None else bundle_examples(workspace.path, prompts)
    if "fp32-cpu" in precisions:
        add_cpu_form(workspace, examples=examples, events=events)
    for precision in get_args(LowPrecision):
        if precision in precisions:
            add_precision(workspace, default_plan(precision), examples=examples, events=events)
    for kind in get_args(Int8):
        if kind in precisions:
            cpu = kind != "int8"
            options = QuantizeOptions(
                precision=kind,
                base="fp32" if cpu else "fp16",
                target_db=None if cpu else target_db or MIN_PSNR_DB[kind] + MARGIN_DB,
            )
            add_int8(workspace, options, examples=examples, events=events)
    if gpus and wanted:
        add_engines(workspace, gpus, flavor=flavor, precisions=wanted, skip_unbuildable=True, events=events,
                    **engine_options)  # fmt: skip
    return workspace.bundle
