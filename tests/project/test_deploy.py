"""The Dockerfile and the systemd unit name options, extras and files that exist."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from scm_sdk.export.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
UNIT = ROOT / "deploy" / "systemd" / "scm-serve.service"


def check_arguments(arguments: list[str]) -> None:
    """Parse arguments of the command line as the command does, without running it."""
    assert arguments[0] == "serve"
    above = click.Context(main, **main.context_settings)
    main.commands["serve"].make_context("serve", arguments[1:], above)  # raises where an option does not exist


def test_the_image_starts_the_server_with_keys_and_not_as_root() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*)$", text, re.MULTILINE)[-1]) for word in ("ENTRYPOINT", "CMD")
    )
    assert entry[0] == "scm-export"
    check_arguments([*entry[1:], *command])
    assert "--api-key-file" in command and command[command.index("--host") + 1] == "0.0.0.0"
    stages = text.split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*$", stages[-1], re.MULTILINE), "a number, so that runAsNonRoot can check it"
    assert "/readyz" in text
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()


def test_the_image_installs_extras_that_exist_and_its_context_has_what_a_wheel_needs() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extras,) = re.findall(r'"\$1\[([\w,-]+)\]"', DOCKERFILE.read_text(encoding="utf-8"))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    kept = re.findall(r"^!(\S+)$", DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in kept)
    needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(kept)


def test_the_unit_starts_the_server_with_keys_and_waits_for_its_end(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    command = shlex.split(unit["Service"]["ExecStart"])
    check_arguments(command[1:])
    assert "--api-key-file" in command
    drain = next(p.default for p in main.commands["serve"].params if p.name == "drain_timeout")
    assert float(unit["Service"]["TimeoutStopSec"]) > float(drain)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace(command[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
