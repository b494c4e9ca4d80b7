"""The command line of `lmcompress.fit`; exit status 1 where no candidate was confirmed, 2 on bad input."""

import argparse
import sys

from lmcompress.errors import BadSetting, StudyError, accept_any_encoding
from lmcompress.study.options import parse_setting


def main(arguments: list[str] | None = None) -> int:
    """Search, print what it came to, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcompress.fit",
        description="Find, confirm and save the version of a model that loses at most so much on your data.",
    )
    add = parser.add_argument
    add("--model", help="Hub id, folder, or pocket/<name>")
    add("--task", help="a file of your own (.csv, .jsonl, .txt, …), a data set, or a task by name")
    add("--save", required=True, help="new or empty folder for the answer; work is kept in <folder>.search")
    add("--max-loss", default="1", help="1: points of a metric in percent (default); 1%%: of the dense value")
    add("--for", dest="goal", default="size", help="size (default), batch1, batch8, decode, memory")
    add(
        "--minutes", type=float, help="of each run; nothing is begun that would not end in time (default: 20)"
    )
    add("--max-mb", type=float, help="megabytes (10⁶ bytes) of the written file")
    add("--max-ms", type=float, help="milliseconds per call (or token) as served")
    add("--batch", type=int, help="as served; default: what --for says, else 1")
    add("--length", type=int, default=128, help="tokens of a text, as served (default: 128)")
    add("--runtime", default="any", help="torch, openvino, onnxruntime or any (default)")
    add("--train", dest="train_path", metavar="FILE", help="calibrate and train on this file")
    add("--no-train", dest="train", action="store_false", help="do not cut and train what survives")
    add("--finetune", action="store_true", help="train a head first, for a model that has none")
    add("--candidates", dest="recipes", metavar="FILE", help="a .yaml list of recipes to try instead of ours")
    add("--split", dest="split_by", help="shares of training, search, confirmation (15,28,57), or a file")
    add("--resume", action="store_true", help="go on with the search of --save as it was asked for")
    add("--seed", type=int, default=0)
    add("-p", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of the task")
    accept_any_encoding()
    options = vars(parser.parse_args(arguments))
    try:
        settings = dict(parse_setting(text) for text in options.pop("settings"))
        if taken := [
            name for name in settings if name in options and (name, options[name]) != ("train_path", None)
        ]:
            raise BadSetting(f"-p takes settings of the task. For {', '.join(taken)} see --help.")
        options |= settings
        if train_path := options.pop("train_path"):
            options["train_path"] = train_path
        from transformers.utils import logging

        from lmcompress.fit import fit, resumed

        if options.pop("resume"):
            given = {name: options[name] for name in ("save", "minutes") if options[name] is not None}
            options = resumed(options["save"]) | given
        if missing := [f"--{name}" for name in ("model", "task") if not options[name]]:
            raise BadSetting(f"give {' and '.join(missing)}, or --resume a search.")
        logging.set_verbosity_error()
        if options["minutes"] is None:
            del options["minutes"]
        outcome = fit(**options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(outcome.text)
    if not outcome.answer:
        print(f"The proof is in {outcome.work}.")
        return 1
    print(f"Saved in {outcome.save}: README.md, proof.html, check.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
