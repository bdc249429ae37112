"""``import``: a model that somebody else made becomes a folder that this package reads."""

from __future__ import annotations

from pathlib import Path

import click

from .common import json_option, print_json, say


@click.command(name="import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--entry", default="ema", help="Which network of an EDM-style pickle.")
@click.option(
    "--license", "licence", default="", metavar="ID", help="Licence of the weights, if the source's is other."
)
@click.option("--overwrite", is_flag=True, help="Replace what an import wrote there.")
@json_option
def import_(source: Path, out: Path, entry: str, licence: str, overwrite: bool, as_json: bool) -> None:
    """Import SOURCE: an EDM- or EDM2-style .pkl, whose weights are read while nothing in it is run.

    \b
    scm-export import edm2-img64-s-1073741-0.075.pkl -o edm2-img64-s
    """
    from scm_sdk.errors import ConfigError

    if source.is_dir():
        raise ConfigError(f"{source} is a folder, expected an EDM-style .pkl. No folder of another tool is read yet.")
    _import_pickle(source, out, entry=entry, licence=licence, overwrite=overwrite, as_json=as_json)


def _import_pickle(source: Path, out: Path, *, entry: str, licence: str, overwrite: bool, as_json: bool) -> None:
    from scm_sdk.pickles.convert import convert_pickle

    converted = convert_pickle(source, out, entry=entry, licence=licence, overwrite=overwrite)
    network = converted.network
    if as_json:
        print_json({
            "path": str(out), "entry": network.entry, "class_name": network.class_name, "arguments": network.arguments,
            "tensors": len(network.tensors), "bytes": network.nbytes, "license": converted.licence,
            "license_stated_at_import": converted.stated, "source_sha256": converted.source_sha256,
        })  # fmt: skip
    say(f"{out}: {network.class_name}, {len(network.tensors)} tensors, {network.nbytes / 1e6:.1f} MB.")
    say(converted.licence_line)
