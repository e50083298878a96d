"""The files of a label store: parts that appear whole or not at all, and a manifest of what they depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deit_kd.files import checked, held, read_json, write_atomically, write_json, write_unless_there
from deit_kd.interfaces import InputError
from deit_kd.models.state import tensors_hash
from deit_kd.randomness import VIEWS_VERSION
from deit_kd.run_folder import ScoreRecord
from deit_kd.store.manifest import (
    FORMAT,
    MANIFEST,
    PARTS,
    VALIDATION,
    VIEWS_FIELD,
    Manifest,
    digest_of,
    record_of,
)
from deit_kd.store.record import Record, is_missing, is_whole

Columns = dict[str, Tensor]


def epoch_part(epoch: int) -> str:
    """Return the name of the part that holds the answers to one epoch's views."""
    return f"epoch-{epoch:05d}"


class LabelStore:
    """One folder of answers: ``validation`` and one part for each epoch of views.

    A part is a safetensors file whose columns (see `Record`) have one row for each position. Until it is complete, a
    part is a folder of pieces, each of them whole: an interrupted build resumes from them. Every file has a checksum
    and the digest of its manifest.

    Args:
        folder: of the store.

    Raises:
        InputError: there is no store, or a later version of this package made it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"teacher.store: {folder} is not a label store; make one with deit-kd store build")
        written = read_json(self.folder / MANIFEST, dict[str, Any]).get("format")
        if written != FORMAT:
            raise InputError(f"teacher.store: {folder} has format {written}, this version reads {FORMAT}; rebuild it")
        self.manifest = read_json(self.folder / MANIFEST, Manifest)
        # A store from before views had versions has version 1.
        self.views_version: int = self.manifest["identity"].get(VIEWS_FIELD, 1)
        if self.views_version not in range(1, VIEWS_VERSION + 1):
            raise InputError(
                f"teacher.store: {folder} answers views of version {self.views_version}, this version of deit_kd makes "
                f"versions up to {VIEWS_VERSION}; rebuild it"
            )
        self.record = record_of(self.manifest)  # of views
        self._open: tuple[str, Columns] | None = None
        self._writer = uuid.uuid4().hex[:8]  # where there are no locks, two may answer the same views

    @classmethod
    def begin(cls, folder: str | Path, manifest: Mapping[str, Any]) -> LabelStore:
        """Write the manifest of a new store, and return the store; an existing one is not changed.

        Args:
            folder: empty, or of a store.
            manifest: ``identity`` (fields by name), ``classes`` (names), ``top`` (K), ``views`` (of an epoch),
                ``validation`` (images), ``libraries`` (a list of accepted versions), ``teacher`` (facts) and, if there
                are any, further ``columns``.

        Raises:
            InputError: the folder holds something else.
        """
        place = Path(folder).expanduser()
        there = {path.name for path in place.iterdir() if not path.name.startswith(".")} - {PARTS}
        if there and not (place / MANIFEST).is_file():  # asked in this order, since another part may begin it now
            raise InputError(f"teacher.store: {folder} holds something that is not a label store; name another folder")
        with said_clearly(place):
            write_unless_there(place / MANIFEST, {"format": FORMAT, **manifest})
        return cls(folder)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the records depend on, including their format."""
        return digest_of(self.manifest)

    @property
    def epochs(self) -> int:
        """How many epochs of views it holds, from the first without a gap."""
        epoch = 0
        while self.holds(epoch_part(epoch)):
            epoch += 1
        return epoch

    @property
    def parts(self) -> list[str]:
        """The names of the complete parts: the validation set's, and the epochs without a gap."""
        return [part for part in (VALIDATION, *map(epoch_part, range(self.epochs))) if self.holds(part)]

    @property
    def bytes_on_disk(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def holds(self, part: str) -> bool:
        """Return whether a part is complete."""
        return self._file(part).is_file()

    def accept(self, libraries: Mapping[str, str]) -> None:
        """Let these versions of libraries use the store from now on."""
        self.manifest["libraries"].append(dict(libraries))
        with said_clearly(self.folder):
            write_json(self.folder / MANIFEST, self.manifest)

    def columns(self, part: str) -> Columns:
        """Return the columns of a part, memory-mapped; the part that was read last stays open.

        Raises:
            InputError: the part does not exist, or its file is truncated or of another store.
        """
        opened = self._open  # by any thread: another may open another part meanwhile
        if opened is None or opened[0] != part:
            self._open = opened = part, self._read(part, self._file(part))[0]
        return opened[1]

    def find(self, view_ids: Tensor, pinned: bool = False) -> Columns:
        """Return the records of views [B, 2] (epoch and position, in host memory), perhaps in pinned memory.

        Raises:
            InputError: one does not exist, or is marked as missing.
        """
        found = self._look_up(view_ids, pinned)
        if bool((gone := is_missing(found)).any()):
            epoch, position = view_ids[gone][0].tolist()
            raise InputError(
                f"teacher.store: {self.folder} has no answer to view {position} of epoch {epoch}, whose photo was "
                f"unreadable when the store was built and can be read now; {self._cure(epoch)}"
            )
        return found

    def expect_missing(self, view_ids: Tensor) -> None:
        """Refuse answers to views [m, 2] that are missing here: in the store their partners were mixed with them.

        Raises:
            InputError: the store has one of them.
        """
        if not len(view_ids):
            return
        present = ~is_missing(self._look_up(view_ids))
        if bool(present.any()):
            epoch, position = view_ids[present][0].tolist()
            raise InputError(
                f"teacher.store: {self.folder} answers view {position} of epoch {epoch}, whose photo could be read "
                f"when the store was built and is unreadable now; repair the photo, or {self._cure(epoch)}"
            )

    def _cure(self, epoch: int) -> str:
        return f"delete {self._file(epoch_part(epoch))} and run deit-kd store build again"

    def _look_up(self, view_ids: Tensor, pinned: bool = False) -> Columns:
        found = self.record.empty(len(view_ids), pinned)
        for epoch in view_ids[:, 0].unique().tolist():
            rows = (view_ids[:, 0] == epoch).nonzero().flatten()
            positions = view_ids[rows, 1]
            if not self.holds(epoch_part(epoch)) or int(positions.max()) >= self.manifest["views"]:
                raise InputError(
                    f"teacher.store: {self.folder} has no view {int(positions.max())} of epoch {epoch}; run deit-kd "
                    "store build with more epochs"
                )
            for name, column in self.columns(epoch_part(epoch)).items():
                found[name].index_copy_(0, rows, column.index_select(0, positions))
        return found

    def score(self) -> ScoreRecord:
        """Return the teacher's ``top1``, ``top5`` and ``nll`` on the validation set, as measured."""
        file = self._file(VALIDATION)
        _, metadata = self._read(VALIDATION, file)
        try:
            return checked(json.loads(metadata["notes"]), ScoreRecord)
        except ValueError as error:
            raise self._broken(file, str(error)) from error

    def predictions(self, rank: int, processes: int) -> Tensor:
        """Return the teacher's classes [share] on the part of the validation set that one process evaluates.

        They are -1 for images that are marked as missing.
        """
        share = {name: column[rank::processes] for name, column in self.columns(VALIDATION).items()}
        if "label" in share:
            classes = share["label"].long()
        else:
            classes = share["classes"][:, 0].long() if "classes" in share else share["logits"].argmax(-1)
        return classes.masked_fill(is_missing(share), -1)

    def logits(self) -> Tensor | None:
        """Return the teacher's logits [n, C] on the validation set; None if the store holds only hard labels."""
        return self.record.decode(self.columns(VALIDATION)) if self.record.holds_logits else None

    def verify(self, parts: Sequence[str]) -> None:
        """Read every byte of `parts`, about a second for each GB, and compare the checksums.

        Raises:
            InputError: a file is missing, truncated, altered or of another store.
        """
        for part in parts:
            columns, metadata = self._read(part, self._file(part))
            if metadata["digest"] != _hash(columns, metadata):
                raise self._broken(self._file(part), "its checksum differs")
            if not is_whole(columns) or not self.record.names_its_classes(columns):
                raise self._broken(self._file(part), "a record is not a valid answer")

    def _read(self, part: str, file: Path, is_piece: bool = False) -> tuple[Columns, dict[str, str]]:
        """Map the columns of a part's file, or of one of its pieces, which has any number of rows."""
        rows = None if is_piece else self._rows(part)
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                columns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise self._broken(file, str(error).splitlines()[0]) from error
        if metadata.get("store") != self.digest:
            raise self._broken(file, "it belongs to another store")
        if not {"notes", "digest"} <= metadata.keys() or not self._are_records(self._record_of(part), columns, rows):
            raise self._broken(file, "it holds no records" if rows is None else f"it does not hold {rows} records")
        return columns, metadata

    @staticmethod
    def _are_records(record: Record, columns: Columns, rows: int | None) -> bool:
        """Return whether `columns` are those of `rows` records, or of a piece with its positions if that is None."""
        count = len(columns["positions"]) if rows is None and "positions" in columns else rows
        if count is None or any(column.ndim == 0 or len(column) != count for column in columns.values()):
            return False
        expected = record.empty(0) | ({"positions": torch.empty(0, dtype=torch.int64)} if rows is None else {})
        return {name: (column.dtype, column.shape[1:]) for name, column in columns.items()} == {
            name: (column.dtype, column.shape[1:]) for name, column in expected.items()
        }

    def _broken(self, file: Path, reason: str) -> InputError:
        return InputError(
            f"teacher.store: {file} is truncated or altered ({reason}); delete it and run deit-kd store build again"
        )

    @staticmethod
    @contextmanager
    def lock(folder: str | Path, shared: bool = False) -> Iterator[None]:
        """Lock `folder` for writing, see `held`; `shared` with those that build other parts of it.

        Raises:
            InputError: another process writes to it.
        """
        place = Path(folder).expanduser()
        busy = f"teacher.store: {folder} is being written by another process; wait for it, or name another folder"
        with ExitStack() as stack:
            with said_clearly(place):
                stack.enter_context(held(place, busy, shared))
            yield

    def missing(self, part: str, within: range | None = None) -> np.ndarray:
        """Return the positions [n] of a part, or of those `within`, that have no answer yet.

        Damaged pieces count as missing.
        """
        rows = self._rows(part)
        if self.holds(part):
            return np.empty(0, dtype=np.int64)
        answered = np.zeros(rows, dtype=bool)
        for positions, _ in self._pieces(part):
            answered[positions.numpy()] = True
        missing = np.flatnonzero(~answered)
        return missing if within is None else missing[(missing >= within.start) & (missing < within.stop)]

    def write_piece(self, part: str, positions: Tensor, columns: Columns) -> None:
        """Keep the records of some positions [n] of a part, in any order.

        Raises:
            InputError: an answer was not finite, or the disk is full.
        """
        if self.holds(part) or not len(positions):
            return
        if not is_whole(columns):
            raise InputError(
                f"teacher: an answer to {part} is not finite; check its weights, or set teacher.precision off"
            )
        tensors = {"positions": positions, **columns}
        content, digest = self._packed(tensors, {})
        place = self._pieces_folder(part)
        with said_clearly(self.folder):
            place.mkdir(exist_ok=True)
            write_atomically(place / f"{int(positions[0]):010d}-{digest[:12]}-{self._writer}.safetensors", content)

    def finish(self, part: str, notes: Any = None) -> None:
        """Join the pieces of a part into its file.

        Args:
            part: its name; all of its positions must have answers.
            notes: JSON to keep with it.
        """
        if self.holds(part):
            shutil.rmtree(self._pieces_folder(part), ignore_errors=True)
            return
        columns = self._record_of(part).empty(self._rows(part))
        for positions, piece in self._pieces(part):
            for name, column in columns.items():
                column[positions] = piece[name]
        content, _ = self._packed(columns, notes)
        with said_clearly(self.folder):
            write_atomically(self._file(part), content)
        shutil.rmtree(self._pieces_folder(part))

    def _packed(self, tensors: Columns, notes: Any) -> tuple[bytes, str]:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"store": self.digest, "notes": json.dumps(notes)}
        digest = _hash(tensors, metadata)
        return save(tensors, {**metadata, "digest": digest}), digest

    def _pieces(self, part: str) -> Iterator[tuple[Tensor, Columns]]:
        """Yield the pieces of a part, without the damaged ones, whose views must be answered again."""
        for file in sorted(self._pieces_folder(part).glob("*.safetensors")):
            try:
                columns, metadata = self._read(part, file, is_piece=True)
                positions = columns["positions"]
                whole = metadata["digest"] == _hash(columns, metadata) and bool(
                    ((positions >= 0) & (positions < self._rows(part))).all()
                )
            except InputError:
                whole = False
            if whole:
                yield columns.pop("positions"), columns

    def _record_of(self, part: str) -> Record:
        return self.record.of_whole_images if part == VALIDATION else self.record

    def _rows(self, part: str) -> int:
        return self.manifest["validation" if part == VALIDATION else "views"]

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _pieces_folder(self, part: str) -> Path:
        folder = self.folder / f"{part}.pieces"
        if folder.is_symlink():
            raise InputError(
                f"teacher.store: {folder} is a link, and pieces are deleted once they are joined; remove the link"
            )
        return folder


def _hash(tensors: Columns, metadata: Mapping[str, str]) -> str:
    in_order = {name: tensors[name] for name in sorted(tensors)}
    told = metadata["store"] + metadata["notes"] + tensors_hash(in_order)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


@contextmanager
def said_clearly(folder: Path) -> Iterator[None]:
    """Raise an InputError in place of an error of the disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"teacher.store: {folder} cannot be written ({reason}); free space or name another folder, then run the "
            "same command again; what was finished is kept"
        ) from error
