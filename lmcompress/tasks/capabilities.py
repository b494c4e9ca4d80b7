"""Which models can do which task, read from the model itself, and said in a sentence when they cannot."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

NEEDS = {
    "classification": "a model with a classification head",
    "similarity": "an encoder, or a regression head on one",
    "language modelling": "a decoder with a language-model head (a bidirectional encoder has no perplexity)",
    "generation": "an encoder-decoder with a language-model head",
}
_TASKS_FOR = {
    "classification": "classification (sst2, pydocs-library, your own .csv)",
    "similarity": "sentence similarity (stsb)",
    "language modelling": "perplexity and minimal pairs (pydocs-lm, wikitext2, tinystories, blimp)",
    "generation": "generation (pydocs-summary, multi30k-en-de, multi30k-en-fr)",
}


def bare(loaded: Any) -> nn.Module:
    """The model of a `models.LoadedModel`, or the model itself."""
    return loaded if isinstance(loaded, nn.Module) else loaded.model


def is_encoder(model: nn.Module) -> bool:
    """Whether the model reads in both directions and has no decoder."""
    config, name = getattr(model, "config", None), architecture_name(model)
    if "EncoderModel" in name:
        return True
    masked = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (
        masked
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "is_encoder_decoder", False)
    )


def capabilities(model: nn.Module) -> set[str]:
    """What a model can be asked for: a subset of the keys of `NEEDS`."""
    config, name = getattr(model, "config", None), architecture_name(model)
    abilities = {"similarity"} if is_encoder(model) else set()
    if "SequenceClassification" in name:
        abilities.add("similarity" if getattr(config, "num_labels", 2) == 1 else "classification")
    if "ConditionalGeneration" in name:
        abilities.add("generation")
    if ("CausalLM" in name or "LMHead" in name) and not is_encoder(model):
        abilities.add(
            "language modelling"
        )  # BertLMHeadModel without is_decoder looks both ways, so it is not one
    return abilities


def architecture_name(model: nn.Module) -> str:
    """Name of the model's class; a wrapper around an exported model is what its config says it was."""
    if stands_for := getattr(model, "stands_for", None):
        return stands_for
    name = type(model).__name__
    if isinstance(model, PreTrainedModel) or any(mark in name for mark in ("For", "LMHead")):
        return name
    return (getattr(getattr(model, "config", None), "architectures", None) or [name])[0]


def describe(model: nn.Module) -> str:
    """One sentence: what this model is and which tasks it can do."""
    can = [_TASKS_FOR[ability] for ability in _TASKS_FOR if ability in capabilities(model)]
    family = getattr(getattr(model, "config", None), "model_type", "unknown family")
    able = (
        "; ".join(can)
        if can
        else "no task as it is: load it with the head that fits (lmcompress.models.loading.load(head=...))"
    )
    return f"This model ({type(model).__name__}, {family}) can do {able}."
