"""The house: imports point strictly down, so that each floor can be read without those above it.

A unit is a module of ``scm_sdk`` or one of its packages. This list is the rule; a new unit needs a
place in it. Imports inside functions and under ``TYPE_CHECKING`` count like any other.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "scm_sdk": ROOT / "scm_sdk",
    "scm_sdk.export": ROOT / "export",
    "scm_sdk.runtimes": ROOT / "runtimes",
}

# Lowest first. Units of one line never import each other. Then: what the line may import at module level.
FLOORS: list[tuple[set[str], set[str]]] = [
    ({"errors", "_names", "_version", "assets", "processor", "progress"}, set()),
    ({"switches", "forked", "locks"}, set()),
    ({"telemetry"}, set()),
    ({"_lazy", "spec", "targets", "files", "gpu"}, {"msgspec"}),
    ({"noise", "images", "manifest", "goldens", "status", "user_cache", "publish"}, {"msgspec", "numpy"}),
    ({"graph_checks", "scores"}, set()),
    ({"_bundle_checks", "_roles", "build_record", "card", "scheduler", "subset"}, {"msgspec"}),
    ({"signing"}, set()),
    ({"archive", "hub"}, set()),
    ({"unpacked"}, set()),
    ({"locate"}, set()),
    ({"pickles"}, {"msgspec", "numpy"}),
    ({"trt"}, set()),
    ({"engine_fit", "plan"}, set()),
    ({"bundle"}, {"msgspec"}),
    ({"extend"}, {"msgspec"}),
    ({"model"}, {"msgspec", "numpy", "torch", "safetensors"}),
    ({"train"}, {"filelock", "msgspec", "numpy", "torch", "safetensors"}),
    ({"prompting"}, {"numpy"}),
    ({"examples"}, {"numpy"}),
    ({"dispatch", "request", "sources"}, {"msgspec", "numpy"}),
    ({"measured", "output", "refusal"}, {"msgspec", "numpy"}),
    ({"opened"}, {"numpy"}),
    ({"opening"}, {"numpy"}),
    ({"packing"}, {"numpy"}),
    ({"batcher"}, set()),
    ({"generator"}, {"numpy"}),
    ({"evaluate"}, {"msgspec", "numpy"}),
    ({"report"}, {"msgspec", "numpy"}),
    ({"runtimes", "export"}, {"msgspec", "numpy", "click", "rich"}),
]
MAY_NAME_A_BACKEND = {"scm_sdk.dispatch", "scm_sdk.sources"}
LEVEL = {unit: level for level, (units, _) in enumerate(FLOORS) for unit in units}
OUTSIDE = {unit: allowed for units, allowed in FLOORS for unit in units}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the project with its import name. The links inside ``scm_sdk/`` are not followed."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(folder).with_suffix("").parts
            if package != "scm_sdk" or below[0] not in ("export", "runtimes"):
                name = ".".join((package, *below))
                yield name.removesuffix(".__init__"), path


MODULES = dict(modules())
OUTER = [name for name in MODULES if name.startswith(("scm_sdk.export", "scm_sdk.runtimes"))]
INNER = [name for name in MODULES if name not in OUTER]
BELOW_THE_DOOR = [pytest.param(name, id=name) for name in MODULES if name != "scm_sdk"]


def unit_of(module: str) -> str:
    return module.split(".")[1]


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


def imports(module: str, *, at_import: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of each import; of ``from x import y``, where y is a module, ``x.y``."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in run_at_import(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = absolute(node, module)
            for alias in node.names:
                whole = f"{start}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else start


def test_the_list_names_every_unit_once() -> None:
    units = [unit for group, _ in FLOORS for unit in group]
    assert len(units) == len(set(units))
    found = {unit_of(name) for name in MODULES if name != "scm_sdk"}
    assert found <= set(units), f"give {sorted(found - set(units))} a floor in this file"
    assert {"bundle", "model", "export", "runtimes"} <= found, "the walk must see the whole house"


@pytest.mark.parametrize("module", BELOW_THE_DOOR)
def test_imports_point_down(module: str) -> None:
    unit = unit_of(module)
    for line, name in imports(module):
        assert name.split(".")[0] not in ("export", "runtimes"), f"{module}:{line}: write scm_sdk.{name}"
        if name == "scm_sdk" or not name.startswith("scm_sdk."):
            continue  # scm_sdk itself is the door: only its __version__ is there without importing more
        target = unit_of(name)
        assert target in LEVEL, f"{module}:{line}: {name} has no floor in this file"
        assert target == unit or LEVEL[target] < LEVEL[unit], f"{module}:{line}: {unit} imports {target}"


@pytest.mark.parametrize("module", BELOW_THE_DOOR)
def test_only_light_libraries_at_module_level(module: str) -> None:
    allowed = OUTSIDE[unit_of(module)] | {"scm_sdk"} | sys.stdlib_module_names
    for line, name in imports(module, at_import=True):
        assert name.split(".")[0] in allowed, f"{module}:{line}: import {name} inside a function"


def test_the_door_imports_only_the_version() -> None:
    assert [name for _, name in imports("scm_sdk", at_import=True) if name.startswith("scm_sdk")] == [
        "scm_sdk._version"
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
def test_the_outer_folders_are_named_only_where_a_backend_is_chosen(module: str) -> None:
    """``import_module`` takes a string, which the tests above cannot see."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"(?:scm_sdk)?\.(export|runtimes)(\.\w+)*", node.value)
            chosen = module in MAY_NAME_A_BACKEND and named is not None and named[1] == "runtimes"
            assert named is None or chosen, f"{module}:{node.lineno}: {node.value}"


def test_no_module_needs_itself() -> None:
    """No circle when modules are imported, also inside a package."""
    graph = {
        module: {name for _, name in imports(module, at_import=True) if name in MODULES} - {"scm_sdk"}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" -> ".join(exc.args[1]))


def test_no_file_hides_a_library() -> None:
    """A script run from inside export/ puts that folder first on the path."""
    names = {path.stem for path in MODULES.values()}
    assert not names & {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "tensorrt", "numpy", "click"}
