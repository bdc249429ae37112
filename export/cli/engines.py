"""``engine``, ``targets`` and ``cache``: build engines, list GPUs, manage cached engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, make_table, plural, print_json, print_table, say
from .group import SummaryGroup
from .located import say_first_size
from .names import PRECISION, STEPS, TargetName, one_of

if TYPE_CHECKING:
    from scm_sdk.bundle.engine_record import Flavor
    from scm_sdk.spec import Precision

    from ..engines.options import HardwareCompatibility


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-t",
    "--target",
    "names",
    multiple=True,
    type=TargetName(),
    help="GPU to build for, as l4, rtx4090 or sm_86; may be repeated; default: the GPU of this machine.",
)
@click.option("--flavor", "flavor", type=one_of("flavor", "tensorrt_rtx", "tensorrt"), default="tensorrt_rtx",
              help="tensorrt_rtx builds anywhere; tensorrt on the GPU that runs the engine.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=PRECISION,
              help="Precision of the graphs to build from; may be repeated; default: all.")  # fmt: skip
@click.option("--steps", multiple=True, type=STEPS, help="Only graphs of this number of steps; may be repeated.")
@click.option("--batch", nargs=3, type=click.IntRange(1), help="Smallest, optimal and largest batch, images.")
@click.option("--one-for-all", is_flag=True, help="One engine that holds all targets (tensorrt_rtx).")
@click.option("--workspace", type=click.IntRange(1), help="Memory that a kernel may use at run time, MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Effort of the builder, 0 to 5 (tensorrt).")
@click.option("--hardware-compatibility", default="none", help="Further GPUs that the engine runs on (tensorrt).",
              type=one_of("hardware compatibility", "none", "same_compute_capability", "ampere_plus"))  # fmt: skip
@click.option(
    "--version-compatible", is_flag=True, help="Build engines that newer TensorRT versions can load (tensorrt)."
)
@click.option("--weight-streaming", is_flag=True, help="Allow weights to stay in host memory at run time.")
@click.option("--allow-mismatch", is_flag=True, help="Keep an engine whose kernels are not in the graph's precision.")
@json_option
def engine(
    bundle: Path, names: tuple[str, ...], flavor: Flavor, precisions: tuple[Precision, ...], steps: tuple[int, ...],
    batch: tuple[int, int, int] | None, one_for_all: bool, workspace: int | None, optimization_level: int | None,
    hardware_compatibility: HardwareCompatibility, version_compatible: bool, weight_streaming: bool,
    allow_mismatch: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build TensorRT engines of a bundle and count their kernels.

    The precision comes from the graph, never from the builder; an engine whose kernels differ from it is refused.

    \b
    scm-export engine avatars --target l4 --target rtx4090
    scm-export engine avatars --target t4 --precision fp16 --steps 2
    """
    from scm_sdk._util.gpu import current_gpu
    from scm_sdk.engines.targets import resolve_target, resolve_targets
    from scm_sdk.errors import IncompatibleEngineError

    from ..engines.add import add_engines

    say_first_size(bundle)
    targets = resolve_targets(names) if names else ()
    gpu = None if names else current_gpu()
    for target in targets if gpu is None else (resolve_target(gpu.compute_capability),):
        if target.note and flavor == "tensorrt_rtx" and not target.unbuildable(flavor):
            say(f"  note: {target.name}: {target.note}")
    with TerminalEvents(show_results=not as_json) as events:
        variants = add_engines(
            bundle, targets, flavor=flavor, precisions=precisions, steps=steps, one_for_all=one_for_all, batch=batch,
            allow_mismatch=allow_mismatch, skip_unbuildable=not precisions, events=events,
            workspace_bytes=workspace * 2**20 if workspace else None,
            optimization_level=optimization_level, hardware_compatibility=hardware_compatibility,
            version_compatible=version_compatible, weight_streaming=weight_streaming,
        )  # fmt: skip
    if as_json:
        print_json([variant.to_dict() for variant in variants])
    if not variants:
        raise IncompatibleEngineError(
            "no engine was built, expected at least one; the lines above say why. Choose others."
        )


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the GPUs that engines can be built for."""
    from scm_sdk.engines.targets import TARGETS

    if as_json:
        print_json(
            [
                {**vars(t), "ahead_of_time": t.ahead_of_time, "precisions": t.precisions, "note": t.note}
                for t in TARGETS.values()
            ]
        )
        return
    from itertools import groupby

    table = make_table("capability", "targets", "computes", "tensorrt_rtx, anywhere")
    for capability, group in groupby(TARGETS.values(), key=lambda target: target.compute_capability):
        first, *others = group
        built = [p for p in first.precisions if not first.lacks(p, "tensorrt_rtx")] if first.ahead_of_time else ["-"]
        note = f" ({first.note})" if first.note else ""
        table.add_row(
            capability, ", ".join(target.name for target in (first, *others)), " ".join(first.precisions),
            " ".join(built) + note,
        )  # fmt: skip
    print_table(table)


@click.group(cls=SummaryGroup)
def cache() -> None:
    """List, verify and remove cached engines and unpacked bundles.

    SCM_CACHE_DIR sets the folder. Downloads from the hub are in the cache of huggingface_hub: hf cache ls, hf cache
    prune.
    """


@cache.command("ls")
@json_option
def cache_ls(as_json: bool) -> None:
    """List cached engines and bundles, least recently used first."""
    from scm_sdk.bundle import archive_cache

    from ..engines.cache import engines_folder, entries

    found, bundles = entries(), archive_cache.entries()
    if as_json:
        kinds = [("engine", entry) for entry in found] + [("bundle", entry) for entry in bundles]
        print_json([
            {"kind": kind, "key": e.key, "bytes": e.bytes, "used": e.used, "folder": e.folder} for kind, e in kinds
        ])  # fmt: skip
        return
    for entry in found:
        say(f"  {entry.key[:12]}  {entry.bytes / 1e6:8.1f} MB  {_what(entry.record)}")
    for bundle in bundles:
        say(f"  {bundle.key[:12]}  {bundle.bytes / 1e6:8.1f} MB  bundle {bundle.name or '(unfinished)'}")
    unpacked = archive_cache.unpacked_folder()
    for noun, some, folder in (("engine", found, engines_folder()), ("bundle", bundles, unpacked)):
        say(f"{plural(len(some), noun)}, {sum(entry.bytes for entry in some) / 1e6:.1f} MB in {folder}")


@cache.command("verify")
@json_option
def cache_verify(as_json: bool) -> None:
    """Hash every cached engine and check its origin; exit 6 if this user did not build one here.

    Such an engine is never used, and gc removes it.
    """
    from scm_sdk.errors import IntegrityError

    from ..engines.cache import entries

    found = entries()
    problems = {entry.key: problem for entry in found if (problem := entry.problem())}
    for key, problem in problems.items():
        say(f"  {key[:12]}: {problem}")
    if as_json:
        print_json([
            {"key": entry.key, "folder": entry.folder, "problem": problems.get(entry.key)} for entry in found
        ])  # fmt: skip
    if problems:
        raise IntegrityError(
            f"{len(problems)} of {len(found)} engines are damaged or were not built by this user on this machine, "
            "expected none. Remove them: scm-export cache gc"
        )
    say(f"{plural(len(found), 'engine')}, all intact and built by this user on this machine")


@cache.command("gc")
@click.option("--max-size", type=click.FloatRange(0), help="Largest total size of the remaining entries, MB.")
@click.option("--max-age", type=click.FloatRange(0), help="Longest time since the last use of an entry, days.")
@json_option
def cache_gc(max_size: float | None, max_age: float | None, as_json: bool) -> None:
    """Remove damaged, old and surplus entries of the cache, least recently used first.

    To reach --max-size, bundles are removed before engines: unpacking takes seconds, building minutes.
    """
    from scm_sdk.bundle import archive_cache

    from ..engines.cache import collect_garbage, entries

    limit = None if max_size is None else int(max_size * 1e6)
    room = None if limit is None else max(0, limit - sum(entry.bytes for entry in entries()))
    bundles = archive_cache.collect_garbage(max_bytes=room, max_age_days=max_age)
    removed = collect_garbage(max_bytes=limit, max_age_days=max_age)
    if as_json:
        kinds = [("engine", entry.key, entry.bytes) for entry in removed]
        kinds += [("bundle", entry.key, entry.bytes) for entry in bundles]
        print_json([{"kind": kind, "key": key, "bytes": size} for kind, key, size in kinds])
    say(f"removed {plural(len(removed), 'engine')}, {sum(e.bytes for e in removed) / 1e6:.1f} MB")
    say(f"removed {plural(len(bundles), 'bundle')}, {sum(e.bytes for e in bundles) / 1e6:.1f} MB")


def _what(record: object) -> str:
    from scm_sdk.bundle.engine_record import BuildRecord

    if not isinstance(record, BuildRecord):
        return "unreadable"
    capabilities = ", ".join(record.facts.compute_capabilities)
    steps = record.spec.num_inference_steps
    return f"{record.flavor} {record.facts.library_version}, {capabilities}, {record.precision}, {steps} steps"
