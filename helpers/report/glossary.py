"""What the words of the report mean: techniques in general, parts of their names, tasks."""

DEFINITIONS = {
    "Sparsification": (
        "makes many of a model's numbers exactly zero, weights or activations. The shape stays; a "
        "zero saves bytes only in "
        "a format that leaves it out, and time only in a kernel that skips it."
    ),
    "Pruning": (
        "removes what matters least. Unstructured pruning zeroes single weights and so sparsifies; "
        "structured pruning takes "
        "whole heads, channels, blocks or words away, and leaves a smaller dense model."
    ),
    "Quantization": (
        "stores weights, and sometimes activations, in fewer bits: rounded to a grid whose scale is "
        "kept per row or per "
        "group. The number of weights stays. It saves bytes at once, and time where the machine "
        "multiplies such numbers."
    ),
    "Distillation": (
        "trains a smaller model, the student, on the outputs of the large one, the teacher, rather "
        "than on the labels alone. "
        "What it gives is the difference to the same student trained on the labels."
    ),
    "MoEfication": (
        "splits a trained feed-forward into experts and computes, for each token, only those that a router picks. All "
        "weights stay; work per token falls."
    ),
}


NAMES = """\
In the names of what was done, *per row* and *groups of 32* say which weights share a scale, *embeddings too* that the token
table is rounded as well as the blocks. *Heads and FFN, first order* is structured pruning of attention heads and
feed-forward channels, by how fast the loss changes when one is switched off. Arrows are steps one after another. *Bitmask*
is a form of storing in which one bit per weight says whether it is zero, and zeros are left out; *CSR* lists the places of
the others instead. *GPTQ* rounds a matrix column by column and lets the columns still to come make up for the error;
*quantization-aware training* rounds while it trains; *Wanda* and *SparseGPT* are rules of pruning. *OpenVINO* and *ONNX Runtime* are
other programs that run the model: named alone, with nothing rounded to integers."""
TASKS = {  # what is asked of a model, by the name of the task
    "pydocs-library": "which library a docstring's summary line documents",
    "pydocs-signature": "whether a docstring's summary line belongs to a signature",
    "pydocs-lm": "the next token of Python docstrings",
    "pydocs-summary": "a docstring's summary line, from its signature and body",
    "sst2": "whether a film review is good or bad (SST-2)",
    "stsb": "how alike two sentences are (STS-B)",
    "wikitext2": "the next token of Wikipedia (WikiText-2)",
    "tinystories": "the next token of children's stories (TinyStories)",
    "multi30k-en-de": "German for English captions (Multi30k)",
    "multi30k-en-fr": "French for English captions (Multi30k)",
}


def definitions() -> str:
    """The five words that the sections use, a short paragraph each."""
    return "\n\n".join(f"**{word}** {text}" for word, text in DEFINITIONS.items())
