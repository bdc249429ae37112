"""The public interface: where its names are, who imports what, and that every argument and result has a type."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import scm_sdk
from helpers.project_modules import MODULES, ROOT
from scm_sdk import ConsistencyModel, add_engines, build_all, errors, validate
from scm_sdk.errors import UnknownArgument
from scm_sdk.evaluate.validate import ValidateOptions, validate_bundle
from scm_sdk.export.engines.options import BuilderOptions, EngineOptions

PACKAGES = ["scm_sdk", "scm_sdk.train", "scm_sdk.model", "scm_sdk.serve"]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
IMPORT = re.compile(r"^[ >]*(?:from (scm_sdk[\w.]*) import (.+?)(?:\s*#.*)?|import (scm_sdk[\w.]*).*)$", re.MULTILINE)
ANY_VALUE = {
    "scm_sdk.pickles.": "values of a pickle, checked when they are used",
    "scm_sdk.export.cli.": "parameters of a command, which click passes by name",
    "scm_sdk.train.data.": "rows of an array, as NumPy types them",
    "scm_sdk.model.foreign.few_step_networks": "a module of diffusers, which has no types",
    "scm_sdk.model.foreign.linear_attention": "a module of diffusers, which has no types",
}
"""Where a public signature may say ``Any``, and what it stands for."""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_lazy_name_is_the_one_that_type_checkers_see(package: str) -> None:
    module = importlib.import_module(package)
    homes: dict[str, str] = module._HOMES
    seen = {}
    for node in ast.parse(MODULES[package].read_text("utf-8")).body:
        if isinstance(node, ast.If):
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                seen |= {alias.name: f"{'.' * line.level}{line.module}" for alias in line.names}
    assert seen == homes
    assert sorted([*homes, *(["__version__"] if package == "scm_sdk" else [])]) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_tree_of_errors_is_public() -> None:
    tree = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == "scm_sdk.errors"
    }
    assert tree <= set(scm_sdk.__all__)


def _on_one_line(found: re.Match[str]) -> str:
    return "import " + " ".join(found[1].split()).rstrip(",")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_docs_and_examples_import_public_names_only(path: Path) -> None:
    text = re.sub(
        r"import \(([^)]*)\)",
        lambda found: "import " + " ".join(found[1].split()).rstrip(","),
        path.read_text(encoding="utf-8"),
    )
    for module, names, plain in IMPORT.findall(text):
        assert (module or plain) in PACKAGES, f"{path}: {module or plain}"
        public = importlib.import_module(module or plain).__all__
        for name in filter(None, (name.split(" as ")[0].strip() for name in names.split(","))):
            assert name in public, f"{path}: from {module} import {name}"


def test_the_texts_import_something() -> None:
    assert sum(len(IMPORT.findall(path.read_text("utf-8"))) for path in TEXTS) > 10


def untyped(module: str) -> Iterator[str]:
    """Public functions with ``**x: Any``, a parameter that is ``Any``, or ``-> Any``."""

    def of(node: ast.AST, prefix: str) -> Iterator[str]:
        for item in ast.iter_child_nodes(node):
            name = getattr(item, "name", "_")
            if name.startswith("_") and not re.fullmatch(r"__\w+__", name):
                continue
            if isinstance(item, ast.ClassDef):
                yield from of(item, f"{prefix}{name}.")
            elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                given = item.args
                parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                annotations = [one.annotation for one in parameters if one is not None]
                if any(one is not None and ast.unparse(one) == "Any" for one in [*annotations, item.returns]):
                    yield f"{prefix}{name}"

    yield from of(ast.parse(MODULES[module].read_text(encoding="utf-8")), "")


@pytest.mark.parametrize("module", [name for name in MODULES if not re.search(r"\._(?!_)", name)])
def test_public_signatures_have_types(module: str) -> None:
    if not any(module.startswith(allowed) for allowed in ANY_VALUE):
        assert list(untyped(module)) == []


@pytest.mark.parametrize("allowed", ANY_VALUE)
def test_what_may_be_of_any_type_is_still_there(allowed: str) -> None:
    assert any(list(untyped(module)) for module in MODULES if module.startswith(allowed))


@pytest.mark.parametrize(
    ("call", "of", "nearest"),
    [
        (lambda: add_engines("b", [], workspace_byts=3), "add_engines", "workspace_bytes"),
        (lambda: build_all("c", "b", precision=["fp16"]), "build_all", "precisions"),
        (lambda: build_all("c", "b", optimisation_level=3), "build_all", "optimization_level"),
        (lambda: validate("b", num_seed=3), "validate", "num_seeds"),
        (lambda: validate_bundle("b", first_sed=3), "validate_bundle", "first_seed"),
        (lambda: scm_sdk.compare(None, None, treshold=1), "compare", "threshold"),
        (lambda: scm_sdk.measure({}, round=1), "measure", "rounds"),
        (lambda: scm_sdk.export_bundle("c", "b", max_bach=3), "export_bundle", "max_batch"),
        (lambda: ConsistencyModel(network=object(), sample_shape=(1,), sigma=1), "ConsistencyModel", "sigma_data"),
    ],
)
def test_a_wrong_keyword_is_refused_with_the_nearest(call, of: str, nearest: str) -> None:
    with pytest.raises(UnknownArgument, match=rf"^{of} got '\w+', .*Did you mean {nearest}\?"):
        call()


def test_unpacked_options_are_those_of_the_function_that_takes_them() -> None:
    given = inspect.signature(validate_bundle).parameters
    assert set(ValidateOptions.__annotations__) == set(given) - {"path", "examples", "examine", "events"}
    fields = dict(zip(EngineOptions.__struct_fields__, EngineOptions.__annotations__.values(), strict=True))
    builder = set(fields) - {"flavor", "compute_capabilities", "batch"}
    assert set(BuilderOptions.__annotations__) == builder
