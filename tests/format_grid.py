"""Every technique in every format, on tiny models: `python tests/format_grid.py` writes report/formats.md.

A cell is written, read back by what the format is for, and compared: logits, or the refusal's sentence. The
tests try the cells that need no graph (and a few that do), and compare them with the page. Minutes.
"""

import itertools
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from family_grid import context
from tiny_models import inputs, logits, tiny
from torch import nn

from lmcompress import formats
from lmcompress.compress import get
from lmcompress.formats import FORMATS
from lmcompress.formats.dense import dense_copy
from lmcompress.models.anatomy import anatomy, prunable
from lmcompress.models.surgery import drop_blocks, keep_ffn, keep_heads
from lmcompress.paths import ROOT, atomic_path

PAGE = ROOT / "report" / "formats.md"
TICK, AFTER_IMPORT = "✓", "✓ᵢ"
MODELS = {
    "BERT, classifier": lambda: tiny("bert", "classification"),
    "LLaMA": lambda: tiny("llama", num_key_value_heads=4, intermediate_size=64),
    "GPT-2": lambda: tiny("gpt2"),
    "T5": lambda: tiny("t5"),
}
# The most that logits may differ, as a share of their spread: GGUF rounds weights anew, graphs round inputs.
TOLERANCE = {"gguf-f16": 0.05, "gguf-q8_0": 0.5, "gguf-q4_0": 5.0, "openvino": 1.0, "onnx": 0.5}
W8A8 = ("int8-dynamic", "SmoothQuant")  # here inputs have one scale for a batch, there one for each token


def technique(name: str, **settings) -> Callable[[nn.Module], nn.Module]:
    def made(model: nn.Module) -> nn.Module:
        return get(name)(model, context(model), **settings)[0]

    return made


def blocks_of(model: nn.Module) -> list:
    return anatomy(model).blocks


def magnitude(model: nn.Module) -> nn.Module:
    for layer in prunable(model):
        weight = layer.module.weight.data
        weight[weight.abs() < weight.abs().median()] = 0
    return model


GRID = {"group_size": 16}
ROWS = {
    "dense": lambda model: model,
    "magnitude, 50 %": magnitude,
    "BF16": technique("cast", dtype="bfloat16"),
    "blocks dropped": lambda model: drop_blocks(model, {stack: [0] for stack in anatomy(model).stacks}),
    "FFN channels, as many in each block": lambda model: keep_ffn(
        model, {block.name: range(32) for block in blocks_of(model)}
    ),
    "FFN channels, other numbers": lambda model: keep_ffn(
        model, {block.name: range(8 * (i + 1)) for i, block in enumerate(blocks_of(model))}
    ),
    "heads, as many in each block": lambda model: keep_heads(
        model, {attention.name: [0, 1] for block in blocks_of(model) for attention in block.attentions}
    ),
    "SVD": technique("low-rank", rank=8),
    "RTN, 8 bits per channel": technique("rtn", bits=8),
    "RTN, 4 bits": technique("rtn", bits=4, **GRID),
    "RTN, 4 bits, including embeddings": technique("rtn", bits=4, embeddings=True, **GRID),
    "RTN, 3 bits": technique("rtn", bits=3, **GRID),
    "NF4": technique("nf4", **GRID),
    "GPTQ, 4 bits": technique("gptq", bits=4, **GRID),
    "AWQ, 4 bits": technique("awq", bits=4, **GRID),
    "int8-dynamic": technique("int8-dynamic"),
    "SmoothQuant": technique("smoothquant"),
}
HEAD = """# Techniques and formats

Written, read back and compared on tiny random models by `python tests/format_grid.py`, which writes this
page; the tests try most of it again. `lmcompress.save(model, folder, format=...)` writes a format,
`python -m lmcompress.study.apply … --format FORMAT` a recipe's result; `lmcompress.formats.refusal(model,
format)` returns the sentence of a refusal before anything is written.

{formats}

✓: read back by that library the logits are equal (transformers, compressed-tensors), or within the format's
precision; other tests read such folders in a process without this package. GGUF rounds matrices anew, in
blocks of 32. Graphs keep integers and 16-bit weights as they are; OpenVINO computes in bfloat16 where the
processor does, and both runtimes round the inputs of integers. 8-bit inputs have one scale per batch here,
one per token in compressed-tensors, and are not rounded in GGUF.
✓ᵢ: transformers alone stops with an error, and reads it once `import lmcompress` was done. A number is a
refusal, whose sentence stands below.

No file is both sparse and quantized: none of these formats has a bitmask over packed integers (that of
compressed-tensors is a legacy, and of floating-point weights), and zeros of pruned weights are stored as
integers like any others. What such a file would weigh is computed for a row (`bitmask` in its bytes), not
written.
"""


def try_cell(model: str, row: str, format: str) -> str:
    """Return a tick, or the sentence of the refusal."""
    dense = MODELS[model]()
    made = ROWS[row](MODELS[model]())
    if reason := formats.refusal(made, format):
        return reason
    batch = inputs(made, padded=True)
    with tempfile.TemporaryDirectory() as folder:
        saved = formats.save(made, Path(folder) / "m", format=format)
        again, _ = formats.load(saved, dtype=torch.float32 if format in TOLERANCE else None)
        kept = transformers.PreTrainedConfig.get_config_dict(saved)[0]
        # They round no inputs, and graphs compute in 32 bits.
        reference = dense_copy(made).float() if format in TOLERANCE else made
        expected, found = logits(reference, batch).float(), logits(again, batch).float()
    difference = float((found - expected).abs().max() / expected.std())
    allowed = TOLERANCE.get(format, 1e-4)
    if format == "compressed-tensors" and row in W8A8:
        allowed = float((expected - logits(dense, batch)).abs().max() / expected.std()) * 2
    assert difference <= allowed, f"{model}, {row}, {format}: {difference:.2g} of the spread"
    return AFTER_IMPORT if kept["model_type"].startswith("lmcompress") else TICK


def page_of(cells: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the page: for each model a table of marks, and the sentences once."""
    readers = [f"- `{name}`: {entry.reader}" for name, entry in FORMATS.items()]
    lines, sentences = [HEAD.format(formats="\n".join(readers))], []
    for model, rows in cells.items():
        lines += [f"## {model}", "", f"| | {' | '.join(FORMATS)} |", f"|---|{':-:|' * len(FORMATS)}"]
        for row, outcomes in rows.items():
            marks = []
            for outcome in outcomes.values():
                if outcome not in (TICK, AFTER_IMPORT, *sentences):
                    sentences.append(outcome)
                ticked = outcome in (TICK, AFTER_IMPORT)
                marks.append(outcome if ticked else str(sentences.index(outcome) + 1))
            lines.append(f"| {row} | {' | '.join(marks)} |")
        lines.append("")
    lines += ["## Refusals", "", *(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1)), ""]
    return "\n".join(lines)


def read_page(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return the cells of a page."""
    tables, _, refusals = text.partition("## Refusals")
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", refusals, flags=re.M))
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for section in tables.split("\n## ")[1:]:
        model, _, table = section.partition("\n")
        for line in table.splitlines()[3:]:
            if line.startswith("|"):
                row, *marks = (cell.strip() for cell in line.strip("| ").split(" | "))
                outcomes = [sentences.get(mark, mark) for mark in marks]
                cells.setdefault(model, {})[row] = dict(zip(FORMATS, outcomes, strict=True))
    return cells


def main() -> None:
    """Try all cells; the page is written only if each gives what it should."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cells, failures = {model: {row: {} for row in ROWS} for model in MODELS}, []
    for model, row, format in itertools.product(MODELS, ROWS, FORMATS):
        try:
            cells[model][row][format] = try_cell(model, row, format)
        except AssertionError as error:
            failures.append(str(error))
            print(error, file=sys.stderr)
    if failures:
        sys.exit(f"{len(failures)} cells fail")
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page_of(cells), encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
