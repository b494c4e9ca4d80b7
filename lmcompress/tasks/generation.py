"""Text in, text out: an encoder-decoder's greedy output or a decoder's continuation, against one reference.

It is scored by sacrebleu and ROUGE; the reference's likelihood (teacher forcing) is the steadier number.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import GenerationConfig

from lmcompress.errors import BadData, BadSetting
from lmcompress.stats import RatioOfSums, Statistic
from lmcompress.tasks import metrics
from lmcompress.tasks.base import Columns, Run, Task
from lmcompress.tasks.batching import IGNORED, MAX_TOKENS, max_length, pad_id, positions, said_cut
from lmcompress.tasks.capabilities import capabilities
from lmcompress.tasks.language_modelling import (
    CONTEXT_TOKENS,
    byte_ends,
    continuations,
    for_training,
    lm_budget,
    summed_nll,
    token_nll,
)

SUMMARY_PROMPT = "summarize: {signature}\n{body}"
TRANSLATION_PROMPT = "translate English to {language}: {text}"
SOURCE_TOKENS, TARGET_TOKENS = 256, 64
SAMPLES = 5  # outputs kept to be read
COLLAPSED_SHARE = 0.5  # of the outputs degenerate, or one and the same


@dataclass(eq=False, kw_only=True)
class Generation(Task):
    """Examples `{"text", "target"}`; text is the whole prompt.

    Attributes:
        metric: "bleu" or "chrf", of the corpus.
        english: whether ROUGE is scored too (rouge-score splits words of plain English only).
        source_tokens: of a prompt, at most.
        max_new_tokens: greedy generation stops there, and so does a target that is trained on.
    """

    kind: ClassVar[str] = "generation"
    needs: ClassVar[str] = "generation"
    text_fields: ClassVar[tuple[str, ...]] = ("text", "target")
    split_fields: ClassVar[tuple[str, ...] | None] = ("text",)
    unit: ClassVar[str] = "0-100"
    likelihood: ClassVar[str | None] = "bits_per_byte"

    metric: str = "chrf"
    english: bool = False
    source_tokens: int = SOURCE_TOKENS
    max_new_tokens: int = TARGET_TOKENS

    @property
    def further(self) -> tuple[str, ...]:
        """The other corpus score, bits per byte of the reference, and ROUGE for English."""
        return ("bleu", "chrf", "bits_per_byte", *(metrics.ROUGE if self.english else ()))

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[list[str], list[str]]:
        """Return outputs and targets."""
        return run.outputs, [example["target"] for example in self.examples]

    def identity(self) -> dict:
        """Return metric and length limits."""
        names = ("metric", "max_new_tokens", "source_tokens")
        return {name: getattr(self, name) for name in names}

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return BLEU's and chrF's counts, `sentence_chrf`, ROUGE, `degenerate`; targets' `nll`, `bytes`."""
        length = max_length(run.tokenizer, run.model, cap=self.source_tokens)
        whole = max_length(run.tokenizer, run.model) - 1  # room for the end token
        make = partial(_pairs, run.tokenizer, self.examples, source_tokens=length, target_tokens=whole)
        items, sizes, cut = self.cached(run.tokenizer, ("pairs", length, whole), make)

        def reference_nll(batch: dict[str, torch.Tensor]) -> np.ndarray:
            logits = run.model(**batch, use_cache=False).logits  # it makes its decoder inputs from the labels
            return token_nll(logits, batch["labels"]).sum(dim=1).numpy()

        nll = np.array(run.batches(items, reference_nll, batch_tokens=lm_budget(run)))
        outputs = self._generated(run, [item["input_ids"] for item in items])
        columns, details = self._scored(run, {"nll": nll, "bytes": sizes}, outputs)
        return columns, details | cut

    def _generated(self, run: Run, prompts: list[list[int]], **settings) -> list[str]:
        """Return what the model writes (a decoder after its prompt): plain greedy search."""
        follows = not getattr(run.model.config, "is_encoder_decoder", False)
        config = deepcopy(getattr(run.model, "generation_config", None)) or GenerationConfig()
        plain = {"do_sample": False, "num_beams": 1, "early_stopping": False, "no_repeat_ngram_size": 0}
        lengths = {"max_new_tokens": self.max_new_tokens, "max_length": None, "min_length": 0}
        config.update(**plain, **lengths, pad_token_id=pad_id(run.tokenizer, run.model), **settings)

        def generate(batch: dict[str, torch.Tensor]) -> list[str]:
            start = batch["input_ids"].shape[1] if follows else 0
            ids = run.model.generate(**batch, generation_config=config)[:, start:]
            return run.tokenizer.batch_decode(ids, skip_special_tokens=True)

        items = [{"input_ids": ids} for ids in prompts]
        return [text.strip() for text in run.batches(items, generate, left=follows)]

    def _scored(self, run: Run, columns: Columns, outputs: list[str]) -> tuple[Columns, dict]:
        """Return `columns` with those comparing outputs with targets, and details worth recording."""
        run.outputs[:] = outputs
        references = [example["target"] for example in self.examples]
        columns |= metrics.bleu.columns(outputs, references) | metrics.chrf.columns(outputs, references)
        columns["sentence_chrf"] = metrics.sentence_chrf(outputs, references)
        repeated = repeated_output(outputs)
        broken = [metrics.is_degenerate(output) or output == repeated for output in outputs]
        columns["degenerate"] = np.array(broken, dtype=np.float64)
        if self.english:
            columns |= metrics.rouge(outputs, references)
        signatures = {"bleu": metrics.bleu.signature(), "chrf": metrics.chrf.signature()}
        samples = [{**e, "output": output} for e, output in zip(self.examples[:SAMPLES], outputs)]
        return columns, {"signatures": signatures, "decoding": "greedy", "samples": samples}

    def check_collapsed(self, columns: Columns, value: float, run: Run) -> tuple[None, str | None, dict]:
        """Return no floor; repetition, silence and always saying the same are collapses."""
        n, broken = len(columns["degenerate"]), int(columns["degenerate"].sum())
        if not np.isfinite(columns["nll"]).all():
            return None, "the model's outputs are not finite numbers", {}
        if broken > COLLAPSED_SHARE * n:
            return None, f"{broken} of {n} outputs are empty, repeat themselves or each other", {}
        return None, None, {}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return prompt tokens and, as labels, target tokens with the end token."""
        source_tokens = max_length(tokenizer, model, cap=length or self.source_tokens)
        target_tokens = max_length(tokenizer, model, cap=self.max_new_tokens) - 1
        return _pairs(tokenizer, examples, source_tokens=source_tokens, target_tokens=target_tokens)[0]


@dataclass(eq=False, kw_only=True)
class Continuation(Generation):
    """How a decoder goes on from the last `prompt_tokens` tokens of "text", against what followed, "target".

    All prompts are of one length, so that nothing has to be padded on the left.
    """

    kind: ClassVar[str] = "continuation"
    needs: ClassVar[str] = "language modelling"

    prompt_tokens: int = 32

    def identity(self) -> dict:
        """Return metric and length limits."""
        return super().identity() | {"prompt_tokens": self.prompt_tokens}

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return columns as of `Generation`; `nll` and `bytes` are of the target, given the same prompt.

        Raises:
            BadData: a prompt is shorter than `prompt_tokens`.
        """
        prompts, targets = (
            run.tokenizer([e[name] for e in self.examples], add_special_tokens=False)["input_ids"]
            for name in ("text", "target")
        )
        if short := [ids for ids in prompts if len(ids) < self.prompt_tokens]:
            raise BadData(
                f"{self.name}: {len(short)} prompts have fewer than {self.prompt_tokens} tokens; set "
                "prompt_tokens lower."
            )
        prompts = [ids[-self.prompt_tokens :] for ids in prompts]
        items = [
            {"input_ids": [*p, *t[:-1]], "labels": [IGNORED] * (len(p) - 1) + t}
            for p, t in zip(prompts, targets, strict=True)
        ]
        sizes = np.array([len(e["target"].encode()) for e in self.examples])
        # As many tokens for every model: a short text scores low.
        outputs = self._generated(run, prompts, min_new_tokens=self.max_new_tokens)
        return self._scored(run, {"nll": summed_nll(run, items), "bytes": sizes}, outputs)


@dataclass(eq=False, kw_only=True)
class SourceTarget(Generation):
    """A user's own sources and targets: an encoder-decoder reads the source, a decoder goes on after it.

    A metric of `evaluate` that is not ours is computed on each output by itself; its mean is the score.
    """

    needs: ClassVar[str] = "writing"
    metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf", "exact_match", *metrics.ROUGE)

    source_tokens: int = MAX_TOKENS
    max_new_tokens: int = 128
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.english = self.english or self.metric in metrics.ROUGE

    @property
    def further(self) -> tuple[str, ...]:
        """Exact matches, too."""
        return ("exact_match", *super().further)

    @property
    def statistic(self) -> Statistic:
        """The metric as a function of columns."""
        return RatioOfSums(self.metric, None) if self._foreign else super().statistic

    def metric_inputs(self, columns: Columns, run: Run) -> None:
        """Return nothing: the statistics are the metrics."""

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return columns as of `Generation`, `exact_match`, and those of a foreign metric."""
        if "generation" in capabilities(run.model):
            return super().score(run)
        make = partial(self._continued, run.tokenizer, self.examples, model=run.model)
        items, sizes, cut = self.cached(run.tokenizer, ("continued", positions(run.model)), make)
        room = max_length(run.tokenizer, run.model, cap=CONTEXT_TOKENS) - self.max_new_tokens
        if room < 2:
            raise BadSetting(
                f"{self.name}: max_new_tokens {self.max_new_tokens} leaves no room for a prompt within the "
                f"model's {room + self.max_new_tokens} tokens. Set it lower."
            )
        # The label of the last token of a prompt is the first of its target's.
        counts = [sum(label == IGNORED for label in item["labels"]) + 1 for item in items]
        prompts = [item["input_ids"][:count] for item, count in zip(items, counts)]
        over = said_cut(sum(len(ids) > room for ids in prompts), len(prompts), room)
        prompts = [ids[:1] + ids[1:][-(room - 1) :] for ids in prompts]
        ends = getattr(getattr(run.model, "generation_config", None), "eos_token_id", None)
        ends = run.tokenizer.eos_token_id if ends is None else ends
        outputs = self._generated(run, prompts, eos_token_id=ends)
        columns, details = self._scored(run, {"nll": summed_nll(run, items), "bytes": sizes}, outputs)
        return columns, details | cut | over

    def _scored(self, run: Run, columns: Columns, outputs: list[str]) -> tuple[Columns, dict]:
        columns, details = super()._scored(run, columns, outputs)
        targets = [example["target"] for example in self.examples]
        columns["exact_match"] = np.array([a == b for a, b in zip(outputs, targets)], dtype=np.float64)
        if self._foreign:
            scores = [self._foreign.of([output], [target]) for output, target in zip(outputs, targets)]
            columns[self.metric] = np.array(scores)
        return columns, details

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return what `Generation` trains on; for a decoder source and target, with the target's labels."""
        if model is None or "generation" in capabilities(model):
            return super().features(tokenizer, examples, length=length, model=model)
        return for_training(self._continued(tokenizer, examples, length=length, model=model)[0])

    def _continued(
        self, tokenizer: Any, examples: list[dict], **limits
    ) -> tuple[list[dict], np.ndarray, dict]:
        texts, targets = ([example[name] for example in examples] for name in ("text", "target"))
        return continuations(tokenizer, texts, targets, closed=True, **limits)


def repeated_output(outputs: list[str]) -> str | None:
    """Return the text that more than half of ten or more outputs consist of, if there is one."""
    text, count = Counter(outputs).most_common(1)[0]
    return text if len(outputs) >= 10 and count > COLLAPSED_SHARE * len(outputs) else None


def _pairs(
    tokenizer: Any, examples: list[dict], *, source_tokens: int, target_tokens: int
) -> tuple[list[dict], np.ndarray, dict]:
    """Return inputs and labels, truncated, closed by the end token; bytes `(n,)` of labels' texts; cuts."""
    settings, fast = {"truncation": True, "return_attention_mask": False}, bool(tokenizer.is_fast)
    texts, targets = ([example[name] for example in examples] for name in ("text", "target"))
    sources = tokenizer(texts, max_length=source_tokens, **settings)
    settings |= {"max_length": target_tokens, "return_offsets_mapping": fast}
    encoded = tokenizer(text_target=targets, **settings)
    over = {
        name: sum(bool(encoding.overflowing) for encoding in side.encodings or ())
        for name, side in (("cut", sources), ("cut_targets", encoded))
    }
    items, sizes = [], []
    for i, (source, ids, target) in enumerate(zip(sources["input_ids"], encoded["input_ids"], targets)):
        cut = fast and len(ids) >= target_tokens
        sizes.append(byte_ends(target, encoded["offset_mapping"][i])[-1] if cut else len(target.encode()))
        end = tokenizer.eos_token_id
        labels = ids if end is None or ids[-1:] == [end] else [*ids, end]
        items.append({"input_ids": source, "labels": labels})
    cuts = said_cut(over["cut"], len(items), source_tokens)
    cuts |= said_cut(over["cut_targets"], len(items), target_tokens, "cut_targets")
    return items, np.array(sizes, dtype=np.float64), cuts
