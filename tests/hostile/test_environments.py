"""What containers, quotas and odd paths do to a command: it works, or it is refused and nothing has changed.

The mounts are made in a user namespace, without rights on the machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostile.campaign import Left, Limits, Silent, run_campaign, worker_environment

pytestmark = pytest.mark.hostile


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a command runs.

    Attributes:
        before: Shell commands that make it, in a folder that holds the bundle ``out``; the command runs where they end.
        within: Shell commands before the command in its own subshell, as limits.
        variables: Environment variables; None takes one away.
        unprivileged: As a user without a name and without rights.
        must: Actions that must work there.
    """

    before: str = ":"
    within: str = ":"
    variables: dict[str, str | None] = field(default_factory=dict)
    unprivileged: bool = False
    must: tuple[str, ...] = ()


ACTIONS: dict[str, str] = {
    "open": "python -c {open}",
    "card": "python -m scm_sdk.export.cli bundle card $OUT",
    "precision": "python -m scm_sdk.export.cli precision $OUT",
    "validate": "python -m scm_sdk.export.cli validate $OUT --precision fp32 --steps 1 --num-seeds 2 --batch 1",
    "unpack": "python -m scm_sdk.export.cli bundle unpack $MATERIAL/plain.scmz -o $OUT --overwrite",
    "pack": "python -m scm_sdk.export.cli bundle pack $MATERIAL/plain -o $OUT.scmz",
    "archive": "python -c {archive}",
    "engine": "python -m scm_sdk.export.cli engine $OUT --target l4 --precision fp32 --steps 1",
    "import": "python -m scm_sdk.export.cli import $MATERIAL/network.pkl -o $OUT.imported",
    "train": "python -m scm_sdk.export.cli train -o $OUT.run --data $MATERIAL/data.npz --preset tiny --iterations 1",
}
_OPEN = """
import sys
from scm_sdk import Generator
from scm_sdk.errors import ScmError
try:
    gen = Generator.from_pretrained(sys.argv[1], backend="onnxruntime")
    gen(1, seed=1, class_labels=0)
    print(gen.plan().chosen.backend)
except ScmError as exc:
    sys.exit(f"Error: {exc}")
"""
_EVERY = tuple(ACTIONS)
_READING = ("open", "archive")
_CHANGING = ("open", "card", "precision", "validate")
_DISK = "mkdir disk; mount -t tmpfs -o {options} none disk; cp -a out disk/; cd disk; {then}"

ENVIRONMENTS: dict[str, Environment] = {
    "nothing special": Environment(must=_EVERY),
    "bind mount": Environment(before="mount --bind out out", must=_CHANGING),
    "mount of a tmpfs": Environment(
        before="cp -a out kept; mount -t tmpfs none out; cp -a kept/. out/; rm -r kept", must=_CHANGING
    ),
    "layer of an image": Environment(
        # Of a tmpfs: an overlay over an overlay, where tests run in a container, is refused by some kernels.
        before="mkdir layers; mount -t tmpfs none layers; cd layers; mkdir lower upper work merged; mv ../out lower/; "
        "mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work,userxattr merged; cd merged",
        must=_CHANGING,
    ),
    "read-only mount": Environment(
        before="mount --bind out out; mount -o remount,ro,bind out", must=("open", "archive")
    ),
    "read-only folder": Environment(
        before="mkdir ro; mv out ro/; mount --bind ro ro; mount -o remount,ro,bind ro; cd ro", must=("open", "archive")
    ),
    "read-only everything": Environment(
        before="mkdir ro; mv out ro/; mount --bind ro ro; mount -o remount,ro,bind ro; cd ro",
        variables={"HOME": ".", "SCM_CACHE_DIR": None, "TMPDIR": None},
        must=("open",),
    ),
    "full disk": Environment(before=_DISK.format(options="size=64m", then="cat /dev/zero > fill || :"), must=("open",)),
    "almost full disk": Environment(
        before=_DISK.format(options="size=64m", then="cat /dev/zero > fill || :; truncate -s -1500K fill"),
        must=("open",),
    ),
    "no inodes": Environment(
        before=_DISK.format(
            options="size=64m,nr_inodes=80", then="i=0; while touch f$i; do i=$((i+1)); done; rm f0 f1"
        ),
        must=("open",),
    ),
    "full cache": Environment(
        before="mkdir cache; mount -t tmpfs -o size=1m none cache; export SCM_CACHE_DIR=$PWD/cache",
        must=("open", "card", "precision"),
    ),
    "no HOME": Environment(variables={"HOME": None, "SCM_CACHE_DIR": None}, must=_EVERY),
    "HOME=/": Environment(variables={"HOME": "/", "SCM_CACHE_DIR": None}, unprivileged=True, must=("open", "archive")),
    "HOME=/nonexistent": Environment(variables={"HOME": "/nonexistent", "SCM_CACHE_DIR": None}, must=_READING),
    "HOME is a file": Environment(variables={"HOME": "/etc/hostname", "SCM_CACHE_DIR": None}, must=_READING),
    "HOME is relative": Environment(variables={"HOME": "home", "SCM_CACHE_DIR": None}, must=_READING),
    "user without a name": Environment(unprivileged=True, variables={"HOME": None}, must=_CHANGING),
    "files of 0 blocks": Environment(within="ulimit -f 0", must=()),
    "files of 100 blocks": Environment(within="ulimit -f 100", must=("open",)),
    "files of 2000 blocks": Environment(within="ulimit -f 2000", must=("open",)),
    "8 open files": Environment(within="ulimit -n 8"),
    "16 open files": Environment(within="ulimit -n 16"),
    "64 open files": Environment(within="ulimit -n 64", must=("open", "card")),
    "200 MB of memory": Environment(within="ulimit -v 200000"),
    "500 MB of memory": Environment(within="ulimit -v 500000"),
    "900 MB of memory": Environment(within="ulimit -v 900000"),
    "deleted working folder": Environment(
        before="export OUT=$PWD/out; mkdir gone; cd gone; rmdir ../gone", must=("open", "card")
    ),
    "path that is not UTF-8": Environment(before="export OUT=$(printf 'caf\\351'); mv out \"$OUT\"", must=("card",)),
    "path with a newline": Environment(before="export OUT=$(printf 'a\\nb'); mv out \"$OUT\"", must=("open", "card")),
    "path with spaces and quotes": Environment(
        before='export OUT="a \'b\' \\"c\\" \\$d"; mv out "$OUT"', must=_CHANGING
    ),
    "name of 255 characters": Environment(
        before="export OUT=$(printf 'a%.0s' $(seq 255)); mv out $OUT", must=("open",)
    ),
    "path that is a link": Environment(before="mv out real; ln -s real out", must=_CHANGING),
    "umask 077": Environment(within="umask 077", unprivileged=True, must=_CHANGING),
    "no temporary folder": Environment(variables={"TMPDIR": "/nonexistent"}, must=_CHANGING),
    "no standard streams": Environment(within="exec <&- >&- 2>&-", must=_CHANGING),
    "ASCII only": Environment(variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, must=_CHANGING),
    "no /proc": Environment(before="mount -t tmpfs none /proc", must=("open", "card")),
    "no /dev/shm": Environment(before="mount -t tmpfs -o ro none /dev/shm", must=("open",)),
}
_FEW = ("open", "card", "precision")
_ALL_ACTIONS_IN = (
    "nothing special", "read-only mount", "read-only folder", "full disk", "almost full disk", "no HOME", "HOME=/",
    "user without a name", "files of 100 blocks", "full cache",
)  # fmt: skip


def test_environments(material: Path, record: Any) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no user namespaces")
    cases = [
        [name, action]
        for name in ENVIRONMENTS
        for action in (_EVERY if name in _ALL_ACTIONS_IN else dict.fromkeys((*_FEW, *ENVIRONMENTS[name].must)))
    ]
    setup = {"material": str(material)}
    limits = Limits(cpu_seconds=300, wall_seconds=600, memory_bytes=64 << 30, open_files=1024)
    record(run_campaign("environments", "hostile.test_environments:prepare", cases, setup=setup, limits=limits))


def prepare(setup: dict[str, Any], scratch: Path) -> Callable[[list[str]], None]:
    from scm_sdk.errors import ScmError

    source = Path(setup["material"])
    place, material = scratch / "place", scratch / "material"
    material.mkdir()
    for name in ("plain", "plain.scmz", "network.pkl", "data.npz"):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, material / name)

    def attempt(case: list[str]) -> None:
        name, action = case
        where = ENVIRONMENTS[name]
        place.mkdir()
        try:
            shutil.copytree(material / "plain", place / "out")
            done = run(where, action)
        finally:
            shutil.rmtree(place)
            shutil.rmtree(scratch / "cache", ignore_errors=True)
        said = done.stderr.decode(errors="replace").strip()
        report = dict(line.split("=", 1) for line in done.stdout.decode(errors="replace").splitlines() if "=" in line)
        if "code" not in report:
            raise RuntimeError(f"the environment cannot be made: {said[-400:]}")
        code = int(report["code"])
        if report["bundle"] != "0":
            raise Silent(f"the bundle no longer opens: {said[-600:]}")
        if report["odd"]:
            raise Left(f"{report['odd']} after exit code {code}")
        if "Traceback" in said or code > 128:
            raise RuntimeError(f"exit code {code}: {said[-700:]}")
        if code and action in where.must:
            raise Silent(f"it must work there; exit code {code}: {said[-400:]}")
        if code:
            raise ScmError(said[-400:])

    def run(where: Environment, action: str) -> subprocess.CompletedProcess[bytes]:
        variables = worker_environment(scratch) | {"MATERIAL": str(material), "OUT": "out"}
        for key, value in where.variables.items():
            variables.pop(key, None)
            if value is not None:
                variables[key] = value
        python = shlex.quote(sys.executable)
        command = ACTIONS[action].replace("$OUT", '"$OUT"').replace("$MATERIAL", '"$MATERIAL"')
        command = command.replace("python ", f"{python} ", 1)
        command = command.format(
            open=shlex.quote(_OPEN) + ' "$OUT"', archive=shlex.quote(_OPEN) + ' "$MATERIAL/plain.scmz"'
        )
        user = "unshare --user --map-user=54321 --map-group=54321 " if where.unprivileged else ""
        verify = "import sys; from scm_sdk.bundle.bundle import Bundle; Bundle.open(sys.argv[1])"
        script = f"""
            set -e
            {where.before}
            set +e
            {user}bash -c {shlex.quote(where.within + "; exec " + command)} > /dev/null
            echo "code=$?"
            case $OUT in /*) ;; *) cd "$PWD";; esac
            PYTHONPATH={shlex.quote(variables["PYTHONPATH"])} {python} -c {shlex.quote(verify)} "$OUT" > /dev/null
            echo "bundle=$?"
            top=$(dirname "$OUT")
            odd=$(find "$top" -name '.*.partial' -o -name '.*.old' -o -name '.*.removed')
            echo "odd="$odd
        """
        return subprocess.run(
            ["unshare", "-rm", "bash", "-c", script], cwd=place, env=variables, capture_output=True, timeout=500
        )

    os.environ.setdefault("LC_ALL", "C.UTF-8")
    return attempt
