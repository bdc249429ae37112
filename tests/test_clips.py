"""Clips: lists of frames, and files that other libraries read back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scm_sdk.errors import BackendUnavailable, ConfigError, ShapeError
from scm_sdk.images import clips_to_pil, clips_to_uint8, save_clip
from scm_sdk.inference.output import GenerationInfo, GeneratorOutput, convert


@pytest.fixture
def clip() -> np.ndarray:
    """(T, H, W, C): a bright square that moves to the right over a dark gradient."""
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[..., 2] = np.linspace(0, 90, 48).astype(np.uint8)
    for i in range(5):
        frames[i, 8:24, 8 * i : 8 * i + 12] = (240, 160, 40)
    return frames


def output_of(images: object) -> GeneratorOutput:
    info = GenerationInfo.__new__(GenerationInfo)
    return GeneratorOutput(images=images, seeds=(), class_labels=None, info=info)


def test_frames_are_lists_of_images_in_order(clip: np.ndarray) -> None:
    raw = (np.stack([clip, clip[::-1]]).transpose(0, 4, 1, 2, 3) / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(clips_to_uint8(raw, (-1, 1)), np.stack([clip, clip[::-1]]))
    forward, backward = convert(raw, (-1.0, 1.0), "frames")
    assert [len(forward), forward[0].size] == [5, (48, 32)]
    np.testing.assert_array_equal(np.asarray(forward[4]), clip[4])
    np.testing.assert_array_equal(np.asarray(backward[0]), clip[4])
    (gray,) = clips_to_pil(raw[:1, :1], (-1, 1))
    assert gray[0].mode == "L"
    assert convert(raw, (-1.0, 1.0), "np").shape == (2, 5, 32, 48, 3)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_pillow_reads_the_frames_back(clip: np.ndarray, suffix: str, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / f"clip{suffix}", fps=20)
    with Image.open(tmp_path / f"clip{suffix}") as read:
        assert (read.n_frames, read.size, read.info["loop"]) == (5, (48, 32), 0)
        for i, frame in enumerate(clip):
            read.seek(i)
            assert np.abs(np.asarray(read.convert("RGB"), int) - frame).mean() < 6
            assert read.info["duration"] == 50


def test_pyav_reads_the_frames_back(clip: np.ndarray, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    save_clip(clip, tmp_path / "clip.mp4", fps=16)
    with av.open(str(tmp_path / "clip.mp4")) as read:
        stream = read.streams.video[0]
        assert float(stream.average_rate) == 16 and stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in read.decode(stream)]
    assert len(frames) == 5
    assert max(np.abs(found.astype(int) - frame).mean() for found, frame in zip(frames, clip, strict=True)) < 12
    with pytest.raises(ShapeError, match="frames are 31x48, expected an even height"):
        save_clip(clip[:, 1:], tmp_path / "odd.mp4")


def test_mp4_names_the_missing_library(clip: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(BackendUnavailable, match="writing an MP4 file needs av"):
        save_clip(clip, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_an_output_writes_one_file_for_each_clip(clip: np.ndarray, tmp_path: Path) -> None:
    arrays = np.stack([clip, clip[::-1]]).astype(np.float32) / 255
    files = output_of(arrays).save(tmp_path / "clip.gif")
    assert [file.name for file in files] == ["clip-0.gif", "clip-1.gif"] and all(file.is_file() for file in files)
    images = [[Image.fromarray(frame) for frame in clip]]
    assert output_of(images).save(tmp_path / "one.webp", fps=8) == (tmp_path / "one.webp",)
    gray = [[Image.fromarray(frame[..., 0]) for frame in clip]]
    output_of(gray).save(tmp_path / "gray.gif")
    for other in ([Image.fromarray(clip[0])], arrays[0], "x"):
        with pytest.raises(ConfigError, match=r"holds no clips, expected .*'frames' or 'np'"):
            output_of(other).save(tmp_path / "no.gif")


def test_wrong_clips_are_refused(clip: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip\.avi ends in '\.avi', expected one of \.gif, \.webp, \.mp4"):
        save_clip(clip, tmp_path / "clip.avi")
    for fps in (0, -1, 1000, float("nan")):
        with pytest.raises(ConfigError, match=r"fps is .*, expected a number above 0"):
            save_clip(clip, tmp_path / "clip.gif", fps=fps)
    with pytest.raises(ShapeError, match=r"clip is \(32, 48, 3\) uint8, expected \(T, H, W, C\)"):
        save_clip(clip[0], tmp_path / "clip.gif")
    with pytest.raises(ShapeError, match=r"clips have shape \(1, 3, 8, 8\), expected \(B, C, T, H, W\)"):
        clips_to_uint8(np.zeros((1, 3, 8, 8), np.float32), (-1, 1))
    with pytest.raises(ConfigError, match="NaN or infinity"):
        clips_to_uint8(np.full((1, 3, 2, 8, 8), np.nan, np.float32), (-1, 1))
    with pytest.raises(ShapeError, match="for clips 'frames'"):
        convert(np.zeros((1, 3, 2, 8, 8), np.float32), (-1.0, 1.0), "pil")
    assert not list(tmp_path.iterdir()), "nothing was written"
