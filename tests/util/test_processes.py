"""A generator in other processes: forked with its parent's, or pickled to one of its own."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.containers import run_python
from scm_sdk.errors import BundleError
from scm_sdk.inference.generator import Generator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
BACKENDS = ["onnxruntime", "openvino", "torch"]
FORK = """
import os, sys, threading, warnings
warnings.simplefilter('ignore')  # Python 3.12 and later warn of a fork with threads
from scm_sdk import Generator
from scm_sdk.errors import BackendFailure
gen = Generator.from_pretrained({path!r}, backend={backend!r}, num_threads={threads})
batcher = gen.batcher()
first = batcher(seed=1, output_type='raw').images
gen(2, seed=1), batcher.submit(seed=2).result()
child = os.fork()
if not child:
    for call in (lambda: gen(1), lambda: batcher(seed=1), lambda: batcher.submit(seed=1), gen.benchmark,
                 lambda: next(gen.stream([{{}}]))):
        try:
            call()
        except BackendFailure as exc:
            assert 'was opened in another process' in str(exc) and 'Open it here' in str(exc), exc
        else:
            raise SystemExit('not refused')
    assert 'not open here' in repr(gen)
    {ending}
    print('child ends', flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert (batcher(seed=1, output_type='raw').images == first).all(), 'the parent continues'
batcher.close(); gen.close()
print('parent ends')
"""


@pytest.mark.parametrize("ending", ["batcher.close(); gen.close(); gen.close()", "del gen, batcher", "pass"])
@pytest.mark.parametrize("backend, threads", [*((each, None) for each in BACKENDS), ("openvino", 1)])
def test_a_fork_refuses_what_it_inherited_and_ends(
    backend: str, threads: int | None, ending: str, unet_bundle: Path
) -> None:
    pytest.importorskip(backend)
    done = run_python(FORK.format(path=str(unet_bundle), backend=backend, threads=threads, ending=ending))
    assert (done.returncode, done.stdout) == (0, "child ends\nparent ends\n"), done.stderr


def pictures(gen: Generator, queue) -> None:
    queue.put(gen(2, seed=3, output_type="raw").images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickled_generator_opens_the_same_model_again(backend: str, unet_bundle: Path) -> None:
    pytest.importorskip(backend)
    with Generator.from_pretrained(unet_bundle, backend=backend, num_threads=1, num_inference_steps=1) as gen:
        here = gen(2, seed=3, output_type="raw").images
        for again in (pickle.loads(pickle.dumps(gen)), copy.copy(gen), copy.deepcopy(gen)):
            assert np.array_equal(again(2, seed=3, output_type="raw").images, here)
            again.close()
        assert np.array_equal(gen(2, seed=3, output_type="raw").images, here), "closing a copy closes the copy"


def test_it_goes_to_a_spawned_process(unet_bundle: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    with Generator.from_pretrained(unet_bundle, backend="onnxruntime", num_threads=1) as gen:
        worker = spawn.Process(target=pictures, args=(gen, queue))
        worker.start()
        there = queue.get(timeout=120)
        worker.join(60)
        assert worker.exitcode == 0 and np.array_equal(there, gen(2, seed=3, output_type="raw").images)


def test_a_pickled_generator_opens_no_other_model(linear_bundle: Callable[..., Path], spec) -> None:
    from shutil import rmtree

    with Generator.from_pretrained(linear_bundle(spec), backend="onnxruntime", num_inference_steps=2) as gen:
        pickled = pickle.dumps(gen)
        rmtree(gen.source.path)
    linear_bundle(spec, gain=0.25)
    with pytest.raises(BundleError, match="holds another model than when its generator was pickled"):
        pickle.loads(pickled)


def test_a_signal_after_two_openvino_models_were_closed_reaches_its_handler(unet_bundle: Path) -> None:
    """Of two models released in the order in which they were opened, the second must not restore a freed stack."""
    pytest.importorskip("openvino")
    program = (
        "import faulthandler, signal, sys\n"
        "from scm_sdk import Generator\n"
        "faulthandler.enable()\n"
        "signal.signal(signal.SIGINT, lambda *_: print('handled'))\n"
        "models = [Generator.from_pretrained(sys.argv[1], backend='openvino', fallback='error') for _ in range(3)]\n"
        "for model in models:\n"
        "    model(seed=1)\n"
        "for model in models:\n"
        "    model.close()\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, unet_bundle], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0 and done.stdout == "handled\n", (done.returncode, done.stderr)
