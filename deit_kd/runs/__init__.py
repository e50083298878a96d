"""One run: its parts from a recipe, its loop between steps, its folder."""
