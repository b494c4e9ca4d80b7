"""Time a report that changes nothing against the run that made it: `python benchmarks/second_report.py`.

Runs the pocket profile into a temporary folder twice, as `make report` does, and prints both and their ratio.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(folder: Path) -> float:
    """Return the seconds of one whole `make report`, as a process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "helpers.run.runner", "--profile", "pocket", "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print the first run's seconds, the second's, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = timed(Path(folder)), timed(Path(folder))
    print(
        f"first report {first:.0f} s · second {second:.1f} s · "
        f"the second takes {second / first:.3f} of the first"
    )


if __name__ == "__main__":
    main()
