"""The JavaScript of a site against its declarations, by TypeScript's compiler of ``typescript/package-lock.json``."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.node import npm_install

HERE = Path(__file__).resolve().parent
WEB = HERE.parents[2] / "export" / "edge" / "web"


@pytest.fixture(scope="module")
def compile_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the compiler, installed as its lock file says, and a copy of the sources."""
    folder = tmp_path_factory.mktemp("typescript")
    npm_install(HERE / "typescript", folder)
    shutil.copy(HERE / "typescript" / "tsconfig.json", folder)
    shutil.copytree(WEB, folder / "web")
    return folder


def errors(folder: Path) -> str:
    """Return what the compiler says."""
    compiler = folder / "node_modules" / "typescript" / "bin" / "tsc"
    command = ["node", str(compiler), "-p", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=1800, check=False).stdout


@pytest.mark.slow
def test_sources_have_the_types_that_they_declare(compile_types: Path) -> None:
    assert errors(compile_types) == ""


@pytest.mark.slow
def test_a_callers_mistakes_are_found(compile_types: Path) -> None:
    (compile_types / "web" / "caller.js").write_text(
        'import { Generator } from "./scm.js";\n'
        'const gen = await Generator.load("./", { device: "gpu" });\n'
        "const samples = await gen.generate({ sed: 3 });\n"
        "console.log(samples.images.length, samples.image);\n",
        encoding="utf-8",
    )
    found = errors(compile_types)
    (compile_types / "web" / "caller.js").unlink()
    assert [f"caller.js({line}," in found for line in (2, 3, 4)] == [True, True, True], found
    assert '"gpu"' in found and "'sed'" in found and "'image'" in found
