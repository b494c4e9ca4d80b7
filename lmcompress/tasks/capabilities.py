"""Which models can do which task, read from the model itself, and said in a sentence when they cannot."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

NEEDS = {
    "classification": "a model with a classification head of one class a text",
    "multi-label": "a head whose problem_type is multi_label_classification",
    "regression": "a regression head: one output (num_labels 1)",
    "similarity": "an encoder, or a regression head on one",
    "language modelling": "a decoder with a language-model head (a bidirectional encoder has no perplexity)",
    "generation": "an encoder-decoder with a language-model head",
    "writing": "a model that writes: an encoder-decoder or a decoder with a language-model head",
}
_TASKS_FOR = {
    "classification": "classification (sst2, pydocs-library, your own .csv)",
    "multi-label": "multi-label classification (your own .csv)",
    "regression": "regression (your own .csv)",
    "similarity": "sentence similarity (stsb)",
    "language modelling": "perplexity and minimal pairs (pydocs-lm, wikitext2, tinystories, blimp)",
    "generation": "generation (pydocs-summary, multi30k-en-de, multi30k-en-fr)",
}


def bare(loaded: Any) -> nn.Module:
    """Return the model of a `models.LoadedModel`, or the model itself."""
    return loaded if isinstance(loaded, nn.Module) else loaded.model


def is_encoder(model: nn.Module) -> bool:
    """Return whether the model reads in both directions and has no decoder."""
    config, name = getattr(model, "config", None), architecture_name(model)
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    is_masked = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "EncoderModel" in name or (is_masked and not is_decoder)


def capabilities(model: nn.Module) -> set[str]:
    """Return what a model can be asked for: a subset of the keys of `NEEDS`."""
    config, name = getattr(model, "config", None), architecture_name(model)
    abilities = {"similarity"} if is_encoder(model) else set()
    if "SequenceClassification" in name:
        outputs, problem = getattr(config, "num_labels", 2), getattr(config, "problem_type", None)
        # transformers trains one output as a regression, and several as classes or, if labels are floats, as
        # several classes a text, where the config says nothing.
        if outputs == 1 and problem in (None, "regression"):
            abilities |= {"regression", "similarity"}
        elif outputs > 1 and problem in (None, "single_label_classification"):
            abilities.add("classification")
        if problem == "multi_label_classification" or (problem is None and outputs > 1):
            abilities.add("multi-label")
    if "ConditionalGeneration" in name and getattr(config, "is_encoder_decoder", True):
        abilities.add("generation")
    if ("CausalLM" in name or "LMHead" in name) and not is_encoder(model):
        abilities.add("language modelling")
    return abilities | ({"writing"} if abilities & {"generation", "language modelling"} else set())


@torch.no_grad()
def reads_ahead(model: nn.Module) -> bool:
    """Return whether a token changes the logits before it: then their likelihood is no perplexity.

    Two rows that differ in their last token are run as one batch, so that earlier positions compute the same:
    even in bfloat16 their logits are equal, whereas attention in both directions moves them by 0.2 % or more.
    """
    device = next((parameter.device for parameter in model.parameters()), getattr(model, "device", "cpu"))
    ids = torch.arange(1, 9, device=device).repeat(2, 1) % model.config.vocab_size
    ids[1, -1] = 0
    was_training = model.training
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    model.train(was_training)
    change = (logits[0] - logits[1]).abs().mean(-1)
    return bool(change[:-1].max() > 0.001 * change[-1])


def architecture_name(model: nn.Module) -> str:
    """Return the name of the model's class; of a wrapper around an exported model, what its config says."""
    if stands_for := getattr(model, "stands_for", None):
        return stands_for
    name = type(model).__name__
    if isinstance(model, PreTrainedModel) or any(mark in name for mark in ("For", "LMHead")):
        return name
    return (getattr(getattr(model, "config", None), "architectures", None) or [name])[0]


def describe(model: nn.Module) -> str:
    """Return a sentence: what this model is and which tasks it can do, or how it comes to do one."""
    config, can = getattr(model, "config", None), capabilities(model)
    able = "; ".join(tasks for ability, tasks in _TASKS_FOR.items() if ability in can)
    if not able and getattr(config, "problem_type", None):
        outputs = f"{config.problem_type} with {config.num_labels} outputs"
        able = f"no task: its head was trained as {outputs} (problem_type in its config)"
    elif "classification" not in can:
        able = (
            f"{able or 'no task as it is'}. A head is loaded with lmcompress.load(name, head=...), and "
            'trained on labelled texts with Study.baseline(..., finetune="train.csv")'
        )
    family = getattr(config, "model_type", "unknown family")
    return f"This model ({type(model).__name__}, {family}) can do {able}."
