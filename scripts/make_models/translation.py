"""The encoder-decoder of the reference profile: a small T5 trained from scratch to translate image captions.

`python -m scripts.make_models.translation en-de` makes the committed `models/reference/t5-multi30k-en-de`: it
stops and goes on at will (checkpoints under `runs/training/`); what is there already is not trained again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from lmcompress import device
from lmcompress.errors import BadData
from lmcompress.measure.quality import quality
from lmcompress.paths import MODELS, RUNS
from lmcompress.tasks import evaluate, load_task
from lmcompress.tasks.generation import TARGET_TOKENS
from lmcompress.train import pretraining as data
from lmcompress.train.trainer import TrainSpec, curve, fit
from scripts.make_models import pocket
from scripts.make_models.cards import translation_card
from scripts.make_models.publishing import command_line, publish

PAIRS = {"en-de": 4200, "en-fr": 2600}  # steps: 19 epochs of 29,000 pairs, 11
BUDGET = {"batch_size": 128, "learning_rate": 1e-3}
REGULARIZED = {"hidden_dropout": 0.25, "label_smoothing": 0.1}


def folder_of(languages: str) -> Path:
    """Return where the model lies; profiles name it `reference/t5-multi30k-<languages>`."""
    return MODELS / "reference" / f"t5-multi30k-{languages}"


def tokenizer_for(examples: Sequence[dict], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return one byte-level BPE for both languages; the instruction, the same in every prompt, is a token.

    `vocab_size` counts all tokens, the instruction (up to a prompt's first colon) and T5's sentinels too.

    Raises:
        BadData: the prompts do not begin alike.
    """
    beginnings = {example["text"].partition(":")[0] + ":" for example in examples}
    if len(beginnings) != 1:
        raise BadData(f"prompts begin in {len(beginnings)} ways; one instruction up to a colon was expected.")
    (instruction,) = beginnings
    texts = [text for e in examples for text in (e["text"].removeprefix(instruction), e["target"])]
    tokenizer = data.train_tokenizer(texts, vocab_size=vocab_size - 1)
    tokenizer.add_tokens([instruction])
    return data.closing_with_end(tokenizer)


def make(languages: str = "en-de", *, progress: bool = False, **changes: float) -> Path:
    """Return the folder of the translator of `languages`: train it, or go on, where it is not there.

    It is trained on Multi30k's `train`, watched on `validation`, and scored once on `test`, as written (in
    bf16). "en-fr" takes a data set with that column. `changes` are entries of `BUDGET`, or "steps".
    """
    folder = folder_of(languages)
    if (folder / "training.json").exists():
        return folder
    name, settings = f"multi30k-{languages}", {"steps": PAIRS[languages]} | BUDGET | changes | REGULARIZED
    watched, test = load_task(name, split="validation"), load_task(name)
    scored = set(map(test.text_key, test.examples))
    examples = [example for example in watched.training_examples() if test.text_key(example) not in scored]
    tokenizer = tokenizer_for(examples, vocab_size=pocket.VOCABULARY)
    model = pocket.build("t5", tokenizer).to(device.choose().device)
    spec = TrainSpec(
        watched.features(tokenizer, examples, length=None),
        **settings,
        min_learning_rate=settings["learning_rate"] / 50,
        warmup_steps=max(1, settings["steps"] // 20),
        weight_decay=0.05,
        betas=(0.9, 0.98),
        dtype=device.fast_dtype(model.device),
        checkpoint=RUNS / "training" / folder.name,
        checkpoint_every=250,
        evaluate=watched.features(tokenizer, watched.examples, length=None),
        evaluate_every=500,
    )
    with pocket.scaled_queries(model):
        history = fit(model, spec, progress=progress)
    training = {
        "task": name,
        "examples": len(examples),
        "settings": settings,
        "curve": curve(history, points=200),
        "device": device.name(model.device),
    }
    model.generation_config.update(max_new_tokens=TARGET_TOKENS)

    def judge(rounded: nn.Module) -> dict:
        splits = {"validation": watched, "test": test}
        evaluated = {split: quality(evaluate(rounded, tokenizer, task)) for split, task in splits.items()}
        return {split: entry | {"data_hash": splits[split].data_hash} for split, entry in evaluated.items()}

    return publish(folder, model, tokenizer, training, judge, translation_card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: make one translator, or go on making it."""
    languages, changes = command_line(__doc__, PAIRS, arguments)
    logging.getLogger(__name__).info("%s", make(languages, **changes))


if __name__ == "__main__":
    main()
