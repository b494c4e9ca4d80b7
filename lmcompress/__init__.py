"""Compress language models and measure, honestly, what that costs: the library under the notebooks of this project."""
