"""From data units to pictures and files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from scm_sdk.errors import ConfigError, ScmError, ShapeError
from scm_sdk.images import make_grid, save_png, to_pil, to_uint8

PICTURES = hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3])))
RANGES = st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0), (-3.5, 0.25)])


@given(PICTURES, RANGES)
def test_every_level_survives_the_way_to_data_units_and_back(
    pictures: np.ndarray, value_range: tuple[float, float]
) -> None:
    low, high = value_range
    images = (pictures.transpose(0, 3, 1, 2) / 255 * (high - low) + low).astype(np.float32)
    np.testing.assert_array_equal(to_uint8(images, value_range), pictures)


def test_golden_levels() -> None:
    values = np.array([-9, -1, -0.9961, -0.9960, 0, 0.5, 0.9961, 1, 9], np.float32)
    levels = to_uint8(values.reshape(1, 1, 1, -1), (-1, 1))
    assert levels.shape == (1, 1, 9, 1)
    assert levels.ravel().tolist() == [0, 0, 0, 1, 128, 191, 255, 255, 255]


@given(hnp.arrays(np.float32, (2, 3, 2, 2), elements=st.floats(-4, 4, width=32)), RANGES)
def test_agrees_with_the_formula_and_keeps_the_input(images: np.ndarray, value_range: tuple[float, float]) -> None:
    before = images.copy()
    low, high = value_range
    exact = np.clip((images.astype(np.float64) - low) / (high - low) * 255, 0, 255)
    levels = to_uint8(images, value_range)
    assert np.abs(levels - exact.transpose(0, 2, 3, 1)).max() <= 0.5 + 1e-9
    assert levels.flags.c_contiguous and levels.flags.owndata
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_by_sample(bad: float) -> None:
    images = np.zeros((4, 3, 2, 2), np.float32)
    images[2, 1, 0, 1] = images[3, 0, 0, 0] = bad
    with pytest.raises(ConfigError, match=r"sample 2 holds NaN or infinity \(2 of 4 samples do\).*validate"):
        to_uint8(images, (-1, 1))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 3), (1, 3, 0, 4), (1, 1, 1, 4, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"images have shape \(.*expected \(B, C, H, W\)"):
        to_uint8(np.zeros(shape, np.float32), (-1, 1))


def test_wrong_dtype_and_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="images are uint8, expected floating point"):
        to_uint8(np.zeros((1, 3, 2, 2), np.uint8), (-1, 1))
    for value_range in ((1.0, 1.0), (1.0, -1.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(ConfigError, match=r"value_range is .*expected two finite numbers"):
            to_uint8(np.zeros((1, 3, 2, 2), np.float32), value_range)


def test_no_samples_give_no_pictures() -> None:
    assert to_uint8(np.zeros((0, 3, 2, 5), np.float32), (-1, 1)).shape == (0, 2, 5, 3)


@given(PICTURES)
def test_pil_images_hold_the_same_pixels(pictures: np.ndarray) -> None:
    images = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    made = to_pil(images, (0, 255))
    assert {image.mode for image in made} == {"L" if pictures.shape[-1] == 1 else "RGB"}
    for image, picture in zip(made, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)


@given(PICTURES, st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_each_picture_lies_where_it_should(pictures: np.ndarray, columns: int, scale: int, padding: int) -> None:
    count, height, width, channels = pictures.shape
    grid = make_grid(pictures, columns, scale, padding=padding)
    rows = -(-count // columns)
    cell_height, cell_width = height * scale + padding, width * scale + padding
    assert grid.shape == (rows * cell_height - padding, columns * cell_width - padding, channels)
    left = np.ones(grid.shape[:2], bool)
    for i, picture in enumerate(pictures):
        top, side = i // columns * cell_height, i % columns * cell_width
        cell = grid[top : top + height * scale, side : side + width * scale]
        np.testing.assert_array_equal(cell[::scale, ::scale], picture)
        np.testing.assert_array_equal(cell, np.kron(picture, np.ones((scale, scale, 1), np.uint8)))
        left[top : top + height * scale, side : side + width * scale] = False
    assert (grid[left] == 255).all()


def test_grids_of_nothing_or_with_odd_numbers_are_refused() -> None:
    good = np.zeros((2, 3, 3, 3), np.uint8)
    refused: list[Any] = [good[:0], good[0], good.astype(np.float32)]
    for bad in refused:
        with pytest.raises(ShapeError, match=r"pictures are .*expected \(B, H, W, C\) uint8"):
            make_grid(bad, 2)
    for columns, scale, padding in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ConfigError, match="expected columns and scale of 1 or more"):
            make_grid(good, columns, scale, padding=padding)


@settings(max_examples=20)  # each waits for the disk
@given(PICTURES)
def test_png_files_hold_the_same_pixels(tmp_path_factory: pytest.TempPathFactory, pictures: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "x.png"
    save_png(pictures[0], path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image).reshape(pictures[0].shape), pictures[0])


def test_png_refuses_other_arrays_and_targets(tmp_path: Path) -> None:
    refused: list[Any] = [np.zeros((3, 3), np.uint8), np.zeros((3, 3, 2), np.uint8), np.zeros((3, 3, 3), np.float32)]
    for bad in refused:
        with pytest.raises(ShapeError, match=r"picture is .*expected \(H, W, C\) uint8"):
            save_png(bad, tmp_path / "x.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ScmError, match=r"x.png cannot be written"):
        save_png(np.zeros((3, 3, 3), np.uint8), tmp_path / "file" / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
