"""Plain technical English: documents, docstrings, comments, help and messages use the field's standard terms."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BANNED = {
    r"anew": "again",
    r"beside(?!s|:| needs| holds)": "next to, in addition to, compared with",
    r"besides": "in addition",
    r"told|tells?": "state, report, record",
    r"lies|lie|lay|lain": "is in, is stored in",
    r"strangers?": "untrusted",
    r"rungs?|ladder": "baseline, order",
    r"streets?|houses?|housed|doors?": "the term of the field",
    r"wall(?! time| clock| and| s\b)": "layer, contract",
    r"(?<!noise )(?<!the )(?<!The )floors?(?![\w(.=])": "minimum, real-vs-real distance",
    r"for ever|forever": "indefinitely, immutable",
    r"by hand": "manually",
    r"picture show|worth the name|as it were": "delete it",
    r"vouch(?:es|ed)?|mends?|mended|dress up|at will|of before": "verify, fix, convert, optional, earlier",
    r"whoever|wherever|somebody|nobody|anybody|everybody": "name the user, process or caller",
    r"(?:go|goes|went|going) on(?! a)": "continue",
    r"look(?:s|ed|ing)? into": "diagnose, inspect",
    r"h[eo]ld(?:s|ing)? [\w ]{0,30}against": "compare",
    r"thrown? away": "discard",
    r"side by side": "concurrently, next to each other",
    r"without a word|says? so much|by itself alone": "silently",
    r"(?:flavour|colour|behaviour|normalis|optimis(?!ation_level)|licence|neighbour|serialis|initialis)\w*": "American",
    r"(?<!at )(?<!At )least(?! squares| recently| significant| finished)(?!-)": "minimum, smallest",
}  # fmt: skip
"""Banned words as regular expressions, each with the plain term."""

ALLOWED = {
    "tests/project/test_style.py": "the list itself",
}
"""Files that are not checked, each with the reason."""
PROSE = (
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "MANIFEST.in",
    "pyproject.toml",
    ".ci/run",
    ".pre-commit-config.yaml",
    "docs/*.md",
    "docs/**/*.md",
    "benchmarks/results/README.md",
    "benchmarks/teachers/*/*.md",
    "examples/**/*.md",
    "export/**/*.md",
    "scm_sdk/**/*.md",
)
CODE = ("scm_sdk", "export", "runtimes", "examples", "benchmarks", "tests", "docs")


def tracked() -> list[Path]:
    """The files of the checkout, or of a copy without git that holds nothing else."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    links = [ROOT / "scm_sdk" / name for name in ("export", "runtimes")]
    return [path for path in paths if path not in links and not any(link in path.parents for link in links)]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each piece of prose: lines of a document, comments and strings of a module."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        fenced = False
        for number, line in enumerate(source.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"``[^`]*``|`[^`]*`", "", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], re.sub(r"`[^`]*`", "", token.string)


def checked() -> list[Path]:
    found = [path for path in tracked() if path.relative_to(ROOT).as_posix() not in ALLOWED]
    documents = {path for pattern in PROSE for path in ROOT.glob(pattern)}
    modules = {path for path in found if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in CODE}
    return sorted(modules | (documents & set(found)))


def test_no_banned_word() -> None:
    pattern = re.compile(
        "|".join(rf"(?P<w{number}>\b(?:{word})\b)" for number, word in enumerate(BANNED)), re.IGNORECASE
    )
    plain = list(BANNED.values())
    found = []
    for path in checked():
        for number, text in prose(path):
            for match in pattern.finditer(text):
                instead = plain[int(str(match.lastgroup)[1:])]
                line = number + text[: match.start()].count("\n")
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; use: {instead}")
    assert not found, f"{len(found)} banned words:\n" + "\n".join(found)


def test_no_docstring_is_a_question() -> None:
    found = []
    for path in checked():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    if "?" in re.sub(r"`[^`]*`", "", summary):
                        found.append(f"{path.relative_to(ROOT)}: {summary}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["``lies``", "the noise floor", "at least one", "wall time"])
def test_terms_of_the_field_are_allowed(text: str, tmp_path: Path) -> None:
    assert not any(re.search(rf"\b(?:{word})\b", shown(text, tmp_path), re.IGNORECASE) for word in BANNED)


@pytest.mark.parametrize("text", ["a file that lies in it", "the least one", "an error that tells", "it goes on"])
def test_private_dialect_is_found(text: str, tmp_path: Path) -> None:
    assert any(re.search(rf"\b(?:{word})\b", shown(text, tmp_path), re.IGNORECASE) for word in BANNED)


def shown(text: str, folder: Path) -> str:
    (folder / "a.py").write_text(f'"""A docstring: {text}."""\n', encoding="utf-8")
    ((_, found),) = prose(folder / "a.py")
    return found


def test_hooks_run_the_programs_of_make() -> None:
    hooks = set(re.findall(r"entry: \.venv/bin/(\S+ ?\w*)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8")))
    rules = re.search(r"(?ms)^lint: (.*?)^types: (.*?)\n\n", (ROOT / "Makefile").read_text("utf-8"))
    assert rules is not None
    programs = re.findall(r"(?m)^\t\$\(BIN\)/(\S+(?: check| format)?)", rules[0])
    assert {name.strip() for name in hooks} == set(programs)


def encoding_unnamed(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in values or None in values:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name == "open" and isinstance(call.func, ast.Name):
        mode = call.args[1] if len(call.args) > 1 else values.get("mode", ast.Constant("r"))
        return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
    return any(
        isinstance(value := values.get(word), ast.Constant) and value.value is True
        for word in ("text", "universal_newlines")
    )


def test_text_files_and_pipes_name_their_encoding() -> None:
    """An unnamed encoding is the locale's, which is ASCII on a server with ``LC_ALL=C``."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in tracked()
        if path.suffix == ".py"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and encoding_unnamed(call)
    ]
    assert not found, f"calls without encoding=: {found}"
