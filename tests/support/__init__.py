"""What several test areas share. Importable as ``support`` (pyproject.toml puts ``tests`` on the path)."""
