"""rCM's flat .pt of Wan: names of the weights, a reader that executes nothing, the bundle of the command."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from helpers.few_step_fixtures import SIZES, TOKENS, make_pipeline  # noqa: E402
from scm_sdk.errors import BundleError, ConfigError, IntegrityError, ScmError  # noqa: E402
from scm_sdk.export.cli import main  # noqa: E402
from scm_sdk.model.foreign import rcm_file  # noqa: E402
from scm_sdk.model.foreign.few_step import load_few_step  # noqa: E402
from scm_sdk.model.foreign.few_step_folder import Settings  # noqa: E402
from scm_sdk.model.foreign.rcm_file import student_pipeline  # noqa: E402
from scm_sdk.pickles.torch_file import read_torch_file  # noqa: E402


def rcm_names(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of diffusers' transformer under rCM's names, written as the table of its documentation says."""
    pairs = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        (".attn1.to_out.0", ".self_attn.o"), (".attn2.to_out.0", ".cross_attn.o"), (".attn1.to_", ".self_attn."),
        (".attn2.to_", ".cross_attn."), (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."),
        (".ffn.net.0.proj", ".ffn.0"), (".ffn.net.2", ".ffn.2"), (".norm2.", ".norm3."), ("proj_out", "head.head"),
    ]  # fmt: skip
    named = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")
        named[f"net.{name}"] = tensor.flatten(1) if name == "patch_embedding.weight" else tensor
    return named


def drawn_weights() -> dict[str, Any]:
    """Weights of the student, under diffusers' names."""
    state = make_pipeline("WanPipeline").transformer.state_dict()
    draw = torch.Generator().manual_seed(5)
    return {name: torch.randn(tensor.shape, generator=draw).bfloat16() / 4 for name, tensor in state.items()}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A file with other weights than those of the folder, in bfloat16, with rCM's counters."""
    path = tmp_path / "student.pt"
    torch.save(
        rcm_names(drawn_weights()) | {"net.accum_video_sample_counter": torch.zeros((), dtype=torch.int64)}, path
    )
    return path


def test_the_students_weights_come_back_under_diffusers_names(
    student: Path, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with student_pipeline(student, flow_folders("WanPipeline"), tmp_path) as folder:
        model = load_few_step(folder, Settings(distilled=True, max_sequence_length=TOKENS, **SIZES["WanPipeline"]))
    wanted = drawn_weights()
    found = model.get_submodule("network.denoiser.module.transformer").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"], "the folder in between is removed"


@pytest.mark.slow
def test_the_command_imports_it(
    student: Path, flow_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline that it is made to is written once, whatever is in OUT."""
    made: list[Path] = []
    monkeypatch.setattr(rcm_file, "student_pipeline", lambda *paths: made.append(paths[0]) or student_pipeline(*paths))
    arguments = ["import", student, "--base", flow_folders("WanPipeline"), "-o", tmp_path / "out", "--size", "32x48"]
    arguments += ["--frames", 5, "--tokens", TOKENS, "--steps", 1, "--max-batch"]
    for count, (batch, code, expected) in enumerate([(1, 0, "MB. Next"), (1, 0, "unchanged"), (2, 6, "not empty")], 1):
        done = CliRunner().invoke(main, [*map(str, arguments), str(batch)])
        assert done.exit_code == code and expected in done.output, done.output
        assert len(made) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "student.pt"]


def test_the_command_asks_for_the_base(student: Path, flow_folders: Callable[[str], Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["import", str(student), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "expected --base" in done.output
    folder = str(flow_folders("WanPipeline"))
    done = CliRunner().invoke(main, ["import", folder, "--base", folder, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "--base" in done.output


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: {n.removeprefix("net."): t for n, t in s.items()},
            ConfigError,
            r"expected weights under net\.\*.*50",
        ),
        (lambda s: s | {"net.blocks.0.self_attn.attn_op.proj_l.weight": torch.zeros(2)}, ConfigError, "proj_l.*SLA"),
        (lambda s: s | {"net.img_emb.proj.0.weight": torch.zeros(2)}, ConfigError, "1 unknown weights, first 'net.img"),
        (lambda s: {"model": s}, ConfigError, "holds a dict, expected a dict of tensors alone"),
        (lambda s: {"net.x": 3}, ConfigError, "expected a dict of tensors alone"),
        (lambda s: {"net.x": Path("x")}, BundleError, r"the global 'pathlib.*nothing of it was used"),
    ],
)
def test_other_files_are_refused(
    student: Path,
    flow_folders: Callable[[str], Path],
    tmp_path: Path,
    change: Any,
    error: type[Exception],
    message: str,
) -> None:
    torch.save(change(torch.load(student, weights_only=True)), student)
    with (
        pytest.raises(error, match=message),
        student_pipeline(student, flow_folders("WanPipeline"), tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]


def test_a_student_of_another_size_is_refused(
    student: Path, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    state = torch.load(student, weights_only=True)
    torch.save({name: value for name, value in state.items() if ".blocks.1." not in name}, student)
    with (
        student_pipeline(student, flow_folders("WanPipeline"), tmp_path) as folder,
        pytest.raises(IntegrityError, match=r"do not fit its config: \d+ tensors differ, first 'blocks.1"),
    ):
        load_few_step(folder, Settings(distilled=True))


def test_a_base_of_another_pipeline_is_refused(
    student: Path, flow_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match="is a ZImagePipeline, expected the WanPipeline"),
        student_pipeline(student, flow_folders("ZImagePipeline"), tmp_path),
    ):
        pass


class Evil:
    """Runs code when Python's unpickler reads it."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit(99)",))


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object], kind: int = zipfile.ZIP_STORED) -> None:
    members = members_of(path)
    change(members)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    pickle.Pickler(stream, 2).dump(value)
    return stream.getvalue()


def name_of(members: dict[str, bytes], end: str) -> str:
    return next(name for name in members if name.endswith(end))


HOSTILE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "code": (
        lambda p: rewrite(p, lambda m: m.update({name_of(m, "data.pkl"): pickled(Evil())})), BundleError,
        "the global '.*exec', .*nothing of it was used",
    ),
    "compressed": (lambda p: rewrite(p, lambda m: None, zipfile.ZIP_DEFLATED), BundleError, "compressed or encrypted"),
    "no pickle": (lambda p: rewrite(p, lambda m: m.pop(name_of(m, "data.pkl"))), IntegrityError, "0 files data.pkl"),
    "storage": (lambda p: rewrite(p, lambda m: m.pop(name_of(m, "data/0"))), IntegrityError, "storage '0' has -1"),
    "short storage": (
        lambda p: rewrite(p, lambda m: m.update({name_of(m, "data/0"): b"ab"})), IntegrityError, "storage '0' has 2",
    ),
    "big-endian": (
        lambda p: rewrite(p, lambda m: m.update({name_of(m, "byteorder"): b"big"})), BundleError, "big-endian machine",
    ),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), IntegrityError, "damaged or no file of torch.save"),
    "older format": (
        lambda p: torch.save({"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False), IntegrityError,
        "torch 1.6 or later",
    ),
    "empty": (lambda p: p.write_bytes(b""), BundleError, "has 0 bytes"),
    "gone": (lambda p: p.unlink(), BundleError, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(student: Path, case: str) -> None:
    damage, error, message = HOSTILE[case]
    damage(student)
    with pytest.raises(error, match=message) as caught:
        read_torch_file(student)
    assert isinstance(caught.value, ScmError) and "\n" not in str(caught.value)


def test_every_dtype_and_a_module_state_with_versions_are_read(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype).T
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    }
    torch.save(tensors, tmp_path / "all.pt")
    found = read_torch_file(tmp_path / "all.pt")
    assert all((found[name].numpy() == tensor.float().numpy()).all() for name, tensor in tensors.items())
    module = torch.nn.Linear(2, 3)
    torch.save(module.state_dict(), tmp_path / "state.pt")  # an OrderedDict with the versions of its modules
    assert (read_torch_file(tmp_path / "state.pt")["weight"].numpy() == module.weight.detach().numpy()).all()
