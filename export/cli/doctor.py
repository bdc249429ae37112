"""``doctor``: libraries of this machine, trial runs of its backends, and install commands for what is missing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import json_option, make_console, make_table, plural, print_json, print_table
from .libraries import LIBRARIES
from .located import model_argument

if TYPE_CHECKING:
    from scm_sdk.inference.selection import Plan

RUNS = "runs here"
_TRIAL_SECONDS = 120
"""Most time that a backend may take to run the trial graph, seconds."""


@click.command()
@model_argument("bundle", required=False, one_size=True)
@json_option
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show this machine, its libraries and the backends that run here.

    Each backend that is installed runs a tiny graph, in a process of its own, and times matrix products in each
    precision that this class of CPU computes. With BUNDLE: also which of its artifacts would run, and why not the
    others.

    \b
    scm-export doctor
    scm-export doctor avatars
    """
    from concurrent.futures import ThreadPoolExecutor

    from scm_sdk._util.gpu import gpus
    from scm_sdk._util.lazy import install_command, installed_version, is_installed, outdated
    from scm_sdk._util.processor import cpu_class, cpu_name, usable_cores
    from scm_sdk._version import __version__
    from scm_sdk.inference.backends import BACKENDS

    found = {name: installed_version(name) if is_installed(name) else None for name in LIBRARIES}
    wrong = outdated(*(name for name in LIBRARIES if found[name]))
    with ThreadPoolExecutor() as threads:
        trials = {name: threads.submit(_try, name) for name, info in BACKENDS.items() if is_installed(info.library)}
    states = {
        name: trials[name].result() if name in trials else f"not installed: {install_command(info.extra)}"
        for name, info in BACKENDS.items()
    }
    # One after the other, and after the trials, which would slow them.
    gains = {name: _gains(name) for name, state in states.items() if state == RUNS}
    report = {
        "scm-sdk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_class": cpu_class(),
        "cores": usable_cores(),
        "gpu": ", ".join(f"{gpu.name} (sm {gpu.compute_capability}, driver for CUDA {gpu.driver})" for gpu in gpus()),
        "libraries": found,
        "outdated": wrong,
        "backends": states,
        "speed_over_fp32": gains,
    }
    plans = {} if bundle is None else _plans(bundle)
    if as_json:
        print_json(report | ({"plans": {steps: plan.to_dict() for steps, plan in plans.items()}} if bundle else {}))
        return
    console = make_console()
    for key in ("scm-sdk", "python", "system", "cpu", "cpu_class", "cores", "gpu"):
        console.print(f"{key.replace('_', ' '):<9} {report[key] or 'none found'}")
    table = make_table("library", "version", "for")
    commands: dict[str, list[str]] = {}
    for name, (extra, purpose) in LIBRARIES.items():
        table.add_row(name, wrong.get(name) or found[name] or "-", purpose)
        if name in wrong or not found[name]:
            options = ["--upgrade"] if name in wrong else []
            commands.setdefault(install_command(extra, *options), []).append(name)
    print_table(table)
    for command, names in commands.items():
        click.echo(f"get {', '.join(names)} with: {command}")
    for name, state in states.items():
        faster = ", ".join(f"{precision} {gain:.1f}x" for precision, gain in gains.get(name, {}).items())
        console.print(f"backend {name}: {state}{f'; matrix products, over fp32: {faster}' if faster else ''}")
    for steps, plan in plans.items():
        click.echo(f'\n{bundle}, {plural(steps, "step")}; * is what backend="auto" takes:\n{plan}')


def _plans(bundle: Path) -> dict[int, Plan]:
    """Return every artifact compared with every backend, for each number of steps that the model was made for."""
    from scm_sdk.inference.selection import Plan
    from scm_sdk.inference.session import plan_for
    from scm_sdk.inference.sources import open_source

    source = open_source(bundle)
    # Nothing is opened, because the plan must also be shown if nothing can run.
    plans = {steps: plan_for(source, steps) for steps in source.steps}
    return {
        steps: Plan([row for row in plan if row.num_inference_steps in (0, steps)]) for steps, plan in plans.items()
    }


def _gains(backend: str) -> dict[str, float]:
    """Return the speed of a backend's matrix products over float32, by precision; empty if the measurement fails."""
    command = [sys.executable, "-m", f"{__package__}._trial", "--gain", backend]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TRIAL_SECONDS, check=True
        )
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return found


def _try(backend: str) -> str:
    """Run the trial graph on a backend in a separate process; return ``RUNS`` or the failure."""
    command = [sys.executable, "-m", f"{__package__}._trial", backend]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"does not run: no answer within {_TRIAL_SECONDS} s"
    answer = done.stdout.strip().splitlines()
    if done.returncode == 0 and answer:
        return answer[-1]
    if done.returncode < 0:
        import signal

        return f"does not run: its process ended by {signal.Signals(-done.returncode).name}. Install it again"
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"does not run: {said}"
