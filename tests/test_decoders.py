"""torchcodec in Pillow's place: the same photos upright, in RGB and in their size, or Pillow itself."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.data import UnreadableImage, decoder_named, one_split
from deit_kd.data.decode import decoded
from deit_kd.interfaces import InputError
from deit_kd.runs.photos import build_splits
from deit_kd.runs.viewing import build_training_loader
from deit_kd.teaching.fit import teacher_folder
from tests.helpers import CLASSES, ONE_PROCESS, heads_in, records, refused, tiny

XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6</tiff:Orientation>
</rdf:Description></rdf:RDF></x:xmpmeta>"""
MEAN_DIFFERENCE = 1.0  # of 255 levels, on average over a photo; 0 with the libraries that this was written with


@pytest.fixture(scope="module")
def torchcodec() -> Any:
    """The other decoder."""
    pytest.importorskip("torchcodec")
    return decoder_named("torchcodec")


def scene(size: tuple[int, int] = (53, 37)) -> Image.Image:
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = np.stack([128 + 100 * np.sin(x / 9 + channel) * np.cos(y / 7) for channel in range(3)], axis=-1)
    return Image.fromarray(waves.astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(scene(), exif=exif)


def deep(kind: str) -> bytes:
    return saved(Image.fromarray(np.linspace(0, 65535, 35 * 50).reshape(35, 50).astype(np.uint16)), kind)


CLEAR = scene().convert("RGBA")
CLEAR.putalpha(Image.linear_gradient("L").resize(CLEAR.size))
FILES = {
    "baseline": saved(scene()),
    "progressive": saved(scene(), progressive=True),
    "all chroma": saved(scene(), subsampling=0, quality=95),
    "4:2:2": saved(scene(), subsampling=1),
    "poor": saved(scene(), quality=5),
    "RGB in the file": saved(scene(), keep_rgb=True),
    "grey": saved(scene().convert("L")),
    "CMYK": saved(scene().convert("CMYK")),
    "one pixel": saved(scene((1, 1))),
    "thin": saved(scene((1, 90))),
    "restart markers": saved(scene(), restart_marker_blocks=2),
    "bytes after the end": saved(scene()) + b"more",
    "several pictures": saved(scene(), "MPO", save_all=True, append_images=[scene().rotate(90)]),
    **{f"orientation {value}": turned(value) for value in range(10)},
    "orientation in XMP": saved(scene(), xmp=XMP),
    "orientation in XMP of a square": saved(scene((40, 40)), xmp=XMP),
    "broken EXIF": saved(scene(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage"),
    "16-bit PNG": deep("PNG"),
    "16-bit TIFF": deep("TIFF"),
    "PNG": saved(scene(), "PNG"),
    "transparent PNG": saved(CLEAR, "PNG"),
    "GIF": saved(scene(), "GIF"),
    "WebP": saved(scene(), "WEBP"),
    "BMP": saved(scene(), "BMP"),
}
WHOLE = FILES["baseline"]
BAD = {
    "empty": b"",
    "text": b"no image",
    "marker alone": b"\xff\xd8\xff",
    "half": WHOLE[: len(WHOLE) // 2],
    "without its end": WHOLE[:-2],
    "noise": WHOLE[:-200] + np.random.default_rng(0).bytes(200),
    "another length of a table": WHOLE.replace(b"\xff\xc4\x00\x1f", b"\xff\xc4\x00\x2f", 1),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", FILES)
def test_an_image_is_upright_in_rgb_and_as_large_as_pillows_and_looks_alike(kind: str, torchcodec: Any) -> None:
    expected = np.asarray(decoded(io.BytesIO(FILES[kind]), kind))
    image = torchcodec.image(io.BytesIO(FILES[kind]), kind)
    array = torchcodec.array(io.BytesIO(FILES[kind]), kind)
    assert (image.mode, array.dtype, array.shape) == ("RGB", np.uint8, expected.shape)
    np.testing.assert_array_equal(np.asarray(image), array)
    assert np.abs(array.astype(int) - expected).mean() <= MEAN_DIFFERENCE


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "CMYK", "orientation 6"])
def test_torchcodec_itself_decodes_jpeg(kind: str, torchcodec: Any) -> None:
    assert torchcodec._pixels(bytearray(FILES[kind])) is not None


@pytest.mark.parametrize("kind", ["orientation in XMP", "16-bit PNG", "transparent PNG", "GIF", "WebP"])
def test_pillow_decodes_what_torchcodec_would_get_wrong(
    kind: str, torchcodec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchcodec, "_decode_jpeg", lambda _: pytest.fail("torchcodec was asked"))
    expected = decoded(io.BytesIO(FILES[kind]), kind)
    assert torchcodec.image(io.BytesIO(FILES[kind]), kind).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", BAD)
def test_what_pillow_refuses_is_refused_in_its_words(kind: str, torchcodec: Any) -> None:
    def said(decode: Callable[[io.BytesIO, str], Image.Image]) -> str | None:
        try:
            decode(io.BytesIO(BAD[kind]), "a.jpg")
        except UnreadableImage as error:
            return str(error)
        return None

    assert said(torchcodec.image) == said(decoded)


def test_a_bomb_is_refused_before_it_is_decoded(torchcodec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # the scene has 1,961, more than twice that
    monkeypatch.setattr(torchcodec, "_decode_jpeg", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        torchcodec.array(io.BytesIO(WHOLE), "a.jpg")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that torchcodec decodes itself."""
    root = tmp_path_factory.mktemp("jpegs")
    for split, count in (("train", 8), ("validation", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(np.roll(np.asarray(scene()), 3 * index + label, axis=2 - index % 2))
                image.save(root / split / name / f"{index}.jpg")
    return root


def test_photos_in_memory_are_those_that_are_decoded_each_time(jpegs: Path, torchcodec: Any) -> None:
    photos = replace(one_split(name="folder", root=str(jpegs), split="train"), decoder=torchcodec)
    kept = photos.cached("memory", torch.device("cpu"))
    for index in range(len(photos)):
        assert photos.array(index).tobytes() == kept.array(index).tobytes() == photos.image(index).tobytes()


def test_training_views_are_alike_and_validation_is_left_to_pillow(jpegs: Path, torchcodec: Any) -> None:
    views = []
    for decoder in ("pillow", "torchcodec"):
        config, _ = parse_config(tiny(jpegs, None, data__decoder=decoder))
        splits = build_splits(config)
        assert splits.validation.decoder.version == "pillow"
        loader = build_training_loader(config, splits.train, ONE_PROCESS)
        views.append(torch.cat([batch.images for batch in loader.batches(0)]))
    torch.testing.assert_close(*views, atol=0.1, rtol=0)


@pytest.fixture(scope="module")
def run(jpegs: Path, torchcodec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose photos torchcodec decoded, in two workers."""
    home = tmp_path_factory.mktemp("torchcodec") / "run"
    assert main(["train", *tiny(jpegs, home, data__decoder="torchcodec", data__workers=2, train__epochs=2)]) == 0
    return home


def test_a_run_resumes_with_its_decoder_and_no_other(
    run: Path, jpegs: Path, torchcodec: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, scored = records(run), heads_in(run)
    (run / "heads.json").unlink()
    sorted((run / "checkpoints").glob("step-*"))[-1].unlink()
    arguments = ["train", *tiny(jpegs, run, data__decoder="torchcodec", train__epochs=2), "--resume", "auto"]
    said = refused([*arguments, "--data.decoder", "pillow"], capsys)
    assert f"(data.decoder: '{torchcodec.version}' in the run, 'pillow' here)" in said
    monkeypatch.setattr("torchcodec.__version__", "99.0")
    said = refused(arguments, capsys)
    assert f"(data.decoder: '{torchcodec.version}' in the run, 'torchcodec 99.0' here)" in said
    monkeypatch.undo()
    assert main(arguments) == 0
    assert (records(run), heads_in(run)) == (before, scored)


def test_a_teacher_is_fitted_anew_for_another_decoder_or_version(
    jpegs: Path, torchcodec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = {"teacher__random_weights": None, "teacher__fit__epochs": 1}
    configs = [parse_config(tiny(jpegs, None, **fit, data__decoder=name))[0] for name in ("pillow", "torchcodec")]
    splits = build_splits(configs[0])
    folders = {teacher_folder(config, splits) for config in configs}
    monkeypatch.setattr("torchcodec.__version__", "99.0")
    assert len(folders | {teacher_folder(configs[1], splits)}) == 3


def test_a_store_is_for_its_decoder_until_a_check_has_passed(
    jpegs: Path, torchcodec: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    arguments = tiny(jpegs, tmp_path / "run")
    other = [*arguments, "--data.decoder", "torchcodec"]
    assert main(["store", "build", *arguments, "--store", store]) == 0
    said = refused(["train", *other, "--teacher.store", store], capsys)
    assert f"data.decoder: 'pillow' in the store, '{torchcodec.version}' here" in said
    assert main(["store", "check", store, *other, "--samples", "12"]) == 0
    assert main(["train", *other, "--teacher.store", store]) == 0


def test_a_decoder_that_is_not_installed_is_named_with_the_pip_line(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for verb in (["train"], ["train", "--dry-run"], ["store", "build", "--store", str(tmp_path / "store")]):
        said = refused([*verb, *tiny(photos_root, tmp_path / "run", data__decoder="torchcodec")], capsys)
        assert said.startswith("error: data.decoder: torchcodec needs torchcodec 0.17 or newer (")
        assert said.endswith('; pip install "deit-kd[torchcodec]"')
    assert list(tmp_path.iterdir()) == []


def test_a_library_of_another_age_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchcodec")
    monkeypatch.delattr("torchcodec.decoders.decode_jpeg")
    with pytest.raises(InputError, match=r"needs torchcodec 0\.17 or newer \(cannot import name 'decode_jpeg'"):
        decoder_named("torchcodec")
