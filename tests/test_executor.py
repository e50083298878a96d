"""The device executor: Pillow's pixels by other means, the same bits for any batch, and no wait for the device."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses import FakeTensorMode
from torchvision.transforms import Normalize

from deit_kd.views import Operation, PhotoBuffer, Rows
from deit_kd.views import executor as executor_module
from deit_kd.views.pixels import ToNormalised
from tests.executed import (
    MEAN,
    STD,
    buffer,
    by_pillow,
    drawn,
    executor,
    levels,
    operated,
    photos,
    plain,
    view_ids,
)
from tests.helpers import REPOSITORY, no_waiting

ARGUMENTS = {
    Operation.SHEAR_X: (-0.9, 0.9),
    Operation.SHEAR_Y: (-0.9, 0.9),
    Operation.TRANSLATE_X: (-30, 30),
    Operation.TRANSLATE_Y: (-30, 30),
    Operation.ROTATE: (-180, 180),
    Operation.AUTO_CONTRAST: (0, 0),
    Operation.EQUALIZE: (0, 0),
    Operation.INVERT: (0, 0),
    Operation.POSTERIZE: (1, 8),
    Operation.SOLARIZE: (0, 256),
    Operation.SOLARIZE_ADD: (0, 128),
    Operation.BRIGHTNESS: (0, 2),
    Operation.CONTRAST: (0, 2),
    Operation.COLOR: (0, 2),
    Operation.SHARPNESS: (0, 2),
    Operation.BLUR: (0.1, 2),
}
ONE_LEVEL_OFF = {*list(Operation)[Operation.SHEAR_X : Operation.ROTATE + 1]}  # by rounding; the others are exact
NO_TIE = 1e-4 * 2**0.5  # away from round numbers, with which a place may lie on the very edge, inside or outside


def squares(size: int) -> tuple[np.ndarray, ...]:
    """Return the photos as squares, which a crop of everything leaves alone."""
    return tuple(np.asarray(Image.fromarray(photo).resize((size, size))) for photo in photos())


def operations(count: int, operation: Operation, arguments: np.ndarray, bicubic: np.ndarray, size: int) -> Rows:
    """Return rows that show all of their photos, after one operation."""
    nothing = np.zeros((count, 4), np.int32)
    return Rows(
        view_ids=view_ids(count),
        crop=np.tile(np.array((0, 0, size, size), np.int32), (count, 1)),
        resize_bicubic=np.zeros(count, bool),
        flip=np.zeros(count, bool),
        operations=np.full((count, 1), operation, np.int32),
        arguments=arguments[:, None],
        operation_bicubic=bicubic[:, None],
        erasing=nothing,
        noise_key=np.zeros((count, 2), np.int64),
        share=np.ones(count),
        mixing_box=nothing,
    )


@pytest.mark.parametrize("operation", ARGUMENTS, ids=lambda operation: operation.name.lower())
@settings(deadline=None, max_examples=8, derandomize=True)
@given(data=st.data())
def test_an_operation_is_pillows(operation: Operation, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 32))
    count = len(photos())
    low, high = ARGUMENTS[operation]
    given_arguments = np.array(data.draw(st.lists(st.floats(low, high), min_size=count, max_size=count)))
    if operation in (Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD):
        given_arguments = given_arguments.round()
    if operation in (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.SHARPNESS):
        given_arguments = np.rint(given_arguments * 2**14) / 2**14  # as `draw` gives them
    if operation in ONE_LEVEL_OFF:
        given_arguments += NO_TIE * (given_arguments != 0)
    bicubic = np.arange(count) % 2 == data.draw(st.integers(0, 1))
    images = squares(size)
    rows = operations(count, operation, given_arguments, bicubic, size)
    made = levels(executor(image_size=size)(buffer(images), np.arange(count), rows))
    for view, image in enumerate(images):
        expected = operated(Image.fromarray(image), operation, given_arguments[view], bicubic[view])
        difference = abs(np.asarray(expected).transpose(2, 0, 1).astype(int) - made[view])
        assert difference.max() <= (operation in ONE_LEVEL_OFF)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.sampled_from(["bicubic", "bilinear", "random"]), st.integers(1, 70), st.floats(0.05, 1.0), st.floats(0.2, 1.0)
)
def test_crops_are_pillows_to_the_bit(interpolation: str, size: int, scale: float, ratio: float) -> None:
    which, rows = drawn(
        16,
        image_size=size,
        interpolation=interpolation,
        auto_augment=None,
        color_jitter=0.0,
        erasing=0.0,
        scale=(scale, 1.0),
        ratio=(ratio, 1 / ratio),
    )
    made = levels(executor(image_size=size)(buffer(photos()), which, rows))
    for view, photo in enumerate(which):
        np.testing.assert_array_equal(made[view], by_pillow(photos()[photo], rows, view, size))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-p1.0-mstd0.5", "3a", "original-mstd0.5"])
def test_whole_views_are_pillows(policy: str) -> None:
    which, rows = drawn(400, auto_augment=policy)
    made = levels(executor()(buffer(photos()), which, plain(rows)))
    expected = np.stack([by_pillow(photos()[photo], rows, view) for view, photo in enumerate(which)])
    # A later threshold (posterise, solarise) turns one level into many, in a few pixels.
    assert (abs(made - expected) > 2).mean() < 1e-5
    assert (made != expected).mean() < 1e-3


def test_views_are_normalised_as_pillows_are() -> None:
    image = squares(24)[0]
    rows = operations(1, Operation.NOTHING, np.zeros(1), np.zeros(1, bool), 24)
    made = executor()(buffer((image,)), np.zeros(1, int), rows)[0]
    assert torch.equal(made, ToNormalised(Normalize(MEAN, STD))(Image.fromarray(image)))


def test_views_in_bf16_are_those_in_fp32_rounded() -> None:
    which, rows = drawn(32)
    exact = executor()(buffer(photos()), which, rows)
    rounded = executor(dtype=torch.bfloat16)(buffer(photos()), which, rows)
    assert torch.equal(rounded, exact.bfloat16())


def test_views_stay_what_they_are_in_this_version_of_the_executor() -> None:
    """If this fails on purpose, EXECUTOR_VERSION must rise: stored answers belong to other views."""
    random = np.random.default_rng(0)
    images = tuple(random.integers(0, 256, (30 + 7 * k, 50 - 5 * k, 3), dtype=np.uint8) for k in range(8))
    which, rows = drawn(64, images)
    views = executor()(buffer(images), which, rows)
    assert hashlib.sha256(views.numpy().tobytes()).hexdigest()[:16] == "32a1b94b62f0a478"


@pytest.mark.parametrize("size", [1, 5, 16])
def test_views_do_not_depend_on_their_batch(size: int) -> None:
    which, rows = drawn(48)
    whole = executor()(buffer(photos()), which, rows)
    for first in range(0, 48, size):
        part = slice(first, first + size)
        assert torch.equal(executor()(buffer(photos()), which[part], rows.at(part)), whole[part])


def test_views_do_not_depend_on_their_order() -> None:
    which, rows = drawn(48)
    order = np.random.default_rng(0).permutation(48)
    whole = executor()(buffer(photos()), which, rows)
    assert torch.equal(executor()(buffer(photos()), which[order], rows.at(order)), whole[torch.from_numpy(order)])


def test_views_do_not_depend_on_where_their_photos_lie() -> None:
    which, rows = drawn(48)
    order = np.random.default_rng(1).permutation(len(photos()))
    moved = buffer(tuple(photos()[photo] for photo in order))
    assert torch.equal(executor()(moved, np.argsort(order)[which], rows), executor()(buffer(photos()), which, rows))


def test_views_do_not_depend_on_the_memory_for_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    which, rows = drawn(48)
    whole = executor()(buffer(photos()), which, rows)
    monkeypatch.setitem(executor_module._PART_BYTES, "cpu", 1_000_000)
    assert torch.equal(executor()(buffer(photos()), which, rows), whole)


def test_erasing_fills_its_box_with_normal_noise_and_leaves_the_rest() -> None:
    which, rows = drawn(200, erasing=1.0)
    noisy, clean = (executor()(buffer(photos()), which, each) for each in (rows, plain(rows)))
    changed = noisy != clean
    for view, (top, left, height, width) in enumerate(rows.erasing.tolist()):
        changed[view, :, top : top + height, left : left + width] = False
    assert not changed.any()
    boxes = [
        noisy[view, :, top : top + height, left : left + width].flatten()
        for view, (top, left, height, width) in enumerate(rows.erasing.tolist())
    ]
    noise = torch.cat(boxes)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert len(noise.unique()) > 0.5 * min(len(noise), 2**16)


def test_mixing_is_that_of_pillows_views() -> None:
    """The arithmetic of `Mixing`: lerp of both partners, or an exchanged box."""
    which, rows = drawn(32)
    images, targets = executor()(buffer(photos()), which, rows), torch.rand(32, 5)
    mixed, labels = executor().mix(images, targets, rows)
    for pair in range(0, 32, 2):
        these, those = images[pair : pair + 2].clone(), targets[pair : pair + 2]
        share, (top, left, height, width) = rows.share[pair], rows.mixing_box[pair]
        if height:
            box = these[..., top : top + height, left : left + width]
            box.copy_(box.flip(0))
        else:
            these = these.lerp(these.flip(0), 1 - share)
        assert torch.equal(mixed[pair : pair + 2], these)
        torch.testing.assert_close(labels[pair : pair + 2], those.lerp(those.flip(0), 1 - share))


def test_a_view_that_lost_its_partner_is_not_mixed() -> None:
    which, rows = drawn(32)
    images, targets = executor()(buffer(photos()), which, rows), torch.rand(32, 5)
    whole, _ = executor().mix(images, targets, rows)
    there = np.delete(np.arange(32), [3, 10])
    mixed, labels = executor().mix(images[there], targets[there], rows.at(there))
    lonely = np.isin(there, [2, 11])
    assert torch.equal(mixed[lonely], images[there][lonely])
    assert torch.equal(labels[lonely], targets[there][lonely])
    assert torch.equal(mixed[~lonely], whole[there][~lonely])


def test_a_batch_without_views_is_one_without_images() -> None:
    which, rows = drawn(4)
    none = slice(0, 0)
    images = executor()(buffer(photos()), which[none], rows.at(none))
    assert images.shape == (0, 3, 24, 24)
    assert executor().mix(images, torch.zeros(0, 5), rows.at(none))[1].shape == (0, 5)


@pytest.mark.parametrize("policy", ["rand-m9-n3-mstd0.5-inc1", "3a"])
def test_nothing_is_read_from_the_device(policy: str) -> None:
    """A fake tensor has no values: whoever reads one to decide a shape or a branch fails."""
    which, rows = drawn(64, auto_augment=policy)
    on_host = buffer(photos())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        views = executor()(PhotoBuffer(*map(mode.from_tensor, on_host)), which, rows)
        mixed, labels = executor().mix(views, mode.from_tensor(torch.zeros(64, 5)), rows)
    assert views.shape == mixed.shape == (64, 3, 24, 24)
    assert labels.shape == (64, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("policy", ["rand-m9-n4-p1.0-mstd0.5-inc1", "3a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_bits_of_a_cpu(policy: str, dtype: torch.dtype) -> None:
    which, rows = drawn(256, auto_augment=policy)
    on_host = buffer(photos())
    on_device = PhotoBuffer(*(tensor.cuda() for tensor in on_host))
    fast = executor(device="cuda", dtype=dtype)
    views, targets = fast(on_device, which, rows), torch.rand(256, 5)
    expected = executor(dtype=dtype)(on_host, which, rows)
    assert torch.equal(views.cpu(), expected)
    mixed, labels = fast.mix(views, targets.cuda(), rows)
    expected_mixed, expected_labels = executor(dtype=dtype).mix(expected, targets, rows)
    torch.testing.assert_close(mixed.cpu(), expected_mixed)
    torch.testing.assert_close(labels.cpu(), expected_labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_making_views_never_waits_for_a_gpu() -> None:
    which, rows = drawn(64)
    photos_there = PhotoBuffer(*(tensor.cuda() for tensor in buffer(photos())))
    fast = executor(device="cuda")
    fast(photos_there, which, rows)  # compiles
    targets = torch.zeros(64, 5, device="cuda")
    with no_waiting(torch.device("cuda")):
        fast.mix(fast(photos_there, which, rows), targets, rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton starts where there is a GPU")
def test_where_triton_cannot_start_pytorch_makes_the_views() -> None:
    assert executor_module._primitives(torch.device("cuda")) is executor_module.reference


def test_kernels_have_the_bits_of_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    script = REPOSITORY / "tests" / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "same bits"


LEVELS = ("pixels", "images", "lines", "resized", "moved", "fill", "tables", "source", "blurred", "sharp")
WHOLE = ("first", "counts", "sums")  # int32; other tensors are int64
FLOATS = ("values", "normalised", "views", "noise")
NUMBERS = ("last", "n", "size", "taps", "count", "down")
EXCEPTIONS = {
    ("_resize_lines", "lines"): "i32",
    ("_resize_lines", "weights"): "*i32",
    ("_resize_columns", "weights"): "*i32",
    **{(name, "pixels"): "i32" for name in ("_histograms", "_grey_sums", "_look_up", "_saturate", "_normalise")},
}


def type_of(kernel: str, argument: str) -> str:
    """Return what Triton calls the type of an argument of a kernel."""
    if (kernel, argument) in EXCEPTIONS:
        return EXCEPTIONS[kernel, argument]
    kinds = {"constexpr": ("BLOCK", "TILE"), "*u8": LEVELS, "*i32": WHOLE, "*bf16": FLOATS, "i32": NUMBERS}
    return next((kind for kind, names in kinds.items() if argument in names), "*i64")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", minversion="3.3", reason="the kernels need Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deit_kd.views import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"BLOCK": kernels._MOVED, "TILE": kernels._TILE}
    made = [name for name, kernel in vars(kernels).items() if isinstance(kernel, triton.JITFunction)]
    entries = [name for name in made if any(size in getattr(kernels, name).arg_names for size in sizes)]
    assert len(entries) == 11
    for name in entries:
        kernel = getattr(kernels, name)
        signature = {argument: type_of(name, argument) for argument in kernel.arg_names}
        known = {(place,): sizes[key] for place, key in enumerate(kernel.arg_names) if key in sizes}
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        assert compiled.asm["cubin"]
