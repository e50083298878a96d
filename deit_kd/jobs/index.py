"""``deit-kd data index``: make the index that lets a run start without looking at every photo."""

from __future__ import annotations

from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.data import index_shards, index_tree
from deit_kd.interfaces import counted


def index(config: Config, splits: list[str], processes: int) -> None:
    """Index a set of shards or a tree, and say where each index is.

    Args:
        config: says where the photos are, whether in shards, and which splits there are.
        splits: to index besides those of the recipe.
        processes: how many read shards at a time.

    Raises:
        InputError: there are no photos, or a shard cannot be used.
    """
    data = config.data
    if data.name == "shards":
        named = [data.train_split, data.validation_split, *splits]
        made = index_shards(root=data.root, splits=named, processes=processes)
    else:
        made = index_tree(root=data.root, train_split=data.train_split, validation_split=data.validation_split)
    for place, photos in made.items():
        say(f"{place}: {counted(photos, 'photo')}")
