"""``web``: a static site that runs a bundle in the visitor's browser."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

import click

from .common import json_option, make_table, print_json, print_table, say
from .libraries import requires
from .located import model_argument
from .names import STEPS, OutputPath, one_of


@click.command()
@requires("onnx_ir")
@model_argument("bundle", one_size=True)
@click.option("-o", "--out", default=Path("site"), type=OutputPath(), help="Folder for the site.")
@click.option("--precision", "precisions", multiple=True, type=one_of("precision", "fp32", "fp16"),
              help="Precision of the graphs; may be repeated; fp32 and fp16 where the bundle has them.")  # fmt: skip
@click.option("--steps", multiple=True, type=STEPS, help="Number of network calls; may be repeated; all when absent.")
@click.option("--device", type=one_of("device", "all", "wasm", "webgpu"), default="all",
              help="Device of the visitors: its runtime is copied.")  # fmt: skip
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Text file with one prompt per line, encoded for visitors of a text-to-image model.")  # fmt: skip
@click.option("--onnxruntime-web", "package", type=click.Path(exists=True, path_type=Path), metavar="DIR|TGZ",
              help="The npm package onnxruntime-web; from the cache, or fetched with npm, when absent.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the site in OUT.")
@click.option("--serve", is_flag=True, help="Serve the site on this machine until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="TCP port of --serve; 0 is a free one.")
@json_option
def web(
    bundle: Path, out: Path, precisions: tuple[Literal["fp32", "fp16"], ...], steps: tuple[int, ...],
    device: Literal["all", "wasm", "webgpu"], prompts: Path | None, package: Path | None, overwrite: bool, serve: bool,
    port: int, as_json: bool,
) -> None:  # fmt: skip
    """Write a static site that runs a bundle in the browser.

    A seed makes the same picture there as in Python, and the page proves it: it makes the bundle's recorded samples
    and shows the difference. The site needs no network but its own server.

    \b
    scm-export web avatars -o site --serve
    scm-export web avatars -o site --device wasm --precision fp16
    scm-export web sana -o site --prompts prompts.txt
    """
    from ..edge.site import write_site
    from ..edge.site_server import open_server

    report = write_site(
        bundle,
        out,
        devices=("wasm", "webgpu") if device == "all" else (device,),
        precisions=precisions or None,
        steps=steps or None,
        prompts=prompts,
        onnxruntime_web=package,
        overwrite=overwrite,
    )
    for note in report.notes:
        say(f"note: {note}")
    say(f"{out}: {report.bytes / 1e6:.1f} MB; {out}/scm_site.json has sha256 {report.manifest_sha256}")
    if as_json:
        print_json({
            "out": str(out), "bytes": report.bytes, "manifest_sha256": report.manifest_sha256,
            "downloads": [vars(each) for each in report.downloads], "notes": list(report.notes),
        })  # fmt: skip
    else:
        table = make_table("device", "precision", "steps", "visitor fetches, MB")
        for each in report.downloads:
            table.add_row(each.device, each.precision, str(each.num_inference_steps), f"{each.bytes / 1e6:.1f}")
        print_table(table)
    if serve:
        with open_server(out, port) as server:
            say(f"http://localhost:{server.server_address[1]}/  (Ctrl-C ends it)")
            with suppress(KeyboardInterrupt):  # SIGTERM, too: the usual end
                server.serve_forever()
