"""Text harvested from the docstrings of installed packages: the data that needs no download."""
