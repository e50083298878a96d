"""The folder of a run: who may write to it, which checkpoint it resumes from, and which recipe it accepts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from deit_kd.checkpoint import Found, load_checkpoint, newest_checkpoint
from deit_kd.config import NOTHING, Config, Data, differences, effects, flat, in_todays_values, read_recipe
from deit_kd.console import say
from deit_kd.data import PILLOW, folders_above_classes
from deit_kd.distributed import Processes, on_main, together
from deit_kd.files import LOCK, InUse, check_writable, held
from deit_kd.interfaces import InputError
from deit_kd.models import last_block
from deit_kd.randomness import PATHS_VERSION, VIEWS_VERSION
from deit_kd.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_ERRORS_FILE,
    FACTS_FILE,
    Facts,
    newest_folder,
    next_free_folder,
    read_facts,
    whose_peer,
)
from deit_kd.runs.viewing import makers_of

RUNS = Path("runs")
FORMAT = "teacher.channels_last"
SECONDS_BETWEEN_TRIES = 1.0  # to get the lock of a folder
# What a run that was killed before its first step leaves behind.
LEFTOVERS = {LOCK, DATA_ERRORS_FILE, FACTS_FILE, f".{FACTS_FILE}.partial", f".{CONFIG_FILE}.partial"}


@contextmanager
def claimed(folder: Path, processes: Processes, waiting: str | None = None) -> Iterator[None]:
    """Lock the folder of a run until the run ends, also while its teacher is fitted.

    Args:
        folder: of the run.
        processes: of the run.
        waiting: printed while another run holds it; None does not wait.

    Raises:
        InputError: another run holds it, and `waiting` is None.
    """
    taken = f"output: {folder} is being written by another run; wait for it, or name another folder"
    with ExitStack() as stack:

        def enter() -> None:
            told = False
            while True:
                try:
                    return stack.enter_context(held(folder, taken))
                except InUse:
                    if waiting is None:
                        raise
                if not told:
                    say(waiting)
                    told = True
                time.sleep(SECONDS_BETWEEN_TRIES)

        on_main(processes, enter, "" if waiting is None else f"waits for the run that writes {folder}")
        yield


def open_folder(
    config: Config, processes: Processes, data_facts: dict[str, str] | None, backbones: Sequence[nn.Module]
) -> tuple[Path, Any]:
    """Return the run's folder and the checkpoint to resume from; refuse a folder that holds something else.

    The main process chooses the checkpoint; the others, whose disks may differ, load the same one.

    Args:
        config: the recipe.
        processes: of the run.
        data_facts: a hash of each split; None if the folder is known to belong to this recipe and these photos.
        backbones: of all that learn.
    """
    folder = Path(config.output).expanduser() if config.output is not None else None
    if folder is None:
        newest = newest_folder(RUNS, config.recipe) if config.resume == "auto" else None
        folder = newest or next_free_folder(RUNS, config.recipe)
    folder = processes.share(folder)
    _refuse_among_photos(config.data, folder)
    check_writable("output", folder)

    def look() -> Found | None:
        found = _newest(config, folder, data_facts)
        if found is not None:
            _say_new_versions(config, read_facts(folder), backbones)
        return found

    found = on_main(processes, look, "looks for the newest checkpoint")
    chosen = processes.share(None if found is None else (found.path, found.digest))

    def load() -> Any:
        if found is not None or chosen is None:
            return None if found is None else found.parts
        try:
            with processes.busy("reads the checkpoint"):
                return load_checkpoint(*chosen)
        except ValueError as error:
            raise InputError(
                f"resume: {error}, but process 0 resumes from it; let all processes see the same folder, or delete "
                "that checkpoint"
            ) from error

    return folder, together(processes, load)


def _refuse_among_photos(section: Data, folder: Path) -> None:
    """Refuse a run among the photos of a tree: the pictures of its report would be photos of a class of that name."""
    if section.name != "folder" or section.root is None:  # of photos in memory
        return
    places = folders_above_classes(section.root, section.train_split, section.validation_split)
    if section.unlabelled is not None:
        places.append(Path(section.unlabelled).expanduser())
    for place in places:
        if folder.resolve().is_relative_to(place.resolve()):
            raise InputError(
                f"output: {folder} is below {place}, where every image is taken for a photo; name another folder"
            )


def _newest(config: Config, folder: Path, data_facts: dict[str, str] | None) -> Found | None:
    """Return the checkpoint that a run resumes from, if any."""
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= LEFTOVERS):
        return None
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"output: {folder} holds something that is not a run; name another folder")
    if (run := whose_peer(folder)) is not None:
        raise InputError(f"output: {folder} is a peer that {run} trained; continue that run, or name another folder")
    if config.resume != "auto":
        raise InputError(
            f"output: {folder} already holds a run; continue it with --resume auto, or name another folder"
        )
    if data_facts is not None:
        _refuse_changes(config, folder, data_facts)
    found, skipped = newest_checkpoint(folder / CHECKPOINTS)
    for line in skipped:
        say(f"skipped: {line}")
    return found


def _say_new_versions(config: Config, facts: Facts, backbones: Sequence[nn.Module]) -> None:
    """Say what a resumed run will compute otherwise than it began, with other bits but results as good."""
    drops_paths = any(network.drop_path > 0 for network in (config.student, *config.peers))
    if drops_paths and facts.get("paths", 1) != PATHS_VERSION:
        say("drop-path: this run began with another version of its draws; from here on it drops other paths as often")
    if any(map(last_block.computes_tokens_alone, backbones)) and facts.get("last_block", 1) != last_block.VERSION:
        say("last block: this run began with another version; from here on its results differ by rounding")


def _refuse_changes(config: Config, folder: Path, data_facts: dict[str, str]) -> None:
    facts = read_facts(folder)
    makers = makers_of(config)  # with their versions
    before = flat(in_todays_values(read_recipe(folder / CONFIG_FILE)))
    before |= {f"data.{name}": facts.get(name, PILLOW.version) for name in makers}
    now = dict.fromkeys(before) | flat(config.model_dump(mode="json"))  # a key that no longer exists has changed, too
    now |= {f"data.{name}": maker for name, maker in makers.items()}
    if before.get(FORMAT) and now[FORMAT] is None:
        now[FORMAT] = True  # a resumed run measures nothing, and one that did not measure is channels-last
    changed = differences(before, {key: now[key] for key in now if effects().get(key) != NOTHING}, "in the run")
    before_data, before_views = facts["data"], facts.get("views", 1)
    changed += [f"views: version {before_views} in the run, {VIEWS_VERSION} here"] * (before_views != VIEWS_VERSION)
    changed += [f"data ({split}): other photos" for split in data_facts if before_data.get(split) != data_facts[split]]
    if changed:
        raise InputError(
            f"resume: {folder} was started with another recipe ({'; '.join(changed)}); undo that, or name another "
            "output"
        )
