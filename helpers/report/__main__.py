"""Command line: `python -m helpers.report [--check | --publish or --resume PROFILE | --run FOLDER | …]`."""

import argparse
import sys
from pathlib import Path

from helpers import report
from helpers.report import tensorboard
from lmcompress.errors import StudyError, accept_any_encoding
from lmcompress.paths import NOTEBOOKS, RUNS, from_checkout
from lmcompress.results.store import published_rows


def main(arguments: list[str] | None = None) -> int:
    """Build, publish or check; returns the exit status, 1 when the report is out of date."""
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description=report.__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed report is out of date")
    parser.add_argument("--publish", metavar="PROFILE", help="promote runs/<PROFILE> to the committed report")
    parser.add_argument("--resume", metavar="PROFILE", help="go on from the committed rows in runs/<PROFILE>")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write the curves of its rows there"
    )
    parser.add_argument("--run", type=Path, default=RUNS / "pocket", help="build the report of this run")
    accept_any_encoding()
    options = parser.parse_args(arguments)
    try:
        if options.publish:
            print(report.publish(options.publish))
        elif options.resume:
            print(report.resume(options.resume))
        elif options.tensorboard:
            print(tensorboard.write(published_rows(), options.tensorboard))
        elif options.check:
            from_checkout(NOTEBOOKS)
            from helpers.report.check import check

            problems = check()
            print("\n".join(problems) if problems else "report.md, its figures and its rows are current")
            return 1 if problems else 0
        else:
            print(report.build_run(options.run))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
