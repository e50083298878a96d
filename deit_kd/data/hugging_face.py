"""A map-style Hugging Face data set, from the hub or from disk; its images are read by position, as they are stored."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute

from deit_kd.console import console
from deit_kd.data.decode import Stamp, UnreadableImage, opened
from deit_kd.data.listing import stamps_of
from deit_kd.data.names import TEXT, Names, joined_text
from deit_kd.data.photos import Photos, Splits, split_by_hash
from deit_kd.data.source import Source
from deit_kd.data.subsets import of_classes
from deit_kd.interfaces import InputError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target")  # names of columns whose type does not say that they are
BYTES = ("binary", "large_binary")  # types of columns that hold files
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes, of several splits and of one


class HuggingFace(Source):
    """Images of one column of a data set.

    Args:
        images: the data set with that column alone, which gives bytes or the path of a file.
        column: its name.
        sizes: bytes of each image, int64 [n]; -1 where there is none.
        changed_ns: of images in files of their own, when each file was last changed, int64 [n]; else None.
    """

    def __init__(self, images: Dataset, column: str, sizes: np.ndarray, changed_ns: np.ndarray | None) -> None:
        self._images, self._column, self.sizes, self._changed_ns = images, column, sizes, changed_ns

    def open(self, row: int, where: str) -> BinaryIO:
        """Return the bytes of an image; a file of its own that was changed since it was found is refused."""
        try:
            found = self._images[row][self._column]
        except (arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableImage(f"{where}: cannot be read from the data set ({reason}); download it again") from error
        if found is not None and found["bytes"] is not None:
            return io.BytesIO(found["bytes"])
        if found is None or found["path"] is None or self._changed_ns is None:
            raise UnreadableImage(f"{where}: cannot be read as an image (the row holds none); leave it out of the data")
        return opened(Path(found["path"]), Stamp(int(self.sizes[row]), int(self._changed_ns[row])))


def hugging_face(
    *,
    root: str | None,
    train_split: str,
    validation_split: str,
    validation_fraction: float,
    image_column: str | None = None,
    label_column: str | None = None,
    **_: Any,
) -> Splits:
    """Return two splits of a data set; without the validation split, it is split by `split_by_hash`.

    Classes are those of the column's ``ClassLabel`` that have photos, in its order; or else its values, sorted.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be loaded, or a split or a column is not there
            or holds something else.
    """
    found = _loaded(root)
    if train_split == validation_split:
        raise InputError(f"data.validation_split: {validation_split!r} is the training split, too; name another")
    named = [train_split, *([validation_split] if validation_split in found else [])]
    parts = _photos(found, named, image_column, label_column)
    return split_by_hash(parts[0], validation_fraction) if len(parts) == 1 else Splits(*parts)


def unread_in_hub(root: str | None, train_split: str, validation_split: str) -> list[str]:
    """Return the splits beside a training split from which `hugging_face` holds out photos."""
    found = _loaded(root)
    return [] if validation_split in found else [name for name in found if name != train_split]


def one_split_of_hub(
    root: str | None, split: str, image_column: str | None = None, label_column: str | None = None
) -> Photos:
    """Return the photos of one split of a data set; raises as `hugging_face` does."""
    return _photos(_loaded(root), [split], image_column, label_column)[0]


def _loaded(root: str | None) -> Mapping[str, Dataset]:
    """Return the splits of a data set by their names; one that was saved without splits answers to every name."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f'data.name: hf needs datasets ({error}); pip install "deit-kd[hf]"') from error
    if root is None:
        raise InputError("data.root: is not set; name a data set of the Hugging Face hub, or a folder that holds one")
    if not console.is_terminal:
        datasets.disable_progress_bars()
    path = Path(root).expanduser()
    hub_id, _, configuration = root.partition(":")
    try:
        if any((path / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(path))
        elif path.is_dir():
            found = datasets.load_dataset(str(path))
        else:
            found = datasets.load_dataset(hub_id, configuration or None)
    except Exception as error:  # whatever its readers and the network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"data.root: {root} cannot be loaded as a Hugging Face data set ({reason}); name one of the hub, as ID or "
            "ID:CONFIGURATION, or a folder"
        ) from error
    return found if isinstance(found, Mapping) else _Alone(found)


class _Alone(dict[str, Any]):
    """A data set that has no splits: the training split, whatever its name."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self._whole = whole

    def __missing__(self, split: str) -> Any:
        return self._whole


def _photos(
    found: Mapping[str, Dataset], splits: list[str], image_column: str | None, label_column: str | None
) -> list[Photos]:
    """Return the photos of splits, each with the classes that have any."""
    for split in splits:
        if split not in found and not isinstance(found, _Alone):
            raise InputError(
                f"data.train_split: the data set has no split {split!r}; name one of {', '.join(found)}"
                f"{nearest(split, found)}"
            )
    sets = [found[split] for split in splits]
    image, label = _image_column(sets[0].features, image_column), _label_column(sets[0].features, label_column)
    for split, part in zip(splits, sets, strict=True):
        if not {image, label} <= set(part.features):
            raise InputError(f"data.root: split {split!r} has no columns {image!r} and {label!r}, as {splits[0]!r} has")
    classes, labels = _labels(sets, splits, label)
    return [_photos_of(part, image, own, classes) for part, own in zip(sets, labels, strict=True)]


def _photos_of(part: Dataset, image: str, labels: np.ndarray, classes: tuple[str, ...]) -> Photos:
    import datasets

    images = part.select_columns([image]).with_format(None).cast_column(image, datasets.Image(decode=False))
    column = images.with_format("arrow")[:].column(image)
    contents, paths = (compute.struct_field(column, name) for name in ("bytes", "path"))
    sizes = compute.binary_length(contents).cast(arrow.int64()).fill_null(-1).to_numpy().copy()
    changed_ns, in_files = None, np.flatnonzero(sizes < 0)
    if len(in_files):
        stamps = stamps_of([str(path) for path in paths.take(arrow.array(in_files)).to_pylist()])
        changed_ns = np.zeros(len(sizes), np.int64)
        sizes[in_files], changed_ns[in_files] = stamps.T
    names = _names(paths.combine_chunks(), labels, classes)
    photos = Photos(Names(names), labels, classes, HuggingFace(images, image, sizes, changed_ns))
    used = np.unique(labels).tolist()
    return photos if len(used) == len(classes) else of_classes(photos, used)


def _names(paths: arrow.Array, labels: np.ndarray, classes: tuple[str, ...]) -> arrow.Array:
    """Return ``class/file`` for each photo, as in a tree; its position where files have no names of their own."""
    if not paths.null_count:
        files = compute.replace_substring_regex(paths.cast(TEXT), "^.*[/\\\\]", "")
        names = joined_text("/", arrow.array(classes, TEXT).take(arrow.array(labels)), files)
        if compute.count_distinct(names).as_py() == len(names):
            return names
    positions = arrow.array(np.arange(len(paths))).cast(arrow.string())
    return compute.utf8_lpad(positions, 8, "0").cast(TEXT)


def _image_column(features: Mapping[str, Any], named: str | None) -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    as_bytes = [name for name, feature in features.items() if getattr(feature, "dtype", None) in BYTES]
    return _column("image", features, named, images, [*images, *as_bytes])


def _label_column(features: Mapping[str, Any], named: str | None) -> str:
    import datasets

    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if _is_value(feature)]
    return _column("label", features, named, labels or [name for name in LABEL_COLUMNS if name in values], values)


def _is_value(feature: Any) -> bool:
    """Return whether a column holds integers, words or classes."""
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint"))


def _column(what: str, features: Mapping[str, Any], named: str | None, likely: list[str], able: list[str]) -> str:
    """Return the column that a recipe names, or the only likely one."""
    key = f"data.{what}_column"
    if named is None and len(likely) == 1:
        return likely[0]
    if named is None:
        found = f"has the columns {', '.join(likely)} of {what}s" if likely else f"has no obvious column of {what}s"
        raise InputError(f"{key}: is not set, and the data set {found}; name one of {', '.join(likely or features)}")
    if named not in features:
        raise InputError(f"{key}: {named!r} is no column; name one of {', '.join(features)}{nearest(named, features)}")
    if named not in able:
        raise InputError(f"{key}: {named!r} holds no {what}s ({features[named]}); name another column")
    return named


def _labels(sets: list[Dataset], splits: list[str], label: str) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the classes, and the labels of each split."""
    columns = [part.select_columns([label]).with_format("arrow")[:].column(label).combine_chunks() for part in sets]
    for split, column in zip(splits, columns, strict=True):
        if column.null_count:
            row = compute.index(column.is_null(), True).as_py()
            raise InputError(f"data.label_column: row {row} of split {split!r} has no label; leave it out of the data")
    classes = [getattr(part.features[label], "names", None) for part in sets]
    if any(own != classes[0] for own in classes):
        raise InputError(f"data.label_column: {label!r} has other classes in {splits[1]!r} than in {splits[0]!r}")
    if classes[0] is not None:
        return tuple(classes[0]), [
            _checked(column, split, classes[0]) for split, column in zip(splits, columns, strict=True)
        ]
    values = compute.unique(arrow.chunked_array(columns))
    values = values.take(compute.array_sort_indices(values))
    labels = [compute.index_in(column, values).to_numpy().astype(np.int64) for column in columns]
    return tuple(map(str, values.to_pylist())), labels


def _checked(column: arrow.Array, split: str, classes: list[str]) -> np.ndarray:
    """Return the labels of one split, once they are known to be of its classes."""
    labels = column.to_numpy().astype(np.int64)
    strange = labels[(labels < 0) | (labels >= len(classes))]
    if len(strange):
        raise InputError(
            f"data.label_column: a label in split {split!r} is {strange[0]}, which is none of the {len(classes)} "
            "classes (-1 stands for a photo without a label); name another split"
        )
    return labels
