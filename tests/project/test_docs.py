"""The documentation site builds without warnings, needs no network, and covers the public API and the error texts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scm_sdk

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ERRORS = {
    name for name in vars(scm_sdk.errors) if name.endswith(("Error", "Argument", "Unavailable", "Failure", "Full"))
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("furo", reason="needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", str(out / "cache")]
    done = subprocess.run(
        [*command, str(DOCS), str(out / "html")], capture_output=True, encoding="utf-8", check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "html"


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*rel=["']stylesheet["'][^>]*//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style.name


def test_every_page_is_in_the_navigation(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}.html"' in front, page.name


def documented() -> set[str]:
    """Names that the API reference documents in the namespace of scm_sdk."""
    found: set[str] = set()
    for page in (DOCS / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"^\.\. auto(?:class|function|data|exception):: ([\w.]+)", text, re.MULTILINE)
        found |= {name for name in names if "." not in name}
    return found


def test_the_reference_documents_each_public_name() -> None:
    """A name that joins ``scm_sdk.__all__`` gets an entry in docs/api."""
    public = {name for name in scm_sdk.__all__ if not name.startswith("__")}
    assert documented() | ERRORS >= public, f"not in docs/api: {sorted(public - documented() - ERRORS)}"
    assert documented() <= public, f"not in scm_sdk.__all__: {sorted(documented() - public)}"


def test_the_reference_documents_each_error(site: Path) -> None:
    page = (site / "api" / "errors.html").read_text(encoding="utf-8")
    for name in ERRORS:
        assert f'id="scm_sdk.errors.{name}"' in page, name


def literal_texts() -> str:
    """Every string literal of the package, in the order of the source, values of f-strings left out."""
    texts = []
    for folder in ("scm_sdk", "export", "runtimes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] in (("scm_sdk", "export"), ("scm_sdk", "runtimes")):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    source = literal_texts()
    quoted = re.findall(r"^\| (`[^|]+`)", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    parts = [
        part.strip(" .,:;()'[]")
        for row in quoted
        for quote in re.findall(r"`([^`]+)`", row)
        for part in quote.split("...")
    ]
    assert len(parts) > 40
    assert not [part for part in parts if part not in source], "no message holds these"


def test_the_variables_page_names_each_variable() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    files = [path for folder in ("scm_sdk", "export", "runtimes") for path in (ROOT / folder).rglob("*.py")]
    used = {name for path in files for name in re.findall(r'"(SCM_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    assert used and used <= set(re.findall(r"`(SCM_[A-Z_]+)`", page))
