"""Loaded when papermill starts (see pyproject.toml): a profile is warned of once, not 120 times."""

import logging


def __getattr__(name: str) -> type:
    """Return papermill's own engine as `Engine`; imported at the top, it would be asked for too early."""
    if name != "Engine":
        raise AttributeError(f"{__name__} has no {name}; it offers Engine")
    from papermill.engines import NBClientEngine

    return NBClientEngine


class FirstOnly(logging.Filter):
    """Drop all but the first warning about parameters that a notebook does not have.

    A profile names those of all notebooks. Misspelt ones are reported by the setup cell.
    """

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a record that repeats the warning; the first says where the others are listed."""
        if not record.getMessage().startswith("Passed unknown parameter"):
            return True
        if not self.seen:
            record.msg = (
                f"{record.getMessage()} (and perhaps more: the setup cell lists what no notebook has)"
            )
        first, self.seen = not self.seen, True
        return first


logging.getLogger("papermill").addFilter(FirstOnly())
