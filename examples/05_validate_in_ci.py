"""Let gates decide, as a CI job would: exit code 3 for pictures, 4 for speed, 6 for a damaged file.

    python examples/05_validate_in_ci.py scm-demo/avatars report.json

`scm-export validate --no-record --json` is the same gate as a command.
"""

import argparse
import json
import sys
from pathlib import Path

from scm_sdk import Bundle, Generator, ScmError, measure, validate

BUDGET = "onnxruntime:p90=2s@b1"  # of a CI machine, generous: it catches a graph that fell off its fast path


def main(bundle: Path, report: Path) -> int:
    """Check everything, write one JSON file, return the exit code."""
    results: dict[str, object] = {}
    try:
        results["build_id"] = Bundle.open(bundle, verify="digest").manifest.build_id
        # Every graph that can run here against PyTorch on the same noise, and its structure against the checkpoint.
        # Nothing is written into the bundle: what CI passed is what it was given.
        parities = validate(bundle, num_seeds=8, batches=[4], record=False)
        results["parity"] = {p.candidate: {"psnr_db": p.overall.psnr_db, "passed": bool(p)} for p in parities}
        for parity in parities:
            parity.raise_if_failed()
        with Generator.from_pretrained(bundle, backend="onnxruntime", num_threads=1) as gen:
            latency = measure({"onnxruntime": gen}, batch=1, rounds=20, budget=BUDGET)
            results["latency"] = latency.to_dict()
            latency.raise_if_over()
    except ScmError as exc:  # ParityError, LatencyError, IntegrityError and the others
        results["error"] = str(exc)
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return exc.exit_code
    finally:
        report.write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")
    print(f"{bundle} passed; {report}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="bundle to check")
    parser.add_argument("report", type=Path, help="JSON file to write")
    sys.exit(main(**vars(parser.parse_args())))
