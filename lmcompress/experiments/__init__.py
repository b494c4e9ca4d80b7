"""Trainings of their own: architectures, sheared models, ablations, longer contexts."""

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path


def command_line(
    description: str, arguments: Sequence[str] | None, *, scales: Iterable[str], folder: Path, **others: tuple
) -> dict:
    """Return what a command line asks for: scale, folder, and `others`: name = (type, default, help)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=list(scales), default=next(iter(scales)))
    parser.add_argument("--folder", type=Path, default=folder)
    for name, (kind, default, text) in others.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return vars(parser.parse_args(arguments))
