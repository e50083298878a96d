"""Where the lessons of a run come from."""
