"""The dataset that the section ``data`` of a recipe names."""

from __future__ import annotations

from deit_kd import data
from deit_kd.config import Data


def splits_of(section: Data) -> data.Splits:
    """Return the photos that a recipe trains on, and those that it holds out.

    Raises:
        InputError: they cannot be loaded.
    """
    return data.build_splits(
        name=section.name,
        root=section.root,
        train_split=section.train_split,
        validation_split=section.validation_split,
        validation_fraction=section.validation_fraction,
        folds=section.folds,
        fold=section.fold,
        download=section.download,
        unlabelled=section.unlabelled,
        classes=section.classes,
        rest=section.rest,
        rest_share=section.rest_share,
        fraction=section.fraction,
        per_class=section.per_class,
        stage=section.stage,
        image_column=section.image_column,
        label_column=section.label_column,
    )
