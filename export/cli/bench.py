"""``bench``: latency of each backend on this machine, compared with the others and with a budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import TerminalEvents, json_option, make_table, print_json, print_table, say, timed_batches_option
from .located import model_argument
from .names import BackendAndPrecision

if TYPE_CHECKING:
    from scm_sdk.inference.latency import Latency
    from scm_sdk.inference.selection import PlanRow
    from scm_sdk.inference.sources import Source


@click.command()
@model_argument("bundle", one_size=True)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=BackendAndPrecision(),
    help="Backend to time; may be repeated; default: every one that can run here, with its CPU precisions and BF16.",
)
@timed_batches_option
@click.option("--steps", type=click.IntRange(1), help="Number of network calls; default: 2 if the bundle has it.")
@click.option("--rounds", type=click.IntRange(10), default=50, help="Number of interleaved rounds; 100 for a p99.")
@click.option(
    "--budget",
    metavar="LIMIT",
    help="Latency budget, as p95=25ms@b1 or onnxruntime:median=5ms@b8; exit 4 above it.",
)
@click.option("--keep-budget", is_flag=True, help="Store the budget in BUNDLE; validate enforces it from then on.")
@click.option(
    "--against",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another bundle, for example an older one, to time against; may be repeated.",
)
@click.option("--threads", type=click.IntRange(1), help="Number of CPU threads; default: chosen by the library.")
@json_option
def bench(
    bundle: Path, backends: tuple[str, ...], batches: tuple[int, ...], steps: int | None, rounds: int,
    budget: str | None, keep_budget: bool, others: tuple[Path, ...], threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Time backends against each other; exit 4 above a budget.

    Each round runs every backend once. The times are kept for this machine: where all that passed validation were
    timed, as by default, backend="auto" takes the fastest at the first batch size from then on.

    \b
    scm-export bench avatars --backend onnxruntime:fp32 --backend onnxruntime:int8
    scm-export bench avatars --backend onnxruntime --against avatars-before
    """
    from contextlib import ExitStack

    if keep_budget and budget is None:
        raise click.UsageError(
            "--keep-budget needs --budget, which is missing. Give both; --budget '' removes the stored limits."
        )
    from scm_sdk._util.files import check_writable
    from scm_sdk.bundle.manifest import MANIFEST_NAME
    from scm_sdk.bundle.verify import require_own
    from scm_sdk.errors import BundleError
    from scm_sdk.evaluate.stored_budgets import keep_budgets
    from scm_sdk.inference.generator import Generator
    from scm_sdk.inference.latency import measure
    from scm_sdk.inference.latency_cache import remember
    from scm_sdk.inference.selection import Measured
    from scm_sdk.inference.session import plan_for
    from scm_sdk.inference.sources import open_source

    if keep_budget:
        require_own(bundle)
        check_writable(bundle / MANIFEST_NAME, error=BundleError)
    budgets, results = _by_batch(budget, batches), []
    source = open_source(bundle, verify="none")
    steps = steps or source.default_steps
    backends = backends or _usual(source, steps, threads)
    labels = _labels(bundle, others)
    with ExitStack() as stack:
        opened = {
            f"{name}{label}": stack.enter_context(
                Generator.from_pretrained(
                    path,
                    backend=name.partition(":")[0],
                    precision=name.partition(":")[2] or "auto",
                    num_inference_steps=steps,
                    num_threads=threads,
                    verify="none",
                )
            )
            for path, label in labels.items()
            for name in backends
        }
        for batch in batches:
            with TerminalEvents("", title=f"batch {batch}", total=rounds) as events:
                results.append(measure(opened, batch=batch, rounds=rounds, budget=budgets.get(batch), events=events))
        rows = {name: gen.opened().row for name, gen in opened.items()}
    suffixes = {f"{name}{label}": label for label in labels.values() for name in backends}
    medians = {rows[name].key: Measured(results[0][name].median_ms, results[0].batch) for name in backends}
    if source.build_id:
        remember(medians, source.build_id, num_inference_steps=steps, device=None, num_threads=threads)
    if as_json:
        print_json([_to_dict(latency, rows) for latency in results])
    else:
        for latency in results:
            _print_latency(latency, {name: (row.backend + suffixes[name], row.precision) for name, row in rows.items()})
        for latency in results:
            for line in _verdicts(latency, budgets.get(latency.batch)):
                click.echo(line)
        if not all(latency.stable for latency in results):
            say("Latencies did not become stable during warm-up: ratios are more reliable than milliseconds.")
        if (chosen := plan_for(source, steps, num_threads=threads).chosen) is not None:
            say(f'backend="auto" takes {chosen.backend} {chosen.precision}: {chosen.reason}')
    for latency in results:
        latency.raise_if_over()
    if keep_budget:  # a budget that is exceeded now is not stored
        keep_budgets(bundle, budget or "")
        say(f"{bundle}: " + (f"validate enforces {budget} from now on" if budget else "the stored budget was removed"))


def _to_dict(latency: Latency, rows: Mapping[str, PlanRow]) -> dict[str, Any]:
    """Return plain data for JSON, with what each timing is of."""
    plain = latency.to_dict()
    for timing in plain["timings"]:
        row = rows[timing["name"]]
        timing |= {"backend": row.backend, "precision": row.precision, "artifact": row.artifact}
    return plain


def _print_latency(latency: Latency, names: Mapping[str, tuple[str, str]]) -> None:
    """Print a table; each number has three digits, so that it is at most 80 columns wide."""
    first = next(iter(latency)).name
    table = make_table(
        "backend", "precision", "load", "first", "median", "p95", "images/s", "speed-up",
        title=f"batch {latency.batch}, {latency.rounds} rounds, ms; speed-up over {first} with its 95 % interval",
    )  # fmt: skip
    for timing in latency:
        load = "-" if timing.load_ms is None else f"{timing.load_ms:.0f}"
        within = max(abs(end - timing.speedup) for end in timing.speedup_interval)
        table.add_row(
            *names[timing.name], load, _digits(timing.first_call_ms), _digits(timing.median_ms),
            _digits(timing.p95_ms), f"{timing.images_per_s:.0f}", f"{_digits(timing.speedup)} ± {_digits(within)}",
        )  # fmt: skip
    print_table(table)


def _digits(number: float) -> str:
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _verdicts(latency: Latency, budget: str | None) -> list[str]:
    """Return a line for each limit of a budget and each backend that it applies to."""
    from scm_sdk.inference.latency import parse_budgets

    names = tuple(timing.name for timing in latency)
    lines = []
    for limit in parse_budgets(budget, batch=latency.batch, rounds=latency.rounds, names=names):
        for timing in latency:
            if limit.name in (None, timing.name):
                found = getattr(timing, f"{limit.statistic}_ms")
                verdict = "met" if found <= limit.limit_ms else "missed"
                lines.append(
                    f"budget {verdict}: {timing.name}, batch {latency.batch}: {limit.statistic} {found:.2f} ms, at "
                    f"most {limit.limit_ms:g} ms"
                )
    return lines


def _usual(source: Source, steps: int, num_threads: int | None) -> tuple[str, ...]:
    """Return every backend that can run here, PyTorch first, in fp32, its precisions for CPUs and what auto may take.

    BF16 is one of them where this CPU computes it, also before it was compared.
    """
    from functools import partial

    from scm_sdk._util.lazy import is_installed
    from scm_sdk.inference.backends import BACKENDS
    from scm_sdk.inference.session import plan_for
    from scm_sdk.spec import CPU_PRECISIONS

    plan = partial(plan_for, source, steps, num_threads=num_threads)
    accepted = plan().accepted
    artifacts = [a for a in source.artifacts if a.num_inference_steps in (0, steps)]
    names: list[str] = []
    for name in sorted(BACKENDS, key=lambda name: name != "torch"):
        info = BACKENDS[name]
        taken = {a.precision for a in artifacts if info.takes(a)}
        passed = [row.precision for row in accepted if row.backend == name]
        if not taken or not is_installed(info.library) or (info.runs_engines and not passed):  # those that fit this GPU
            continue
        alone = plan(backend=name).chosen
        wanted = {*((CPU_PRECISIONS | {"fp32"}) & taken), *passed}
        if info.needs_cpu_class("bf16", None) and plan(backend=name, precision="bf16").accepted:
            wanted.add("bf16")
        names += [name, *(f"{name}:{each}" for each in sorted(wanted - {alone.precision if alone else ""}))]
    return tuple(names)


def _labels(bundle: Path, others: tuple[Path, ...]) -> dict[Path, str]:
    """Return the label of each bundle in candidate names: its folder name, or its path where two names are equal."""
    given = [path.resolve() for path in (bundle, *others)]
    if len(set(given)) < len(given):
        raise click.UsageError("a bundle is given twice, expected different bundles in BUNDLE and --against.")
    names = [path.name for path in given]
    labels = {bundle: ""}
    for path, whole in zip(others, given[1:], strict=True):
        labels[path] = f" of {whole.name if names.count(whole.name) == 1 else path}"
    return labels


def _by_batch(budget: str | None, batches: tuple[int, ...]) -> dict[int, str]:
    """Group the parts of a budget by batch size."""
    from scm_sdk.errors import ConfigError
    from scm_sdk.inference.latency import Budget

    parts: dict[int, list[str]] = {}
    for part in (budget or "").split(","):
        if part.strip():
            parts.setdefault(Budget.parse(part).batch, []).append(part)
    if unmeasured := sorted(parts.keys() - set(batches)):
        raise ConfigError(
            f"the budget is for batch {unmeasured[0]}, which is not measured. Add --batch {unmeasured[0]}."
        )
    return {batch: ",".join(texts) for batch, texts in parts.items()}
