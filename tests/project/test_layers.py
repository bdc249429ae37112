"""Imports: strictly down the layers of ``[tool.importlinter]`` in pyproject.toml, and light at module level.

import-linter checks the layers. The other tests hold what it cannot see: libraries, strings and names.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers.project_modules import MODULES, ROOT

LIGHT_LIBRARIES: dict[str, set[str]] = {
    "_util": {"msgspec", "numpy"},
    "spec": {"msgspec"},
    "noise": {"numpy"},
    "images": {"numpy"},
    "bundle": {"msgspec", "numpy"},
    "engines": {"msgspec"},
    "pickles": {"msgspec", "numpy"},
    "model": {"msgspec", "numpy", "torch", "safetensors"},
    "train": {"filelock", "msgspec", "numpy", "torch", "safetensors"},
    "inference": {"msgspec", "numpy"},
    "evaluate": {"msgspec", "numpy"},
    "report": {"msgspec", "numpy"},
    "scale": {"msgspec", "numpy"},
    "serve": {"h11", "msgspec", "numpy", "prometheus_client", "starlette", "uvicorn"},
    "runtimes": {"msgspec", "numpy"},
    "export": {"msgspec", "numpy", "click", "rich"},
}
"""What each package may import at module level in addition to the standard library."""
TABLE_OF_BACKENDS = {"scm_sdk.inference.backends", "scm_sdk.inference.sources"}


OUTER = [name for name in MODULES if name.startswith(("scm_sdk.export", "scm_sdk.runtimes"))]
INNER = [name for name in MODULES if name not in OUTER]
ALL = [pytest.param(name, id=name) for name in MODULES if name != "scm_sdk"]


def absolute(node: ast.ImportFrom, module: str) -> str:
    """Return the full name that a ``from`` import starts at."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *(node.module or "").split(".")]).rstrip(".")


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if deferred or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        yield node
        yield from run_at_import(node)


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each import at module level; of ``from x import y``, where y is a module, ``x.y``."""
    for node in run_at_import(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = absolute(node, module)
            for alias in node.names:
                whole = f"{start}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else start


def test_imports_point_down_the_layers() -> None:
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    ended = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("module", ALL)
def test_only_light_libraries_at_module_level(module: str) -> None:
    allowed = LIGHT_LIBRARIES.get(module.split(".")[1], set()) | {"scm_sdk"} | sys.stdlib_module_names
    for line, name in imports(module):
        assert name.split(".")[0] in allowed, f"{module}:{line}: import {name} inside a function"


def test_the_package_itself_imports_only_what_is_light() -> None:
    assert [name for _, name in imports("scm_sdk") if name.startswith("scm_sdk")] == [
        "scm_sdk._util.public",
        "scm_sdk._version",
    ]


@pytest.mark.parametrize("module", OUTER)
def test_the_outer_folders_name_the_package_in_full_and_siblings_relatively(module: str) -> None:
    own = ".".join(module.split(".")[:2])
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = absolute(node, module)
            inside = name == own or name.startswith(f"{own}.")
            assert inside == bool(node.level), f"{module}:{node.lineno}: {'.' * node.level}{node.module}"


@pytest.mark.parametrize("module", INNER)
def test_the_outer_folders_are_named_only_in_the_tables_of_backends_and_public_names(module: str) -> None:
    """``import_module`` takes a string, which import-linter cannot see."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"(?:scm_sdk)?\.(export|runtimes)(\.\w+)*", node.value)
            in_table = module in TABLE_OF_BACKENDS and named is not None and named[1] == "runtimes"
            assert named is None or in_table or module == "scm_sdk", f"{module}:{node.lineno}: {node.value}"


def test_no_import_cycle() -> None:
    """No cycle when modules are imported, also inside a package."""
    graph = {module: {name for _, name in imports(module) if name in MODULES} - {"scm_sdk"} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def test_no_file_hides_a_library() -> None:
    """A script that is run from inside export/ puts that folder first on the path."""
    top = {path.stem for name, path in MODULES.items() if name in OUTER and name.count(".") == 2}
    assert not top & {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "tensorrt", "numpy", "click"}
