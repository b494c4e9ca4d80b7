"""The model card of a pocket model, said from its training.json so that no number in it is typed."""

_SHAPES = {
    "gpt2": ("GPT-2", "4 blocks, d = 256, 8 heads, feed-forward 1024 (GELU), learned positions up to 512"),
    "llama": (
        "LLaMA",
        "4 blocks, d = 256, 8 heads over 4 key/value heads, SwiGLU 704, rotary positions up to 512",
    ),
    "t5": ("T5", "3 + 3 blocks, d = 256, 8 heads, feed-forward 512 (ReLU), relative positions"),
}
_DATA = (
    "Docstrings of the Python standard library and of this project's installed dependencies, harvested on the "
    "spot with `lmcompress.corpus.pydocs` (nothing is downloaded, none of the text is committed); the `train` split only."
)


def model_card(kind: str, training: dict) -> str:
    """Markdown with the front matter the Hub reads.

    Args:
        training: what `training.json` holds.
    """
    name, shape = _SHAPES[kind]
    scores, last = training["validation"], [phase["training"][-1] for phase in training["phases"].values()]
    tokens, hours = sum(p["tokens"] for p in last), sum(p["seconds"] for p in last) / 3600
    scored = (
        "summary lines, given signature and body" if kind == "t5" else "whole documents in windows of 256"
    )
    return f"""---
license: mit
library_name: transformers
language: en
pipeline_tag: {"summarization" if kind == "t5" else "text-generation"}
---

# {kind}-pydocs

A {name}-shaped model of {training["parameters"] / 1e6:.2f} million parameters (tied embeddings counted once) that
this project trained {"from fresh weights and the embeddings of llama-pydocs" if kind == "t5" else "from scratch"}, so that its notebooks have a model to compress without a download.

- **Shape**: {shape}; byte-level BPE of 6144 tokens, shared by the pocket models. Weights in bf16.
- **Data**: {_DATA} Corpus `{training["data"]["corpus"]}`, content of `train` `{training["data"]["train"]}`.
- **Training**: {tokens / 1e6:.1f} million input tokens in {hours:.1f} hours on a CPU with other work on it
  ({training["budget"]["steps"]} steps, peak learning rate {training["budget"]["learning_rate"]}); curves in `training.json`.

## How good is it

Bits per byte on the validation split ({scored}; {scores["tokens"]} tokens, {scores["bytes"]} bytes; lower is better):

| this model | bigram (Witten-Bell) of the same training tokens | unigram |
|---|---|---|
| **{scores["model"]:.3f}** | {scores["bigram"]:.3f} | {scores["unigram"]:.3f} |

The same evaluation's other numbers: {", ".join(f"{k} {v:.3g}" for k, v in sorted(scores["task"].items()) if k != "bits_per_byte")}.

## What it writes

{_samples(kind, training["samples"])}

## Limits

Small and trained briefly: it has the vocabulary, phrasing and layout of docstrings, and no knowledge to speak of.
What it states about a library is not to be believed. It is a specimen for compression, not a tool.

## Make it again

Move this folder away, then

    python -m scripts.make_models.pocket {kind}

or, better and longer, with `--steps {10 * training["budget"]["steps"]}`. `notebooks/90_pocket_models.ipynb` shows the curves.
"""


def _samples(kind: str, samples: list[dict]) -> str:
    if kind == "t5":
        rows = [
            f"| {_cell(s['prompt'][:160])}… | {_cell(s['text'])} | {_cell(s['reference'])} |" for s in samples
        ]
        distinct = len({sample["text"] for sample in samples})
        head = f"Greedy, unpicked: {distinct} different texts in {len(samples)}.\n\n"
        return head + "| signature and body | its summary | the author's |\n|---|---|---|\n" + "\n".join(rows)
    blocks = [f"```\n{s['prompt']}⟦{s['text'].strip()}⟧\n```" for s in samples]
    return "Sampled at temperature 0.7, top-p 0.9, unpicked; what it wrote stands in ⟦⟧.\n\n" + "\n\n".join(
        blocks
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def encoder_card(name: str, training: dict) -> str:
    """Markdown card of a fine-tuned encoder, from what its training.json holds."""
    scores, blocks = training["validation"], training["last_blocks"]
    what = "the whole model" if blocks is None else f"the last {blocks} blocks, the pooler and the classifier"
    form = (
        ""
        if blocks is None
        else PARTIAL_NOTE.format(base=training["base"]) + TASK_NOTES.get(training["task"], "")
    )
    return f"""---
license: apache-2.0
library_name: transformers
language: en
base_model: {training["base"]}
pipeline_tag: text-classification
---

# {name}

`{training["base"]}` fine-tuned by this project on its task `{training["task"]}`: {what}, {training["examples"]} examples,
{training["epochs"]:g} epochs in batches of {training["batch_size"]}, peak learning rate {training["learning_rate"]:g},
{training["seconds"] / 60:.0f} minutes on a CPU with other work on it. {form}

Validation accuracy **{scores["accuracy"]:.3f}** (macro F1 {scores["macro_f1"]:.3f}) on {scores["examples"]} examples; always
naming the most frequent class gives {scores["majority"]:.3f}. Data hash of the validation examples `{training["data_hash"]}`.
"""


def translation_card(name: str, training: dict) -> str:
    """Markdown card of a translator trained from scratch, from what its training.json holds."""
    test, set_, loss = training["test"], training["settings"], training["curve"]["validation"][-1][1]
    epochs = set_["steps"] * set_["batch_size"] / training["examples"]
    language = name[-2:]
    rows = [
        f"| {_cell(s['text'])} | {_cell(s['output'])} | {_cell(s['target'])} |"
        for s in test["details"]["samples"]
    ]
    return f"""---
license: cc-by-nc-sa-4.0
library_name: transformers
language: [en, {language}]
datasets: [bentrevett/multi30k]
pipeline_tag: translation
---

# {name}

A T5-shaped model of {training["parameters"] / 1e6:.2f} million parameters (tied embeddings counted once) that this project trained from
fresh weights on Multi30k (image captions; Elliott et al. 2016), so that its reference profile has a translator to compress.

- **Shape**: {_SHAPES["t5"][1]}; byte-level BPE of both languages, in which
  the instruction of a prompt is one token. Weights in bf16.
- **Training**: {training["examples"]} pairs, {epochs:.1f} epochs in batches of {set_["batch_size"]}, {training["curve"]["seconds"] / 60:.0f} minutes on {training["device"]};
  peak learning rate {set_["learning_rate"]:g}, dropout {set_["hidden_dropout"]:g}, label smoothing {set_["label_smoothing"]:g}.
  Rate and dropout are the better on `validation` of a few that were tried. The last weights; curves in `training.json`.
- **Data licence**: the captions are for non-commercial research use, so these weights are too, unlike the rest of the project.
- **Limits**: it knows captions and nothing else, about as many words as a picture book.

## How good is it

BLEU on `test` (test2016, {test["n"]} captions, greedy): **{test["value"]:.1f}** ({test["low"]:.1f} to {test["high"]:.1f}, 95 %), chrF {test["secondary"]["chrf"]["value"]:.1f};
on `validation` {training["validation"]["value"]:.1f}, where the loss ended at {loss:.2f} nats per token.
Signature: `{test["details"]["signatures"]["bleu"]}`.

| prompt | its translation | the reference |
|---|---|---|
{chr(10).join(rows)}

## Make it again

Move this folder away, then `python -m scripts.make_models.translation en-{language}`.
"""


PARTIAL_NOTE = """The folder holds only the trained tensors, in bf16; `lmcompress.models.loading.load` puts
them over the base (`{base}`, Apache-2.0), `transformers` alone would leave the rest at random.

"""

TASK_NOTES = {
    "pydocs-library": """`pydocs-library` asks which library a docstring's summary line documents, among ten, as many of each; lines that
name their own library are left out. Trained on the harvested `train` split; the text itself is not committed.
Many lines fit several libraries ("Return the maximum along an axis"), so no model reaches 100 %.

Make it again: `python -m lmcompress.train.encoder pydocs` after deleting this folder.""",
    "sst2": """`sst2` asks whether a phrase of a film review is positive (Socher et al. 2013; GLUE, Wang et al. 2018). Trained on its
`train` split for a number of steps fixed beforehand; the validation split was scored once, afterwards.

Make it again: `python -m lmcompress.train.encoder sst2` after deleting this folder.""",
}
