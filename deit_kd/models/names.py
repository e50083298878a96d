"""timm's model names: the known ones, and pairs of distilled and plain ones."""

from __future__ import annotations

import timm
from timm.models import is_model_in_modules

from deit_kd.interfaces import InputError, nearest


def check_known(key: str, name: str) -> None:
    """Raise an InputError with similar names unless timm knows the model `name`, and its tag if it has one."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"{key}: {name!r} is not a timm model{nearest(architecture, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise InputError(f"{key}: {name!r} has a tag that timm does not know{nearest(name, tags)}") from error


def is_distilled_name(name: str) -> bool:
    """Return whether `name` is a model with a distillation token; a tag may mean another kind of distillation.

    ``iformer_*_distilled`` have two heads that read the same features, as LeViT has, and no token.
    """
    architecture = name.split(".")[0]
    return "_distilled" in architecture and is_model_in_modules(architecture, ("deit", "pit"))


def has_published_second_head(name: str) -> bool:
    """Return whether timm's own weights of `name` have a distillation head, with a token or without."""
    cfg = timm.get_pretrained_cfg(name)
    heads: tuple[str, ...] = () if cfg is None or isinstance(cfg.classifier, str) else cfg.classifier or ()
    return any("head_dist" in head.split(".") for head in heads)


def plain_twin(name: str) -> str:
    """Return the name of the model without token and second head; a plain model's name is unchanged."""
    return name.split(".")[0].replace("_distilled", "") if is_distilled_name(name) else name


def distilled_twin(name: str) -> str:
    """Return the name of timm's own distilled model if `graft` cannot give `name` a token; else `name`."""
    architecture = name.split(".")[0]
    if is_distilled_name(name) or not is_model_in_modules(architecture, ("pit",)):
        return name
    stem, size = architecture.rsplit("_", 1)
    return f"{stem}_distilled_{size}"


def is_kin(name: str, other: str) -> bool:
    """Return whether two names are of one architecture, ignoring tags and the second head."""
    return plain_twin(name.split(".")[0]) == plain_twin(other.split(".")[0])
