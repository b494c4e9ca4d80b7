"""Measure what compressing a language model costs: models, tasks, techniques, one harness, one report.

The package is a house of floors; a module imports only from floors below its own (see "The house" in
README.md). Nothing happens at import.
"""
