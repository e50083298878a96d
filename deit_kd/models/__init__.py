"""timm's models: by name, their tokens, and their weights from and to files."""
