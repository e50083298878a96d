"""The recipes that come with the package, by name: `deit_kd/recipes` is `configs/` of the repository."""

from __future__ import annotations

from pathlib import Path

from deit_kd.interfaces import InputError, nearest

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def recipe_file(named: str) -> Path:
    """Return the file of a recipe: the one at the path `named`, or else the package's own of that name.

    Raises:
        InputError: there is neither.
    """
    path = Path(named)
    if named.removesuffix(".yaml") in RECIPES and not path.is_file():
        return RECIPES[named.removesuffix(".yaml")]
    if path.is_dir():
        raise InputError(f"config: {named} is a folder; name the recipe file in it")
    if not path.exists():
        known = nearest(path.stem, RECIPES) or f" ({', '.join(RECIPES)})"
        cure = f"say --config {path.stem}" if path.stem in RECIPES else f"name one{known}"
        raise InputError(f"config: {named} is neither a file nor a recipe of deit_kd; {cure}")
    return path
