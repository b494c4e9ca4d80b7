"""A smaller vocabulary: unused tokens are removed from the tokenizer, the embeddings and the heads.

The tokenizer is rebuilt from its own `tokenizer.json`, so that a text made of kept tokens is split as before,
and the model gives the same logits for it at the ids that are left.
"""

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lmcompress.compress import Context, TechniqueResult, technique
from lmcompress.compress.calibration import Batch
from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models import families, loading, surgery
from lmcompress.models.anatomy import anatomy
from lmcompress.paths import scratch_folder

_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # byte fallback, as LLaMA's tokenizer has it


@technique("vocabulary", 1, "Vocabulary pruned", "#117733", "h", needs=("calibration", "tokenizer"))
def prune_vocabulary(model: nn.Module, context: Context, *, min_count: int = 1):
    """Keep the tokens seen at least `min_count` times in `input_ids` and `labels`, and those that must stay.

    These are special and added tokens, ids that the config names, and what the tokenizer needs: see `_sound`.
    New ids are consecutive, in the order of the old.
    """
    backend = getattr(context.tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}
    if spec["model"]["type"] not in _KINDS:
        fast = (
            f"{type(context.tokenizer).__name__} is no fast tokenizer of a known kind ({', '.join(_KINDS)})"
        )
        raise BadSetting(f"{fast}: its tokenizer.json says {spec['model']['type']!r}.")
    table = _input_table(model)
    rows = table.num_embeddings
    counts = count_tokens(context.calibration, rows)
    seen = {int(i) for i in torch.nonzero(counts >= min_count).flatten()}
    named = {i for config in _configs(model) for _, ids in _named_ids(config) for i in ids}
    added = spec["added_tokens"]
    ids = _vocabulary(spec["model"]) | {token["content"]: token["id"] for token in added}
    if unknown := seen - set(ids.values()):
        raise BadData(f"the text has ids without a token, such as {min(unknown)}: of another tokenizer.")
    forced = {token["id"] for token in added} | named
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not table.weight]
    if any(other.padding_idx is not None for other in others):
        forced |= set(range(model.config.pad_token_id))  # RoBERTa: positions count from the padding id on
    tokens = _sound({token for token, i in ids.items() if i in seen | forced}, spec["model"])
    old_ids = sorted(i for token, i in ids.items() if token in tokens and i < rows)
    new = {old: position for position, old in enumerate(old_ids)}
    smaller = _rebuilt(context.tokenizer, spec, new)
    figures = {"vocabulary": len(new), "vocabulary_before": rows, "tokens_seen": len(seen)}
    return model, TechniqueResult("vocabulary", _slice_model(model, new), figures, tokenizer=smaller)


def count_tokens(batches: Sequence[Batch], size: int) -> Tensor:
    """Count each id in `input_ids` where not masked, and in labels that are tokens: `(size,)`."""
    ids = [batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]
    for labels in (batch["labels"] for batch in batches if "labels" in batch):
        if labels.dim() == 2 and not labels.is_floating_point():  # classes and scores are one per example
            ids.append(labels[labels >= 0])
    joined = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long)
    if not len(joined) or int(joined.max()) >= size:
        highest = int(joined.max()) if len(joined) else "none"
        raise BadData(f"the highest id in the calibration text is {highest}; the model has {size} tokens")
    return torch.bincount(joined, minlength=size)


def _vocabulary(model: dict) -> dict[str, int]:
    """Return token -> id of a tokenizer.json's model."""
    if model["type"] == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _sound(tokens: set[str], model: dict) -> set[str]:
    """Return `tokens` and those without which text would be split otherwise, or not at all.

    The unknown token; every single character or byte there is, also as a word's continuation or end; and for
    BPE both sides of every merge that gives a kept token, transitively: then each merge that leads to a kept
    token is still there, and merges that are gone never led to one, so that the order of merging stays.
    """
    vocabulary = _vocabulary(model)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    tokens = tokens | (_BYTES & set(vocabulary))
    tokens |= {token for token in vocabulary if len(token.removeprefix(prefix).removesuffix(suffix)) == 1}
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        tokens.add(model["vocab"][model["unk_id"]][0])
    elif model.get("unk_token") in vocabulary:
        tokens.add(model["unk_token"])
    sides: dict[str, set[str]] = {}
    for first, second, merged in _merges(model):
        sides.setdefault(merged, set()).update((first, second))
    waiting = list(tokens)
    while waiting:
        missing = sides.get(waiting.pop(), set()) - tokens
        tokens |= missing
        waiting += missing
    return tokens


def _merges(model: dict) -> list[tuple[str, str, str]]:
    """Return the merges of a BPE in order of rank, with what each gives; older files write one as a text."""
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    return [(first, second, first + second.removeprefix(prefix)) for first, second in pairs]


def _rebuilt(tokenizer, spec: dict, new: dict[int, int]):
    """Return a tokenizer of the same class with only the tokens in `new` (old id -> new id)."""
    model, old = spec["model"], _vocabulary(spec["model"])
    if model["type"] == "Unigram":
        unknown = model.get("unk_id")
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        model["unk_id"] = None if unknown is None else new[unknown]
    else:
        model["vocab"] = {token: new[i] for token, i in old.items() if i in new}
    if "merges" in model:
        model["merges"] = [list(merge[:2]) for merge in _merges(model) if {*merge} <= model["vocab"].keys()]
    spec["added_tokens"] = [t | {"id": new[t["id"]]} for t in spec["added_tokens"] if t["id"] in new]
    _renumber(spec["post_processor"], new)
    if spec.get("padding"):
        spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # old ids; tokenizer.json has the new
        config.write_text(json.dumps(settings), encoding="utf-8")
        for file in folder.iterdir():  # further files of the old vocabulary (vocab.txt, spiece.model)
            if file.name not in (config.name, "special_tokens_map.json") and file.suffix != ".jinja":
                file.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        return loading.tokenizer_of(folder)


def _renumber(processor: dict | None, new: dict[int, int]) -> None:
    """Put new ids into a post-processor: templates' `ids`, `sep` and `cls` pairs, sequences of processors."""
    processor = processor or {}
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new[i] for i in special["ids"]]
    for name in {"sep", "cls"} & processor.keys():
        processor[name][1] = new[processor[name][1]]


def _input_table(model: nn.Module) -> nn.Embedding:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        raise UnknownFamily(f"{type(model).__name__} has no embedding table of tokens to cut")
    if table.num_embeddings == model.config.hidden_size:
        both = f"as many tokens as hidden dimensions ({table.num_embeddings})"
        raise UnknownFamily(f"{type(model).__name__} has {both}: which bias belongs to tokens is unclear")
    return table


def _slice_model(model: nn.Module, new: dict[int, int]) -> int:
    """Cut every table, head and bias over tokens, and put new ids where old ones were; return how many."""
    table, head, memo = _input_table(model), model.get_output_embeddings(), {}
    rows, index, pad = table.num_embeddings, torch.tensor(list(new)), model.config.pad_token_id
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight]
    tables += [head] if head is not None else []
    for module in tables:
        surgery.cut(module, "weight", 0, index, memo)
        surgery.set_ints(module, ("num_embeddings", "out_features"), len(new))
    inside = {module for block in anatomy(model).blocks for module in block.module.modules()}
    for name, module in model.named_modules():
        # What the module itself adds to the logits: a parameter, tied or not, or a buffer (BART's).
        biases = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, bias in [] if module in inside or families.is_norm(name, module) else biases:
            if not leaf.endswith("bias") or bias.shape[-1:] != (rows,) or bias.numel() != rows:
                continue
            if isinstance(bias, nn.Parameter):
                surgery.cut(module, leaf, bias.dim() - 1, index, memo)
            else:
                setattr(module, leaf, bias.index_select(-1, index.to(bias.device)))
        surgery.set_ints(module, ("vocab_size",), len(new), old=rows)
        if pad in new:
            surgery.set_ints(module, ("padding_idx",), new[pad], old=pad)
    for config in _configs(model):
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(new)
        for name, ids in list(_named_ids(config)):
            moved = [new[i] for i in ids if i in new]
            setattr(config, name, moved if isinstance(getattr(config, name), list) else (moved or [None])[0])
    return len(tables)


def _configs(model: nn.Module) -> list:
    """Return the model's config, copies of it that its stacks hold, and the generation config."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    configs += [model.generation_config] if getattr(model, "generation_config", None) else []
    return list({id(config): config for config in configs}.values())


def _named_ids(config) -> Iterator[tuple[str, list[int]]]:
    """Yield fields of a config that hold ids of tokens, as `eos_token_id`, and the ids in them."""
    for name, value in vars(config).items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and ids and all(isinstance(i, int) for i in ids):
            yield name, ids
