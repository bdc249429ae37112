"""The ablation's finished runs as tables and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ablation_runs import TEACHER, AblationRun, held_out
from PIL import Image, ImageDraw

from scm_sdk._util.files import atomic_write_bytes
from scm_sdk.evaluate.quality.sampling import sample_diffusion, sample_student
from scm_sdk.images import make_grid, save_png

TITLES = (
    "method", "seeds", "iterations", "CPU s", "FD, 1 step", "FD, 2 steps", "FD, 4 steps",
    "KID x1e3, 1 step", "KID x1e3, 2 steps", "FD/teacher's, 2 steps", "gradient, largest/median",
)  # fmt: skip
MANY = "35 calls"
COLUMNS = 6
SCALE = 2
LABEL_WIDTH = 220

Result = dict[str, Any]


def show(table: dict[str, Any]) -> None:
    """Print the tables, one for each data set and size."""
    from rich.console import Console
    from rich.table import Table

    for title, rows in _tables(table):
        drawn = Table(title=title)
        for name in TITLES:
            drawn.add_column(name)
        for row in rows:
            drawn.add_row(*row)
        Console(width=200).print(drawn)


def write_markdown(table: dict[str, Any], path: Path) -> None:
    """Write the tables, one for each data set and size."""
    lines = [
        f"Metric: {table['metric']}, {table['budget']['num_reference']:,} held-out pictures. An FD of several seeds is "
        "their mean, in brackets each; of a KID the 95 % interval is in brackets, the widest of the seeds'. Written by "
        "`benchmarks/study/ablation.py`.",
    ]
    for title, rows in _tables(table):
        lines += ["", f"### {title}", "", f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    atomic_write_bytes(path, "\n".join([*lines, ""]).encode())


def _tables(table: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield title and rows of each data set and size."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in table["runs"]:
        groups.setdefault((result["data"], result["size"]), []).append(result)
    for (data, size), results in groups.items():
        teachers = {result["switch"]: result for result in results if result["method"] == TEACHER}
        parameters = results[0]["parameters"] / 1e6
        floor = table["floor"][data]
        rows = [["real, training rows", "", "", "", *["-"] * 3, _kid([floor]), "-", f"FD {floor['fd']:.1f}", ""]]
        for switch, teacher in teachers.items():
            rows += _teacher_rows(teacher, f", {switch}" if switch else "")
        students: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            if result["method"] != TEACHER:
                students.setdefault((result["method"], result["switch"]), []).append(result)
        for (method, switch), seeds in students.items():
            teacher = teachers.get(switch, teachers[""])
            rows.append(_student_row(f"{method}, {switch}" if switch else method, seeds, teacher))
        yield f"{data}, size {size} ({parameters:.2f}M parameters)", rows


def _teacher_rows(teacher: Result, suffix: str) -> list[list[str]]:
    figures = teacher["figures"]
    cost = ["1", f"{teacher['iterations']:,}", f"{teacher['cpu_seconds']:.0f}"]
    many = figures[MANY]
    return [
        [
            f"teacher, {MANY}{suffix}",
            *cost,
            "-",
            "-",
            "-",
            _kid([many]),
            "-",
            f"1 (FD {many['fd']:.1f})",
            _norms([teacher]),
        ],
        [f"its weights as a student's{suffix}", "", "", "", *_distances([teacher], teacher), ""],
    ]


def _student_row(name: str, seeds: list[Result], teacher: Result) -> list[str]:
    iterations = f"{seeds[0]['iterations']:,}"
    seconds = f"{np.mean([result['cpu_seconds'] for result in seeds]):.0f}"
    return [name, str(len(seeds)), iterations, seconds, *_distances(seeds, teacher), _norms(seeds)]


def _distances(seeds: list[Result], teacher: Result) -> list[str]:
    """Return the cells from FD to the ratio."""
    figures = [result["figures"] for result in seeds]
    fds = [_fd([found[steps]["fd"] for found in figures]) for steps in ("1", "2", "4")]
    kids = [_kid([found[steps] for found in figures]) for steps in ("1", "2")]
    ratio = np.mean([found["2"]["fd"] for found in figures]) / teacher["figures"][MANY]["fd"]
    return [*fds, *kids, f"{ratio:.2f}"]


def _fd(values: list[float]) -> str:
    each = f" ({', '.join(f'{value:.0f}' for value in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.0f}{each}"


def _kid(figures: list[dict[str, Any]]) -> str:
    low = min(found["kid_interval"][0] for found in figures)
    high = max(found["kid_interval"][1] for found in figures)
    return f"{1e3 * float(np.mean([found['kid'] for found in figures])):.0f} ({1e3 * low:.0f}..{1e3 * high:.0f})"


def _norms(seeds: list[Result]) -> str:
    worst = max(result["gradient_norm"]["largest"] / result["gradient_norm"]["median"] for result in seeds)
    skipped = sum(result["skipped_steps"] for result in seeds)
    return f"{worst:.0f}" + (f", {skipped} skipped" if skipped else "")


def write_pictures(runs: list[AblationRun], work: Path, path: Path) -> None:
    """Draw a row for each method: 1 step on the left, 2 on the right, the same noise in every row; teachers' 35 calls.

    Of students the first seed is drawn. Data sets are columns.
    """
    columns = []
    names: list[str] = []
    for data in dict.fromkeys(run.data for run in runs):
        mine: dict[str, AblationRun] = {}
        for run in runs:
            if run.data == data:
                mine.setdefault(_name(run), run)
        drawn = {"real": np.asarray(held_out(data, 2 * COLUMNS, work))}
        for name, run in mine.items():
            folder = work / run.key
            if run.method == TEACHER:
                drawn[name] = sample_diffusion(folder, 2 * COLUMNS, cache=work).images
                name = name.replace(f"teacher, {MANY}", "its weights as student")
            drawn[name] = np.concatenate(
                [
                    sample_student(folder, COLUMNS, num_inference_steps=steps, backend="torch", cache=work).images
                    for steps in (1, 2)
                ]
            )
        names += [name for name in drawn if name not in names]
        columns.append(drawn)
    blank = np.full((2 * COLUMNS, 16, 16, 3), 255, np.uint8)
    strips = []
    for drawn in columns:
        rows = [np.broadcast_to(drawn.get(name, blank), blank.shape) for name in names]
        sheets = [
            make_grid(np.concatenate([row[half] for row in rows]), COLUMNS, SCALE, padding=2)
            for half in (slice(0, COLUMNS), slice(COLUMNS, None))
        ]
        strips += [part for sheet in sheets for part in (np.full((sheet.shape[0], 10, 3), 255, np.uint8), sheet)]
    save_png(np.concatenate([_labels(names, strips[0].shape[0]), *strips], axis=1), path)


def _name(run: AblationRun) -> str:
    parts = [
        run.method if run.method != TEACHER else f"teacher, {MANY}",
        run.switch,
        "" if run.size == "S" else run.size,
    ]
    return ", ".join(part for part in parts if part)


def _labels(names: list[str], height: int) -> np.ndarray:
    """Return a strip with each row's name."""
    strip = Image.new("RGB", (LABEL_WIDTH, height), "white")
    pen = ImageDraw.Draw(strip)
    for number, name in enumerate(names):
        pen.text((4, number * (16 * SCALE + 2) + 10), name, fill="black", font_size=10)
    return np.asarray(strip)
