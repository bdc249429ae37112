"""Run the default tests under the conditions of other machines and print one table.

Run it from the checkout with the environment's Python: ``python tests/matrix.py`` runs every row, ``python
tests/matrix.py avx2 other-user`` two of them, and ``python tests/matrix.py avx2+other-user`` one under the conditions
of both. (odd-path+ascii-locale does not work: pytest-xdist cannot send that path to its processes.) Each row is the
default suite with other environment variables or options; the two ends of the dependencies, ``make test-lowest`` and
``make test-latest``, need environments of their own.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
NOBODY = 54321
"""User and group without an entry in the password database."""


@dataclass(frozen=True)
class Row:
    """One condition: environment variables, pytest's options, one process, another user, an odd path."""

    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    one_process: bool = False
    other_user: bool = False
    odd_path: bool = False

    def __add__(self, other: "Row") -> "Row":
        """Return the row under the conditions of both."""
        return Row(
            self.env | other.env,
            self.options + other.options,
            self.one_process or other.one_process,
            self.other_user or other.other_user,
            self.odd_path or other.odd_path,
        )


ROWS = {
    "native": Row(),
    "baseline-kernels": Row({"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Row({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "one-thread": Row({"OMP_NUM_THREADS": "1"}),
    "one-process": Row(one_process=True),  # every core for each operator; pytest-xdist gives each process one thread
    "random-order": Row(options=("-p", "randomly", "-p", "no:cacheprovider")),
    "other-seed": Row(options=("--seed-offset", "1")),
    "ascii-locale": Row({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "other-user": Row(options=("-p", "no:cacheprovider"), other_user=True),
    "odd-path": Row(odd_path=True),
}


def command(row: Row, work: Path) -> tuple[list[str], dict[str, str], Path]:
    """Return what to run for a row: the command, its environment and its folder."""
    env = {**os.environ, **row.env}
    run = [sys.executable, "-m", "pytest", "-q", *(() if row.one_process else PARALLEL), *row.options]
    where = ROOT
    if row.odd_path:
        where = work / "a päth with späces"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
        for name in filter(None, tracked.stdout.split("\0")):
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, where / name, follow_symlinks=False)
        env["PYTHONPATH"] = str(where)
    if row.other_user:
        home, temp = work / "home", work / "tmp"
        home.mkdir(mode=0o555)
        temp.mkdir()
        os.chown(temp, NOBODY, NOBODY)
        env |= {"HOME": str(home), "TMPDIR": str(temp), "HYPOTHESIS_STORAGE_DIRECTORY": str(temp / "hypothesis")}
        env |= {"PYTHONDONTWRITEBYTECODE": "1"}
        run = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", *run]
    return run, env, where


def main(names: list[str]) -> int:
    """Run the named rows, or all of them; return how many failed."""
    unknown = [part for name in names for part in name.split("+") if part not in ROWS]
    if unknown:
        sys.exit(f"Unknown rows {', '.join(unknown)}; expected some of {', '.join(ROWS)}.")
    results: dict[str, dict[str, object]] = {}
    for name in names or list(ROWS):
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            work = Path(folder)
            work.chmod(0o755)
            run, env, where = command(sum((ROWS[part] for part in name.split("+")), Row()), work)
            start = time.monotonic()
            log = Path(tempfile.gettempdir(), f"matrix-{name}.log")
            with log.open("w", encoding="utf-8") as output:
                ended = subprocess.run(run, env=env, cwd=where, stdout=output, stderr=subprocess.STDOUT)
        found = re.findall(
            r"(\d+) (passed|failed|skipped|errors?)\b", log.read_text(encoding="utf-8", errors="replace")
        )
        counts = {kind: int(n) for n, kind in found}
        results[name] = {"exit": ended.returncode, "seconds": round(time.monotonic() - start), **counts}
        print(f"{name:18} {json.dumps(results[name])}  {log}", flush=True)
    print(json.dumps({"python": platform.python_version(), "machine": platform.machine(), "rows": results}, indent=1))
    return sum(result["exit"] != 0 for result in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
