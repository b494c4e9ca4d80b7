"""Times, in a process of its own, a saved model against its dense one.

`python -m lmcompress.measure.times FOLDER MODEL SETTINGS` (JSON: device, calls, length, seed) prints what
`latency` returns, as a line of JSON, with the verdict of each shape as its "speed".
"""

import json
import sys

from lmcompress.measure.calls import default_shapes
from lmcompress.measure.latency import latency, verdicts
from lmcompress.models import loading, storage


def main(folder: str, dense: str, settings: str) -> None:
    """Load both, time them in turn, print the times."""
    options = json.loads(settings)
    loaded = loading.load(dense, device=options["device"])
    model, _ = storage.load(folder, device=options["device"])
    shapes = default_shapes(loaded.kind, length=options["length"], model=loaded.model)
    repeats = {"calls": options["calls"], "seed": options["seed"]}
    times = latency(loaded.model, model, kind=loaded.kind, shapes=shapes, **repeats)
    for name, speed in verdicts(times).items():
        times["shapes"][name]["speed"] = speed
    print(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
