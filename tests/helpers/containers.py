"""Run a piece of Python as a container would: as a user without a name, with the environment of the caller's choice."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STRANGER = 54321
"""A user id without an entry in the password file."""
_UNSET = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "SCM_CACHE_DIR", "SCM_TELEMETRY", "SCM_TRUST_ENGINES")
_UNSET += ("CI", "ORT_DISABLE_TELEMETRY")  # with which libraries are silent by themselves


def run_python(
    code: str,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = "/",
    unprivileged: bool = False,
    under: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without HOME unless ``env`` gives one.

    Args:
        code: What is run.
        env: What is added to this process's environment.
        cwd: Its working folder.
        unprivileged: In a user namespace, as a user without a name, who owns what this process's user owns and for whom
            modes count even where the tests are run by root.
        under: A command that runs the interpreter.
    """
    base = {key: value for key, value in os.environ.items() if key not in _UNSET}
    base |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    user = ["unshare", "--user", f"--map-user={STRANGER}", f"--map-group={STRANGER}"] if unprivileged else []
    if user and (shutil.which("unshare") is None or subprocess.run([*user, "true"], capture_output=True).returncode):
        pytest.skip("no user namespaces here")
    return subprocess.run(
        [*under, *user, sys.executable, "-c", code],
        env=base,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
