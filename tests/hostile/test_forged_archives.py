"""Forged ``.scmz`` archives write nothing but the bundle that their manifest lists."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.campaign import Silent, run_campaign
from hostile.forging import (
    ESCAPES,
    nested,
    read_json,
    reseal,
    write_base,
)

pytestmark = pytest.mark.hostile
HERE = "hostile.test_forged_archives"


def test_archives(tmp_path: Path, record: Any) -> None:
    write_base(tmp_path / "base")
    cases = [[name, how] for name in archive_forgeries(Path(), Path()) for how in ("unpack", "open")]
    setup = {"base": str(tmp_path / "base")}
    record(run_campaign("forged archives", f"{HERE}:prepare_archives", cases, setup=setup))


def archive_forgeries(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Return the forgeries of the ``.scmz`` of a bundle, each of which writes ``out``."""

    def members() -> dict[str, bytes]:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return {"scm_manifest.json": files.pop("scm_manifest.json"), **dict(sorted(files.items()))}

    def write(extra: list[tuple[zipfile.ZipInfo | str, bytes]] = [], **options: Any) -> None:  # noqa: B006
        with zipfile.ZipFile(out, "w", **options) as archive:
            for name, data in [*members().items(), *extra]:
                archive.writestr(name, data)

    def additional(name: str, data: bytes = b"evil", mode: int = 0, **facts: Any) -> Callable[[], None]:
        def make() -> None:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            info.external_attr = mode << 16
            for key, value in facts.items():
                setattr(info, key, value)
            write([(info, data)])

        return make

    def listed(name: str, data: bytes = b"evil", mode: int = 0) -> Callable[[], None]:
        """Also list the member in the manifest."""

        def make() -> None:
            value = read_json(folder / "scm_manifest.json")
            from scm_sdk._util.files import sha256_bytes

            value["files"].append({"path": name, "size": len(data), "sha256": sha256_bytes(data), "role": "report"})
            kept = (folder / "scm_manifest.json").read_bytes()
            try:
                reseal_text(folder, value)
                additional(name, data, mode)()
            finally:
                (folder / "scm_manifest.json").write_bytes(kept)

        return make

    def reseal_text(folder: Path, value: Any) -> None:
        value["files"].sort(key=lambda entry: entry["path"])
        reseal(folder, json.dumps(value))

    def patched(change: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[], None]:
        def make() -> None:
            write()
            data = bytearray(out.read_bytes())
            changed = change(data)
            out.write_bytes(data if changed is None else changed)

        return make

    def end_record(**fields: int) -> Callable[[bytearray], None]:
        places = {"disk": 4, "start": 6, "here": 8, "total": 10, "size": 12, "offset": 16, "comment": 20}

        def change(data: bytearray) -> None:
            at = data.rindex(b"PK\5\6")
            for key, value in fields.items():
                form = "<I" if key in ("size", "offset") else "<H"
                struct.pack_into(form, data, at + places[key], value)

        return change

    def header(signature: bytes, offset: int, form: str, value: int, which: int) -> Callable[[bytearray], None]:
        """Change a field of the header of a member: the one of the directory, or the one before its data."""

        def change(data: bytearray) -> None:
            at = -1
            for _ in range(which + 1):
                at = data.index(signature, at + 1)
            struct.pack_into(form, data, at + offset, value)

        return change

    def central(offset: int, form: str, value: int, which: int = 1) -> Callable[[bytearray], None]:
        return header(b"PK\1\2", offset, form, value, which)

    def local(offset: int, form: str, value: int, which: int = 1) -> Callable[[bytearray], None]:
        return header(b"PK\3\4", offset, form, value, which)

    def overlapping(data: bytearray) -> None:
        first = data.index(b"PK\1\2")
        second = data.index(b"PK\1\2", first + 1)
        data[second + 42 : second + 46] = data[first + 42 : first + 46]

    def both_sizes(size: int) -> Callable[[bytearray], None]:
        def change(data: bytearray) -> None:
            central(20, "<I", size)(data)
            central(24, "<I", size)(data)

        return change

    def commented(length: int, comment: bytes) -> Callable[[], None]:
        def change(data: bytearray) -> bytes:
            end_record(comment=length)(data)
            return bytes(data) + comment

        return patched(change)

    def renamed_in_directory(data: bytearray) -> None:
        at = data.rindex(b"README.md")
        data[at : at + 9] = b"EVILME.md"

    def zip64(data: bytearray) -> bytes:
        at = data.rindex(b"PK\5\6")
        entries = struct.unpack_from("<H", data, at + 10)[0]
        size, _ = struct.unpack_from("<II", data, at + 12)
        record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**40 + entries, 2**40, size, 2**50)
        locator = b"PK\6\7" + struct.pack("<IQI", 0, at, 1)
        tail = bytearray(data[at:])
        struct.pack_into("<HHII", tail, 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        return bytes(data[:at]) + record + locator + bytes(tail)

    def compressed() -> None:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members().items():
                archive.writestr(name, data)

    def bomb() -> None:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members().items():
                archive.writestr(name, bytes(1 << 30) if name == "README.md" else data)

    def many(count: int) -> Callable[[], None]:
        return lambda: write([(f"m{i}", b"") for i in range(count)])

    manifest_name = "scm_manifest.json"
    names = {
        "up": "../evil", "up deep": "onnx/../../evil", "absolute": "/tmp/evil", "drive": "C:\\evil",
        "unc": "\\\\host\\evil",
        "backslash": "..\\evil", "dot": "./evil", "double slash": "a//evil", "NUL": "evil\0.txt", "empty": "",
        "escapes": ESCAPES, "long": "a" * 300, "very long": "a/" * 3000 + "a", "case": "readme.MD",
        "below a file": "README.md/evil", "folder": "evil/", "manifest twice": manifest_name, "device": "dev/null",
        "newline": "a\nb", "tilde": "~/evil", "hidden": ".evil",
    }  # fmt: skip
    found: dict[str, Callable[[], object]] = {}
    for label, name in names.items():
        found[f"additional: {label}"] = additional(name)
        found[f"listed: {label}"] = listed(name)
    for label, mode in {
        "link": stat.S_IFLNK, "device": stat.S_IFCHR, "fifo": stat.S_IFIFO, "folder": stat.S_IFDIR,
        "socket": stat.S_IFSOCK
    }.items():  # fmt: skip
        found[f"mode {label}"] = listed("evil", b"/etc/passwd", mode | 0o777)
    found["mode setuid"] = listed("evil", b"data", stat.S_IFREG | 0o6777)
    found |= {
        "right": lambda: write(),
        "comment": commented(5, b"hello"),
        "comment of 64 KiB": commented(65535, b"c" * 65535),
        "comment that is an archive": commented(22, b"PK\5\6" + bytes(18)),
        "prepended": patched(lambda data: b"#!/bin/sh\n" + bytes(data)),
        "appended": patched(lambda data: bytes(data) + b"junk"),
        "empty": lambda: out.write_bytes(b""),
        "no end": patched(lambda data: data[:-22]),
        "no members": lambda: zipfile.ZipFile(out, "w").close(),
        "text": lambda: out.write_text("hello", encoding="utf-8"),
        "compressed": compressed,
        "bomb": bomb,
        "overlap": patched(overlapping),
        "members 5000": many(5000),
        "members 100000": many(100_000),
        "claims 65535 members": patched(end_record(here=65535, total=65535)),
        "claims no members": patched(end_record(here=0, total=0)),
        "directory beyond": patched(end_record(offset=2**32 - 2)),
        "directory of 4 GB": patched(end_record(size=2**32 - 2)),
        "directory of nothing": patched(end_record(size=0)),
        "directory at 0": patched(end_record(offset=0)),
        "other disk": patched(end_record(disk=3, start=3)),
        "zip64": patched(zip64),
        "encrypted": patched(central(8, "<H", 1)),
        "strong encryption": patched(central(8, "<H", 0x41)),
        "data descriptor": patched(central(8, "<H", 8)),
        "utf-8 flag": patched(central(8, "<H", 0x800)),
        "method 99": patched(central(10, "<H", 99)),
        "method bzip2": patched(central(10, "<H", 12)),
        "method lzma": patched(central(10, "<H", 14)),
        "version 255": patched(central(6, "<H", 255)),
        "crc": patched(central(16, "<I", 1)),
        "size 0": patched(central(24, "<I", 0)),
        "size 4 GB": patched(central(24, "<I", 2**32 - 2)),
        "stored size 4 GB": patched(central(20, "<I", 2**32 - 2)),
        "both sizes 4 GB": patched(both_sizes(2**32 - 2)),
        "both sizes 1": patched(both_sizes(1)),
        "offset beyond": patched(central(42, "<I", 2**31)),
        "offset in the middle": patched(central(42, "<I", 77)),
        "name length": patched(central(28, "<H", 65535)),
        "extra length": patched(central(30, "<H", 65535)),
        "local name length": patched(local(26, "<H", 65535)),
        "local extra length": patched(local(28, "<H", 65535)),
        "local method": patched(local(8, "<H", 8)),
        "local name differs": patched(lambda data: data.replace(b"README.md", b"EVILME.md", 1)),
        "directory name differs": patched(renamed_in_directory),
        "manifest missing": lambda: _without(out, write, manifest_name),
        "member missing": lambda: _without(out, write, "README.md"),
        "manifest of 9 MB": lambda: _instead(out, members(), manifest_name, b" " * (9 << 20)),
        "manifest empty": lambda: _instead(out, members(), manifest_name, b""),
        "manifest deep": lambda: _instead(out, members(), manifest_name, nested(100_000).encode()),
        "content differs": lambda: _instead(out, members(), "README.md", b"other"),
        "is a folder": lambda: out.mkdir(),
        "is a fifo": lambda: os.mkfifo(out),
        "is a device": lambda: out.symlink_to("/dev/zero"),
        "is a link to nothing": lambda: out.symlink_to("nothing"),
        "is a link to itself": lambda: out.symlink_to(out),
        "name not UTF-8": lambda: _not_utf8(out, additional("evilevil")),
    }  # fmt: skip
    return found


def _not_utf8(out: Path, make: Callable[[], None]) -> None:
    make()
    data = bytearray(out.read_bytes().replace(b"evilevil", b"\xff\xfe\xc0\x80evil"))
    at = data.rindex(b"PK\1\2")
    struct.pack_into("<H", data, at + 8, 0x800)  # it is said to be UTF-8
    out.write_bytes(data)


def _without(out: Path, write: Callable[[], None], name: str) -> None:
    write()
    with zipfile.ZipFile(out) as archive:
        kept = {each: archive.read(each) for each in archive.namelist() if each != name}
    with zipfile.ZipFile(out, "w") as archive:
        for each, data in kept.items():
            archive.writestr(each, data)


def _instead(out: Path, members: dict[str, bytes], name: str, data: bytes) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, data if each == name else content)


def prepare_archives(setup: dict[str, Any], scratch: Path) -> Callable[[list[Any]], None]:
    import warnings

    from scm_sdk.bundle.archive import unpack
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.inference.generator import Generator

    folder = scratch / "bundle"
    shutil.copytree(setup["base"], folder)
    right = Bundle.open(folder).manifest
    warnings.simplefilter("ignore")  # zipfile's own, about a name that is written twice

    def attempt(case: list[Any]) -> None:
        name, how = case
        archive, out = scratch / "forged.scmz", scratch / "out"
        archive_forgeries(folder, archive)[name]()
        before = {path for path in Path("/tmp").iterdir() if path.name == "evil"}
        try:
            if how == "unpack":
                try:
                    unpack(archive, out)
                except BaseException:
                    if os.path.lexists(out):
                        raise Silent("half a bundle is left") from None
                    raise
                manifest = Bundle.open(out).manifest
                odd = [path for path in out.rglob("*") if path.is_symlink() or path.stat().st_mode & 0o7000]
                there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
                if odd or there != {"scm_manifest.json", *(entry.path for entry in manifest.files)}:
                    raise Silent(f"other files than the manifest lists: {sorted(there)} {odd}")
            else:
                with Generator.from_pretrained(archive, backend="onnxruntime") as gen:
                    gen(1, seed=1, class_labels=0)
                    assert gen.source.bundle is not None
                    manifest = gen.source.bundle.manifest
            if not name.startswith(("listed", "mode")) and manifest != right:
                raise Silent("another manifest")
        finally:
            if archive.is_dir() and not archive.is_symlink():
                archive.rmdir()
            else:
                archive.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(scratch / "cache", ignore_errors=True)
        if {path for path in Path("/tmp").iterdir() if path.name == "evil"} - before:
            raise Silent("a file outside")

    attempt(["right", "unpack"])
    attempt(["right", "open"])
    return attempt
