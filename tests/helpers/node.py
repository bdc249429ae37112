"""Node, which runs the JavaScript of ``export/edge/web`` without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_PREAMBLE = """const args = JSON.parse(process.argv[1]);
const done = (value) => process.stdout.write(JSON.stringify(value) + "\\n", () => process.exit(0));
"""
WEB = Path(__file__).resolve().parents[2] / "export" / "edge" / "web"


def run_node(script: str, *arguments: object, folder: Path = WEB, timeout: float = 1800) -> Any:
    """Run an ES module and return what it gives to ``done``; skip the test where there is no Node 18.

    Args:
        script: Its text; ``import`` takes paths of ``folder``, and ``args`` holds the arguments.
        arguments: Passed on as JSON.
        folder: Where it runs.
        timeout: Seconds.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, encoding="utf-8", check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < 18:
        pytest.skip(f"node is {version}; the module needs 18 or newer")
    whole = f"{_PREAMBLE}{script}"
    command = [node, "--input-type=module", "--eval", whole, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def npm_install(listed: Path, folder: Path) -> None:
    """Install the packages of a ``package-lock.json`` as it pins them; skip the test where that cannot be done.

    Args:
        listed: Folder with ``package.json`` and its lock file.
        folder: Where they are copied and installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(listed / name, folder / name)
    command = [npm, "ci", "--ignore-scripts", "--silent", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=1800, check=False)
    if done.returncode:
        pytest.skip(f"the npm registry is unreachable: {done.stderr[-200:]}")
