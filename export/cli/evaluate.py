"""``evaluate``: image quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import TerminalEvents, json_option, make_table, print_json, print_table, say
from .located import model_argument
from .names import BACKEND_OR_AUTO, PRECISION_OR_AUTO, OutputPath

if TYPE_CHECKING:
    from scm_sdk.bundle.bundle import Bundle
    from scm_sdk.evaluate.quality.held_out import HeldOut
    from scm_sdk.evaluate.quality.nets import FeatureNet
    from scm_sdk.evaluate.quality.sampling import Samples
    from scm_sdk.evaluate.quality.scoring import Score


@click.command()
@model_argument("model", one_size=True)
@click.option(
    "--steps", multiple=True, type=click.IntRange(1), default=(1, 2), help="Number of network calls; may be repeated."
)
@click.option(
    "--teacher-steps", type=click.IntRange(2), help="Number of second-order solver steps, if MODEL is a teacher."
)
@click.option(
    "--guidance-scale",
    type=click.FloatRange(0, min_open=True),
    help="Guidance scale of a teacher, which then takes twice the network calls.",
)
@click.option("--num-images", type=click.IntRange(64), default=10_000, help="Number of generated images.")
@click.option("--data", metavar="SOURCE", help="Data, as for train; default: the training data of MODEL.")
@click.option("--label", metavar="COLUMN", help="Label column; '' for none; default: that of MODEL's training.")
@click.option(
    "--rows",
    nargs=2,
    type=click.IntRange(0),
    help="Held-out rows, FIRST to LAST - 1; default: those after MODEL's training rows.",
)
@click.option(
    "--real-rows",
    nargs=2,
    type=click.IntRange(0),
    help="Rows of real images that are scored for comparison; default: MODEL's training rows.",
)
@click.option(
    "--feature-net",
    default="effnet-lite0",
    help="Feature network; or inception-ts:PATH or dinov2-ts:PATH, a TorchScript file, which is executable code.",
)
@click.option(
    "--ref",
    "stats",
    type=click.Path(path_type=Path),
    help="Statistics (.npz with mu and sigma, as EDM's) instead of held-out rows; gives only a Fréchet distance.",
)
@click.option("--save-ref", type=OutputPath(), help="File for the statistics of the held-out rows.")
@click.option("--backend", type=BACKEND_OR_AUTO, default="auto", help="Library that runs the model.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=PRECISION_OR_AUTO,
    default=("auto",),
    help="Precision to run; may be repeated: each is also compared with the first on the same seeds.",
)
@click.option(
    "--max-kid-delta",
    type=float,
    help="Largest increase of KID over the first precision; exit 3 unless it is below with 95 % confidence.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Folder for images and features, from which an interrupted run continues; default: the user's cache.",
)
@click.option("-o", "--out", type=OutputPath(), help="JSON file, updated after each score.")
@click.option("--keep", is_flag=True, help="Store the scores in the bundle MODEL; its report shows them.")
@json_option
def evaluate(
    model: Path, steps: tuple[int, ...], teacher_steps: int | None, guidance_scale: float | None,
    num_images: int, data: str | None, label: str | None,
    rows: tuple[int, int] | None, real_rows: tuple[int, int] | None,
    feature_net: str, stats: Path | None, save_ref: Path | None,
    backend: str, precisions: tuple[str, ...], max_kid_delta: float | None, cache: Path | None, out: Path | None,
    keep: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure quality: Fréchet distance, KID, precision, recall.

    Generated images are compared with real ones that were held out from training.

    \b
    scm-export evaluate avatars
    scm-export evaluate avatars --precision fp32 --precision fp16 --precision int8 --max-kid-delta 0.01
    scm-export evaluate runs/teacher --teacher-steps 18
    scm-export evaluate cifar10 --feature-net inception-ts:inception-2015-12-05.pt --ref cifar10-32x32.npz
    """
    from scm_sdk._util.cache_dir import temporary_folder, writable_folder
    from scm_sdk._util.files import check_writable
    from scm_sdk.bundle.edit import open_to_extend
    from scm_sdk.evaluate.quality.held_out import load_held_out
    from scm_sdk.evaluate.quality.nets import open_net
    from scm_sdk.evaluate.quality.sampling import sample_diffusion, sample_student
    from scm_sdk.evaluate.quality.scoring import score
    from scm_sdk.inference.sources import open_source

    if max_kid_delta is not None and len(precisions) < 2:
        raise click.UsageError(
            "--max-kid-delta compares with the first --precision, expected two or more, "
            "for example --precision fp32 --precision int8."
        )
    if stats is not None and (max_kid_delta is not None or save_ref is not None):
        raise click.UsageError(
            "--ref holds statistics, expected held-out rows for options that compare or save images."
        )
    if teacher_steps and (precisions != ("auto",) or backend != "auto"):
        raise click.UsageError(
            "a teacher runs in PyTorch in fp32 only, expected no --precision and no --backend with --teacher-steps."
        )
    source = open_source(model)
    if keep and source.bundle is None:
        raise click.UsageError(f"{model} is not a bundle, which --keep needs to store the scores. Use --out FILE.")
    bundle = open_to_extend(model) if keep else None
    for file in filter(None, (out, save_ref)):
        check_writable(file)
    counts = (1,) if teacher_steps else steps
    net = open_net(feature_net)
    from scm_sdk.train.record import recorded_data  # needs PyTorch; open_net has raised if it is absent

    real = load_held_out(
        source.spec(counts[0], unrolled=True), net,
        source=data, label=label, reference_rows=rows, real_rows=real_rows, stats=stats,
        trained_on=recorded_data(source.path, source.provenance),
    )  # fmt: skip
    say(f"data: {real.about}")
    cache = cache or writable_folder("evaluate", purpose="samples are drawn again next time") or temporary_folder()
    if not teacher_steps:
        _open_each(model, counts, backend, precisions)
    if save_ref is not None:
        _save_reference(save_ref, real, net, cache)

    def draw(count: int, precision: str) -> Samples:
        with TerminalEvents() as events:
            events.stage("sample")
            if teacher_steps:
                return sample_diffusion(
                    model, num_images, num_steps=teacher_steps, guidance_scale=guidance_scale or 1.0, cache=cache,
                    events=events,
                )  # fmt: skip
            return sample_student(
                model, num_images, num_inference_steps=count, backend=backend, precision=precision,
                guidance_scale=guidance_scale, cache=cache, events=events,
            )  # fmt: skip

    scores: list[Score] = []
    for count in counts:
        first: Samples | None = None
        for precision in precisions:
            samples = draw(count, precision)
            with TerminalEvents() as events:
                beside = None if stats else first
                scores.append(score(samples, real, net=net, beside=beside, cache=cache, events=events))
            say(f"{scores[-1].sampler}: {scores[-1].quality.metric} {scores[-1].quality.fd:.2f}")
            if out is not None:
                _write(out, scores)
            first = first or samples
    if as_json:
        print_json([each.to_dict() for each in scores])
    else:
        _print(scores)
    if bundle is not None:
        _keep(bundle, scores)
    if max_kid_delta is not None:
        for each in scores:
            each.raise_if_worse(max_kid_delta)


def _open_each(model: Path, counts: tuple[int, ...], backend: str, precisions: tuple[str, ...]) -> None:
    """Open everything once, so that a missing backend is an error before hours of sampling."""
    from scm_sdk.inference.generator import Generator

    for count in counts:
        for precision in precisions:
            Generator.from_pretrained(
                model, backend=backend, precision=precision, num_inference_steps=count, verify="none"
            ).close()


def _save_reference(path: Path, real: HeldOut, net: FeatureNet, cache: Path) -> None:
    from scm_sdk.evaluate.quality.distances import FeatureStats, feature_stats
    from scm_sdk.evaluate.quality.features import cached_features
    from scm_sdk.evaluate.quality.reference_stats import write_stats

    assert not isinstance(real.reference, FeatureStats), "refused with --ref"
    features = cached_features(real.reference, cache, net=net)
    write_stats(path, feature_stats(features), net, real.reference.shape[1:])
    say(f"wrote {path}: {net.name} of {len(features)} pictures")


def _write(path: Path, scores: list[Score]) -> None:
    import json

    from scm_sdk._util.files import atomic_write_bytes

    atomic_write_bytes(path, json.dumps([each.to_dict() for each in scores], indent=2).encode() + b"\n")


def _keep(bundle: Bundle, scores: list[Score]) -> None:
    from scm_sdk.bundle.edit import extend_bundle
    from scm_sdk.bundle.scores import SCORES_PATH

    with extend_bundle(bundle) as draft:
        draft.sources |= {artifact.path for artifact in bundle.artifacts()}
        _write(draft.path(SCORES_PATH), scores)
    say(f"kept in {bundle.path}/{SCORES_PATH}. Next: scm-export report {bundle.path}")


def _print(scores: list[Score]) -> None:
    quality = scores[0].quality
    table = make_table(
        "sampler", "calls", quality.metric, "real vs real", "KID x1e3 (95 %)", "KID over the first",
        "precision", "recall", "labels (real)", "palette",
        title=f"{quality.num_generated} pictures against {quality.num_reference or 'statistics of'} held-out ones; "
        f"features by weights {quality.weights_sha256[:12]}",
    )  # fmt: skip
    for each in scores:
        q = each.quality
        table.add_row(
            each.sampler, str(each.network_calls), f"{q.fd:.1f}", "-" if q.fd_floor is None else f"{q.fd_floor:.1f}",
            _interval(q.kid, q.kid_interval, ".1f"), _interval(q.kid_delta, q.kid_delta_interval, "+.2f"),
            _share(q.precision), _share(q.recall),
            "-" if each.labels is None else f"{each.labels.accuracy:.1%} ({_share(each.labels_real)})",
            _share(each.palette),
        )  # fmt: skip
    print_table(table)


def _interval(value: float | None, interval: tuple[float, float] | None, form: str) -> str:
    if value is None or interval is None:
        return "-"
    number, low, high = (format(each * 1e3, form) for each in (value, *interval))
    return f"{number} ({low}..{high})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
