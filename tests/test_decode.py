"""What an image file depicts is what the student sees, whatever the file's kind of pixel is."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, PngImagePlugin

from deit_kd import InputError
from deit_kd.data import UnreadableImage, load_image
from deit_kd.data.decode import Stamp, decoded, opened
from deit_kd.data.listing import stamps_of
from deit_kd.interfaces import Preprocessing
from deit_kd.views import evaluation_transform
from tests.helpers import MEAN, STD, write_photos
from tests.tiny_parts import folder_splits, transform


def pixels(path: Path) -> list[tuple[int, ...]]:
    image = load_image(path)
    assert image.mode == "RGB"
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    assert pixels(path) == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def test_16_bit_colour_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    row = struct.pack(">6H", 65535, 32768, 0, 0, 257, 65535)
    (tmp_path / "deep.png").write_bytes(png(2, 1, depth=16, colour=2, rows=b"\0" + row))
    assert pixels(tmp_path / "deep.png") == [(255, 128, 0), (0, 1, 255)]


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


CLEAR_RED, HALF_BLUE, GREEN = (255, 0, 0, 0), (0, 0, 255, 128), (0, 255, 0, 255)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([CLEAR_RED, HALF_BLUE, GREEN])
    assert pixels(saved(image, tmp_path / "clear.png")) == [(255, 255, 255), (127, 127, 255), (0, 255, 0)]


@pytest.mark.parametrize("transparency", [bytes([0, 255]), 0], ids=["by entry", "one colour"])
def test_a_palette_with_transparency_lies_on_white(tmp_path: Path, transparency: bytes | int) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    path = saved(image, tmp_path / "palette.png", transparency=transparency)
    assert pixels(path) == [(255, 255, 255), (0, 0, 255)]


def test_grey_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 0), (90, 255)])
    assert pixels(saved(image, tmp_path / "grey.png")) == [(255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1"])
def test_an_opaque_photo_is_what_pillow_reads(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise).convert(mode), tmp_path / "opaque.png")
    assert load_image(path).tobytes() == Image.open(path).convert("RGB").tobytes()


def test_cmyk_is_the_colour_that_is_printed(tmp_path: Path) -> None:
    colours = {"red": (0, 255, 255, 0), "white": (0, 0, 0, 0), "black": (0, 0, 0, 255)}
    seen = {}
    for name, ink in colours.items():
        path = saved(Image.new("CMYK", (16, 16), ink), tmp_path / f"{name}.jpg", quality=100)
        seen[name] = pixels(path)[0]
    for name, expected in {"red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0)}.items():
        assert np.abs(np.subtract(seen[name], expected)).max() <= 3


def turned(image: Image.Image, orientation: int, path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, path, exif=exif)


@pytest.mark.parametrize(("orientation", "top_left"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 2), (7, 3), (8, 1)])
def test_a_photo_stands_as_its_exif_says(tmp_path: Path, orientation: int, top_left: int) -> None:
    corners = Image.new("L", (2, 2))
    corners.putdata([0, 50, 100, 150])
    assert pixels(turned(corners, orientation, tmp_path / "turned.png"))[0][0] == 50 * top_left


def test_broken_exif_does_not_cost_the_photo(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 2), "blue"), tmp_path / "odd.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    assert pixels(path) == [(0, 0, 255)] * 8


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_of_an_animation_the_first_picture_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(frames[0], tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as moving:
        assert len(list(ImageSequence.Iterator(moving))) == 3
    assert pixels(path) == [(255, 0, 0)] * 16


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_a_photo_of_one_pixel_across_gives_views(tmp_path: Path, size: tuple[int, int], crop_mode: str) -> None:
    image = load_image(saved(Image.new("RGB", size, "teal"), tmp_path / "thin.png"))
    looks = evaluation_transform(Preprocessing(16, MEAN, STD, "bicubic", 0.9, crop_mode))
    for view in (looks(image), transform(erasing=0.0)(image)):
        assert view.shape == (3, 16, 16)
        assert view.isfinite().all()


BAD = {
    "zero bytes": b"",
    "text": b"no image",
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "bomb": png(30_000, 30_000, depth=8, colour=0, rows=b"\0" * 1000),
    "cut": png(64, 64, depth=8, colour=2, rows=np.random.default_rng(0).bytes(64 * 193))[:900],
    "32-bit pixels": b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.2, 0.9),
}


@pytest.mark.parametrize("content", list(BAD.values()), ids=list(BAD))
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"^\S*bad\.png: cannot be read as an image \(.+\); repair") as caught:
        load_image(tmp_path / "bad.png")
    assert "\n" not in str(caught.value)


def test_a_text_in_a_png_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(UnreadableImage):
        load_image(saved(Image.new("L", (1, 1)), tmp_path / "text.png", pnginfo=notes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", {"train": 2, "validation": 2})


def same_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: Image.new("RGB", (9, 9)).save(path), "was changed while it was in use"),
        (same_size, "was changed while it was in use"),
        (lambda path: path.write_bytes(b""), "was changed while it was in use"),
        (lambda path: path.unlink(), "was removed while it was in use"),
    ],
    ids=["another photo", "another byte", "emptied", "removed"],
)
def test_a_file_that_changes_in_use_is_never_merely_unreadable(root: Path, change: Any, said: str) -> None:
    found = folder_splits(root).train
    found.image(0)
    change(root / "train" / "bars" / "000.png")
    with pytest.raises(InputError, match=rf"bars/000\.png: {said}") as caught:
        found.image(0)
    assert not isinstance(caught.value, UnreadableImage)
    assert found.image(1).mode == "RGB"


def test_a_folder_that_disappears_is_named_and_not_its_photos(root: Path) -> None:
    found = folder_splits(root).train
    (root / "train").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"^data\.root: .*/train disappeared") as caught:
        found.image(0)
    assert not isinstance(caught.value, UnreadableImage)


def test_a_link_to_nowhere_is_unreadable_from_the_start(root: Path) -> None:
    (root / "train" / "bars" / "000.png").unlink()
    (root / "train" / "bars" / "000.png").symlink_to("nowhere")
    found = folder_splits(root).train
    with pytest.raises(UnreadableImage, match=r"bars/000\.png: cannot be read"):
        found.image(0)
    assert len(found.digest()) == 32


def test_photos_in_memory_keep_why_one_cannot_be_read(root: Path) -> None:
    (root / "train" / "dots" / "001.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage):
        folder_splits(root).train.cached("memory", torch.device("cpu"))
    kept = folder_splits(root).train.cached("memory", torch.device("cpu"), skip=True)
    with pytest.raises(UnreadableImage, match=r"dots/001\.png: cannot be read"):
        kept.image(3)
    assert kept.image(2).mode == "RGB"


def test_the_digest_knows_how_files_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_splits(root).train.digest()
    monkeypatch.setattr("deit_kd.data.photos.DECODING", 3)
    assert folder_splits(root).train.digest() != before


def test_a_stamp_is_what_was_there(root: Path) -> None:
    path = root / "train" / "bars" / "000.png"
    assert stamps_of([str(path)]).tolist() == [[path.stat().st_size, path.stat().st_mtime_ns]]
    with opened(path, Stamp(path.stat().st_size, path.stat().st_mtime_ns)) as file:
        assert decoded(file, "").mode == "RGB"
