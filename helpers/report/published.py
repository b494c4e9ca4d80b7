"""Figures that others published, with what would run them; the sections turn them into cards."""

from helpers.figures.weights import TECHNIQUE
from helpers.report.cards import Figures

WANDA = "Llama-2-7B (Sun et al. 2024)"
PROTOCOL = "WikiText-2 perplexity, half of the weights, one shot, 128 x 2,048 tokens of C4"
OPT = "OPT-125M, WikiText-2 (Frantar et al. 2023)"
_PRUNE = "python -m helpers.run.runner --only 02 -p decoder={} -p decoder_task=wikitext2"
_HALF = {"sparsity": 0.5}
PRUNING = (
    Figures(
        "dense 5.12, magnitude 14.89, SparseGPT 6.51, Wanda 6.42; 4:8 16.48 / 8.12 / 7.97; 2:4 54.59 / 10.17 / 11.02",
        f"{WANDA}, {PROTOCOL}", "Llama-2-7b-hf", "wikitext2",
        (
            ("dense", {}, 5.12), ("magnitude-layer", _HALF, 14.89), ("sparsegpt", _HALF, 6.51), ("wanda", _HALF, 6.42),
            ("magnitude-layer", {"pattern": "4:8"}, 16.48), ("sparsegpt", {"pattern": "4:8"}, 8.12),
            ("wanda", {"pattern": "4:8"}, 7.97), ("magnitude-layer", {"pattern": "2:4"}, 54.59),
            ("sparsegpt", {"pattern": "2:4"}, 10.17), ("wanda", {"pattern": "2:4"}, 11.02),
        ),
        _PRUNE.format("meta-llama/Llama-2-7b-hf"),
        differences="needs the Hub and a GPU",
    ),
    Figures(
        "SparseGPT 37.07, Wanda 38.96", "OPT-125M, WikiText-2 perplexity, 50 % one shot", "opt-125m", "wikitext2",
        (("sparsegpt", _HALF, 37.07), ("wanda", _HALF, 38.96)), _PRUNE.format("facebook/opt-125m"),
        differences="needs the Hub",
    ),
    Figures(
        "dense 30.6; 10/50/90/95/99 %: 31.1/8015/5894/6844/15580 (fine-tuned 21.6/34.7/831/1448/1724)",
        "GPT-2 small, WikiText-2 perplexity, global magnitude on everything, embeddings too, one shot",
        "gpt2", "wikitext2",
        (("dense", {}, 30.6), *(
            ("magnitude-global", {"sparsity": level, "policy": "all"}, value)
            for level, value in ((0.1, 31.1), (0.5, 8015), (0.9, 5894), (0.95, 6844), (0.99, 15580))
        )),
        "python -c \"from lmcompress.study.study import Study; s = Study('02_pruning', profile='paper')"
        ".baseline('openai-community/gpt2', 'wikitext2'); "
        "[s.measure('magnitude-global', sparsity=x, policy='all') for x in (.1, .5, .9, .95, .99)]\"",
        tolerance=0.1, differences="needs the Hub",
    ),
    Figures(
        "Spearman .867", "all-MiniLM-L6-v2, STS-B validation, cosine of mean-pooled states", "all-MiniLM-L6-v2", "stsb",
        (("dense", {}, 0.867),), "make report PROFILE=reference", tolerance=0.002,
    ),
)  # fmt: skip
_QUANTIZE = "python -m helpers.run.runner --only 05 -p {}"
QUANTIZATION = (
    Figures(
        "dense 27.66, RTN4 37.28, GPTQ4 31.1 to 31.9; groups of 128: RTN4 30.48, GPTQ4 29.45", OPT,
        "opt-125m", "wikitext2",
        (
            ("dense", {}, 27.66), ("rtn", {"bits": 4}, 37.28), ("gptq", {"bits": 4}, 31.5),
            ("rtn", {"bits": 4, "group_size": 128}, 30.48), ("gptq", {"bits": 4, "group_size": 128}, 29.45),
        ),
        _QUANTIZE.format("decoder=facebook/opt-125m -p decoder_task=wikitext2"), differences="needs the Hub",
    ),
    Figures(
        "accuracy .868 to .876, 256 to 132 MB, 26.0 to 12.5 ms", "DistilBERT, CLINC150, int8 (Tunstall et al. 2022)",
        "distilbert-base-uncased-distilled-clinc", "clinc", (("dense", {}, 0.868), ("int8-dynamic", {}, 0.876)),
        _QUANTIZE.format("encoder=transformersbook/distilbert-base-uncased-distilled-clinc -p encoder_task=clinc.csv"),
        differences="needs the Hub",
    ),
)  # fmt: skip
_FRACTIONS = {  # model: fractions of all weights above 0.1 and above 1
    "openai-community/gpt2-xl": (1.842e-2, 2.400e-6),
    "FacebookAI/roberta-large": (9.441e-2, 6.754e-8),
    "google-t5/t5-3b": (5.346e-1, 2.357e-2),
}
_ABOVE = {"fraction_above_0_1": "0.1", "fraction_above_1": "1"}
WEIGHTS = tuple(
    Figures(
        f"{100 * value:.4g} % of the weights above {_ABOVE[name]}", f"{model}, all tensors", model, None,
        ((TECHNIQUE, None, value),), f"python -m helpers.run.runner --only 01 -p statistics_models=[{model}]",
        read=lambda row, name=name: row["achieved"]["overall"][name], differences="needs the Hub",
    )
    for model, values in _FRACTIONS.items()
    for name, value in zip(_ABOVE, values, strict=True)
)  # fmt: skip
