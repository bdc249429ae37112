"""Kill a training command at each of its writes, run it again, and report the content of its folder.

A script, ``killed_worker.py JOB.json``; the job is ``{"before": [ARGUMENTS], "command": ARGUMENTS, "folder": FOLDER,
"stride": N}``. It prints as JSON what the folder holds after an undisturbed run, and after a kill at every N-th write
and another run.
"""

import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image  # noqa: F401, what each command would import for itself
import rich.progress  # noqa: F401
import torch
import torch._dynamo
from killing import RENAMES_AND_FSYNCS, command, fork

import scm_sdk.train.data.samples
import scm_sdk.train.loop


def run(arguments: list[str], *, die_at: int = 0) -> int:
    """Run a command in a process that is killed just before its ``die_at``-th rename or fsync."""

    def train() -> None:
        scm_sdk.train.loop.time = SimpleNamespace(monotonic=lambda: 0.0)  # the only thing that differs from run to run
        command(arguments)()

    child = fork(train, die_at=die_at, events=RENAMES_AND_FSYNCS)
    child.events()
    return child.wait()


def content(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def survey(job: dict) -> dict:
    folder, after = Path(job["folder"]), {}
    for arguments in job["before"]:
        assert run(arguments) == 0
    assert run(job["command"]) == 0
    whole = content(folder)
    for event in range(1, 1000, job["stride"]):
        shutil.rmtree(folder)
        if (code := run(job["command"], die_at=event)) == 0:
            return {"whole": whole, "after": after}
        assert code == -signal.SIGKILL, code
        assert run(job["command"]) == 0, f"the run after event {event} failed"
        after[event] = content(folder)
    raise AssertionError("the command never ends")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(survey(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
