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


def run_node(script: str, *arguments: object, folder: Path = WEB, timeout: float = 300) -> Any:
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
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < 18:
        pytest.skip(f"node is {version}; the module needs 18 or newer")
    whole = f"{_PREAMBLE}{script}"
    command = [node, "--input-type=module", "--eval", whole, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
