"""Chooses which features of student and teacher are compared, and checks their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deit_kd.features import POOLED
from deit_kd.interfaces import InputError, Link, counted, nearest

Shapes = Mapping[str, Sequence[int]]  # of one image's features, by name: [D, h, w] or [D]
STAGES = 3  # of a guide or of relations, unless a recipe names them
LEAST_PLACES = 3  # a softmax over the one other of two places is always 1


def map_links(
    kind: str,
    student: Shapes,
    teacher: Shapes,
    *,
    blocks: Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    grid: int | None = None,
) -> tuple[Link, ...]:
    """Return the links of a term that compares maps: each of the student's blocks with one of the teacher's stages.

    Args:
        kind: of the term: ``guide``, or ``relations``, which need no connectors.
        student: its layers in order.
        teacher: its layers in order.
        blocks: places in the student's order, from 0; None spreads them evenly from the first to the last.
        stages: the teacher's layers; None takes the last three whose grid is not coarser than the student's.
        grid: side of the grid on which maps are compared; None uses the coarser of the two.

    Raises:
        InputError: a block or a stage does not exist, their numbers differ, a pair is there twice, grids cannot be
            matched, or fewer than three places are left for relations to compare.
    """
    own = {name: shape for name, shape in student.items() if len(shape) == 3}
    theirs = {name: shape for name, shape in teacher.items() if len(shape) == 3}
    for whose, maps in (("student", own), ("teacher", theirs)):
        if not maps:
            raise InputError(f"distill.terms: the {whose} has no feature maps that timm names; use a pooled term")
    chosen = _chosen_stages(theirs, min(shape[1] for shape in own.values())) if stages is None else stages
    for name in chosen:
        if name not in theirs:
            raise InputError(
                f"distill.terms: the teacher has no stage {name!r}{nearest(name, theirs)}; choose from "
                f"{', '.join(theirs)}"
            )
    places = _spread(len(own), len(chosen)) if blocks is None else blocks
    for place in places:
        if not 0 <= place < len(own):
            raise InputError(f"distill.terms: the student has no block {place}; use 0 to {len(own) - 1}")
    if len(places) != len(chosen) or not chosen:
        raise InputError(
            f"distill.terms: {counted(len(places), 'block')} cannot be compared with "
            f"{counted(len(chosen), 'stage')}; name the same number of each"
        )
    names = list(own)
    pairs = [(names[place], stage) for place, stage in zip(places, chosen, strict=True)]
    twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if twice is not None:
        raise InputError(f"distill.terms: {twice[0]} and {twice[1]} are compared twice; name each pair once")
    return tuple(_link(kind, block, stage, own[block], theirs[stage], grid) for block, stage in pairs)


def pooled_links(student: Shapes, teacher: Shapes) -> tuple[Link, ...]:
    """Return the one link of a pooled term: the student's mean patch with the teacher's pooled vector."""
    return (Link(POOLED, POOLED, POOLED, student[POOLED][0], teacher[POOLED][0]),)


def _chosen_stages(maps: Shapes, coarsest: int) -> list[str]:
    fine = [name for name, shape in maps.items() if shape[1] >= coarsest] or list(maps)
    if len({maps[name][1] for name in fine}) == 1:  # a ViT
        return [fine[place] for place in _spread(len(fine), min(STAGES, len(fine)))]
    last_of_grid = {maps[name][1]: name for name in fine}
    return list(last_of_grid.values())[-STAGES:]


def _spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` places from the first of `count` to the last."""
    return [place * (count - 1) // (wanted - 1) for place in range(wanted)] if wanted > 1 else [count - 1]


def _link(kind: str, block: str, stage: str, own: Sequence[int], theirs: Sequence[int], grid: int | None) -> Link:
    for here, there in zip(own[1:], theirs[1:], strict=True):
        sides = (here, there) if grid is None else (here, grid, there, grid)
        if any(max(pair) % min(pair) for pair in zip(sides[::2], sides[1::2], strict=True)) or (
            grid is not None and grid > min(here, there)
        ):
            raise InputError(
                f"distill.terms: {block} has a grid of {own[1]} x {own[2]} and {stage} of {theirs[1]} x {theirs[2]}, "
                f"which cannot be averaged to one{'' if grid is None else f' of {grid} x {grid}'}; choose "
                "another stage, grid or image_size of the teacher"
            )
    is_of_relations = kind == "relations"
    height, width = (min(pair) if grid is None else grid for pair in zip(own[1:], theirs[1:], strict=True))
    if is_of_relations and height * width < LEAST_PLACES:
        raise InputError(
            f"distill.terms: relations of {block} and {stage} have a grid of {height} x {width}, and "
            f"fewer than {LEAST_PLACES} places have no relations to compare; choose another stage or grid"
        )
    return Link(f"{kind} {block} {stage}", block, stage, own[0], theirs[0], has_connector=not is_of_relations)
