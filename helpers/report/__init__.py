"""The report: `build` it from rows, `publish` a run, `check` if it is current, `resume` published rows."""

import shutil
from pathlib import Path

from lmcompress.errors import BadData
from lmcompress.paths import IMAGES, NOTEBOOKS, RESULTS, ROOT, RUNS, atomic_path, from_checkout, write_json


def build_run(run: Path) -> str:
    """Write `run/report.md`, its page and `run/images/` from `run/rows/`; nothing is loaded if nothing
    changed.

    Raises:
        AssetNotFound: there is no checkout whose notebooks could make rows.
        BadData: the run has no rows.
    """
    from helpers.report import build
    from lmcompress.results.store import RowStore

    rows = RowStore(run / "rows").rows()
    if not rows:
        from_checkout(NOTEBOOKS)
        raise BadData(f"no rows in {run / 'rows'}: run the notebooks first, `make report`")
    return build.build(rows, report=run / "report.md", images=run / "images", notebooks="notebooks")


def publish(profile: str) -> str:
    """Promote `runs/<profile>`: rows and scores to `results/<profile>/`, figures, `report.md` and its page.

    Raises:
        BadData: there is no such run.
    """
    from helpers.report import build
    from lmcompress.results.scores import publish_scores
    from lmcompress.results.store import PUBLISHED, RowStore, notebooks_apart, superseded

    source = RUNS / profile / "rows"
    rows = RowStore(source).rows()
    if not rows:
        from_checkout(NOTEBOOKS)
        raise BadData(f"no rows in {source}: run `make report PROFILE={profile}` first")
    target = RESULTS / profile
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.jsonl"):
        if not (source / old.name).is_file():
            old.unlink()
    for file in sorted(source.glob("*.jsonl")):
        with atomic_path(target / file.name) as temporary:
            shutil.copyfile(file, temporary)
    publish_scores(RowStore(source), rows, target / "scores")
    about = {"apart": list(notebooks_apart()), "superseded": superseded(), "profile": profile}
    write_json(PUBLISHED, about)
    rows = RowStore(target).rows()
    return build.build(rows, report=ROOT / "report.md", images=IMAGES, notebooks="notebooks")


def resume(profile: str) -> str:
    """Put the committed rows of `profile`, with their scores, into `runs/<profile>`: a run goes on from them.

    A row whose scores were not published is left out, because nothing could be compared with it. Killed, it
    goes on where it was.

    Raises:
        BadData: nothing is committed, or the run has rows of its own.
    """
    from lmcompress.results.scores import read_scores
    from lmcompress.results.store import RowStore, published_rows

    published_rows(RESULTS / profile)  # says what to do where there are none
    target, rows = RowStore(RUNS / profile / "rows"), RowStore(RESULTS / profile).recorded()
    recorded = {(row["notebook"], row["key"]) for row in target.recorded()}
    if recorded - {(row["notebook"], row["key"]) for row in rows}:
        raise BadData(f"{target.folder} has rows: remove them first, if they are not needed")
    for key, columns in read_scores(RESULTS / profile / "scores").items():
        target.save_scores(key, columns)
    taken = [row for row in rows if not row["quality"] or target.has_scores(row["key"])]
    for row in taken:
        if (row["notebook"], row["key"]) not in recorded:
            target.append(row)
    return f"{len(taken)} of {len(rows)} rows of results/{profile} are in {target.folder}"
