"""What a type checker says to a program that uses the package: wrong names and types are errors, right ones not."""

import os
import re
import subprocess
import sys
from pathlib import Path

RIGHT = """
from collections.abc import Iterator, Mapping
from typing import Any
import numpy as np
from scm_sdk import ConsistencyModel, EventLines, Generator, Latency, Parity, ProgressBar
from scm_sdk import add_engines, build_all, compare, measure, validate
gen = Generator.from_pretrained("model", backend="onnxruntime", num_threads=1)
gen(4, "red", seed=[1, 2, 3, 4], output_type="np").images
gen(num_images=2, class_labels=np.array([0, 1]), guidance_scale=[1.0, 2.0], events=ProgressBar())
gen.reopen(precision="fp16", verify="none").compare(gen, threshold=0.1, reason="why").raise_if_failed()
latency: Latency = gen.benchmark(batch=8, rounds=10, events=EventLines(print))
latency.raise_if_over()
parity: Parity = compare(gen, gen, threshold=0.1, reason="why")
measure({"one": gen}, batch=1, rounds=20).to_dict()
build_all("checkpoint", "out", precisions=["fp16"], targets=["l4"], weight_streaming=True)
add_engines("out", ["l4"], workspace_bytes=3, hardware_compatibility="none")
validate("out", num_seeds=8, batches=[4], record=False)[0].raise_if_failed()
def requests() -> Iterator[Mapping[str, Any]]:
    yield {"seed": 1}
for out in gen.stream(requests()):
    out.images
for either in gen.stream([{"seed": 1}], return_exceptions=True):
    print(either)
with gen.batcher(max_queue_size=8) as batcher:
    batcher(2, seed=1, class_labels="red", timeout=1.0).seeds
    batcher.submit(seed=3, output_type="raw").result().images
"""
WRONG = """
from scm_sdk import Generator, add_engines, build_all, compare, measure, validate
gen = Generator.from_pretrained("model")
batcher = gen.batcher()
Generator("model")
Generator.from_pretrained("model", bakend="torch")
Generator.from_pretrained("model", verify="sha")
gen(num_image=4)
gen(output_type="jpeg")
gen.benchmark(bacth=8)
gen.reopen(bakend="torch")
gen.reopen(verify="sha")
gen.compare(gen, treshold=1)
gen.stream([1])
gen.batcher(max_queue_sise=3)
batcher(nope=2)
batcher.submit(sed=3)
batcher.submit(batch_size=2)
batcher.submit(seed="3")
add_engines("out", [], workspace_byts=3)
add_engines("out", [], hardware_compatibility="all")
build_all("checkpoint", "out", optimisation_level=3)
validate("out", num_seed=8)
compare(gen, gen, treshold=1)
measure({"one": gen}, round=3)
number: int = gen.benchmark()
number = gen.compare(gen)
"""
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,diffusers.*,transformers.*,scm_sdk.model.*]
follow_imports = skip
"""


def test_mypy_refuses_each_wrong_line_and_no_right_one(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        "cache",
        "right.py",
        "wrong.py",
    ]
    here = os.environ | {"MYPYPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300, env=here).stdout
    assert "right.py" not in found, found
    refused = {int(line) for line in re.findall(r"^wrong\.py:(\d+): error", found, re.MULTILINE)}
    assert refused == set(range(5, len(WRONG.splitlines()) + 1)), found
