"""A pruned vocabulary: same splits, same logits at the ids that are left, a sound tokenizer."""

import json

import pytest
import torch
from tiny_models import FAMILIES, kind, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.compress.vocabulary import _sound, count_tokens
from lmcompress.errors import BadData, BadSetting, WrongTask
from lmcompress.models import loading as house_models
from lmcompress.models import storage
from lmcompress.study import study as sweep
from lmcompress.tasks.calibration import Calibration
from lmcompress.tasks.language_modelling import LanguageModelling

SPECIALS = ["<s>", "</s>", "<unk>", "<pad>"]
TEXT = [
    "the small model reads the longer text of the paper",
    "a larger model reads a shorter text, and slowly",
    "pruning removes the weights that matter least to the model",
    "the vocabulary of a model is larger than any one text",
] * 3
OTHER = ["zebra crossings and quartz boxes", "jumping wizards vex the quick fox"] * 3


def byte_level(*, first: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE; its special tokens lie behind all others, so that their ids move, or in front."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    more = {"special_tokens": SPECIALS if first else [], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **more)
    made.train_from_iterator(TEXT + OTHER, trainer)
    made.add_special_tokens(SPECIALS)
    ends = [(one, made.token_to_id(one)) for one in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return fast(made)


def fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def word_piece() -> BertTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    made.train_from_iterator(
        TEXT + OTHER, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    )
    return BertTokenizerFast(vocab=made.get_vocab())


def unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    more = {"unk_token": "<unk>", "special_tokens": SPECIALS, "show_progress": False}
    made.train_from_iterator(TEXT + OTHER, trainers.UnigramTrainer(vocab_size=120, **more))
    return fast(made)


def batches_of(tokenizer, texts, family="bert") -> list[dict]:
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
    batch = dict(encoded)
    if kind(family) != "encoder":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [batch]


def model_for(family, tokenizer, head="lm"):
    """A tiny model with a row for every token, and four spare ones that no token has."""
    ids = {"pad_token_id": tokenizer.pad_token_id}
    if kind(family) != "encoder":
        ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind(family) == "encoder-decoder":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    return tiny(family, head, vocab_size=len(tokenizer) + 4, **ids)


def pruned(model, tokenizer, batches, **settings):
    return compress.get("vocabulary")(model, Context(calibration=batches, tokenizer=tokenizer), **settings)


def places(old, new) -> torch.Tensor:
    """Old id of each new one."""
    return torch.tensor(old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new)))))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_kept_text_are_the_dense_ones_at_the_kept_ids_also_after_reloading(family, tmp_path):
    first = family == "roberta"  # its padding id counts positions
    tokenizer = byte_level(first=first)
    model = model_for(family, tokenizer)
    batches = batches_of(tokenizer, TEXT, family)  # which sets the tokenizer's padding
    rows, before = model.get_input_embeddings().num_embeddings, tokenizer.backend_tokenizer.to_str()
    small, report = pruned(model, tokenizer, batches)
    json.dumps(report.as_dict())
    assert tokenizer.backend_tokenizer.to_str() == before
    assert model.get_input_embeddings().num_embeddings == rows
    text = "Größe 漢字 🙂 \t\n ..."
    assert report.tokenizer.decode(report.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    kept = places(tokenizer, report.tokenizer)
    assert report.achieved["vocabulary"] == len(kept) == len(report.tokenizer) < len(tokenizer)
    dense_batch = batches_of(tokenizer, TEXT[:2], family)[0]
    small_batch = batches_of(report.tokenizer, TEXT[:2], family)[0]
    assert torch.equal(kept[small_batch["input_ids"]], dense_batch["input_ids"])
    with torch.no_grad():
        want, got = model(**dense_batch).logits[..., kept], small(**small_batch).logits
        torch.testing.assert_close(got, want, atol=1e-5 * max(1.0, want.abs().max().item()), rtol=0)
        reloaded, again = storage.load(
            storage.save(small, tmp_path / "m", tokenizer=report.tokenizer, report=report)
        )
        assert torch.equal(reloaded(**small_batch).logits, got)
    assert again(TEXT[0])["input_ids"] == report.tokenizer(TEXT[0])["input_ids"]
    assert small.config.vocab_size == len(kept) and small.get_input_embeddings().num_embeddings == len(kept)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (small.get_input_embeddings().weight is small.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "llama"])
def test_named_ids_move_with_their_tokens_and_the_model_generates(family):
    tokenizer = byte_level()
    model = model_for(family, tokenizer)
    small, report = pruned(model, tokenizer, batches_of(tokenizer, TEXT, family))
    for config in (small.config, small.generation_config):
        assert config.pad_token_id == report.tokenizer.pad_token_id != tokenizer.pad_token_id
        assert config.eos_token_id == report.tokenizer.eos_token_id
    if kind(family) == "encoder-decoder":
        assert small.config.decoder_start_token_id == report.tokenizer.pad_token_id
    batch = batches_of(report.tokenizer, TEXT[:1])[0]
    made = small.generate(**batch, max_new_tokens=5, do_sample=False)
    assert made.max() < len(report.tokenizer)
    whole = batches_of(tokenizer, TEXT[:1])[0]
    kept = places(tokenizer, report.tokenizer)
    gone = sorted(set(range(len(tokenizer) + 4)) - set(kept.tolist()))
    want = model.generate(**whole, max_new_tokens=5, do_sample=False, suppress_tokens=gone)
    assert torch.equal(kept[made], want)


@pytest.mark.parametrize("make", [byte_level, word_piece, unigram])
def test_kept_text_is_split_and_read_back_as_before_and_unseen_text_stays_sound(make):
    tokenizer = make()
    model = model_for("bert", tokenizer, "classification")
    small, report = pruned(model, tokenizer, batches_of(tokenizer, TEXT))
    new = report.tokenizer
    assert type(new) is type(tokenizer) and len(new) < len(tokenizer)
    for text in [*TEXT, TEXT[2] + " " + TEXT[0]]:
        old_tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert new.convert_ids_to_tokens(new(text)["input_ids"]) == old_tokens
        assert new.decode(new(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    for text in OTHER:
        ids = new(text)["input_ids"]
        assert new.unk_token_id not in ids and len(ids) > len(tokenizer(text)["input_ids"])
        assert new.decode(ids, skip_special_tokens=True).strip() == text
    assert sorted(new.get_vocab().values()) == list(range(len(new)))


def test_every_part_of_a_kept_merge_stays_whichever_way_it_was_made():
    model = {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "cd"])},
        "merges": ["a b", "b c", "ab c", ["a", "bc"], ["c", "d"]],
    }
    assert _sound({"abc"}, model) == {"a", "b", "c", "d", "ab", "bc", "abc"}
    pieces = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##"}
    words = ["?", "a", "##a", "aa", "##aa", "aaa"]
    vocab = {"vocab": {token: i for i, token in enumerate(words)}}
    assert _sound({"aaa"}, pieces | vocab) == {"?", "a", "##a", "aaa"}


def test_counts_leave_out_padding_and_classes_and_min_count_is_a_threshold():
    batch = {
        "input_ids": torch.tensor([[5, 5, 7, 0], [5, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]),
    }
    assert count_tokens([batch], 10).nonzero().flatten().tolist() == [5, 7]
    classes, tokens = {"labels": torch.tensor([2, 3])}, {"labels": torch.tensor([[8, -100], [8, 9]])}
    assert count_tokens([batch | classes], 10)[[2, 3]].tolist() == [0, 0]
    assert count_tokens([batch | tokens], 10).tolist() == [0, 0, 0, 0, 0, 3, 0, 1, 2, 1]
    tokenizer = byte_level()
    model, batches = model_for("gpt2", tokenizer), batches_of(tokenizer, TEXT)
    sizes = [pruned(model, tokenizer, batches, min_count=n)[1].achieved["vocabulary"] for n in (1, 4, 100)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 256 + len(SPECIALS) < sizes[0]


def test_unusable_settings_texts_and_tokenizers_are_refused():
    tokenizer = byte_level()
    model, batches = model_for("gpt2", tokenizer), batches_of(tokenizer, TEXT)
    for wrong in (0, -1, 1.5, True):
        pytest.raises(BadSetting, pruned, model, tokenizer, batches, min_count=wrong).match("min_count")
    pytest.raises(BadSetting, pruned, model, object(), batches).match("fast tokenizer")
    pytest.raises(BadData, pruned, model, tokenizer, [])
    spare = [{k: v.clone() for k, v in batches[0].items()}]
    spare[0]["input_ids"][0, 1] = len(tokenizer) + 1
    pytest.raises(BadData, pruned, model, tokenizer, spare).match("another tokenizer")


def study_subject(tmp_path, tokenizer, texts):
    """A decoder with a perplexity task over `texts`, measured for quality alone."""
    model = model_for("gpt2", tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    study = sweep.Study("03", profile="test", folder=tmp_path / "run", calls=1, announce=lambda text: None)
    task = LanguageModelling(
        name="toy-lm",
        split="test",
        source="here",
        window=16,
        examples=[{"text": text, "document": i} for i, text in enumerate(texts)],
        training=lambda split: [{"text": text + " again", "document": i} for i, text in enumerate(TEXT)],
    )
    return sweep.Baseline(study, house_models.load(str(tmp_path / "model")), task)


def test_perplexity_is_compared_only_where_the_scored_text_keeps_its_tokens(tmp_path):
    tokenizer = byte_level()
    budget = Calibration(n=4, length=16)
    kept = study_subject(tmp_path / "kept", tokenizer, TEXT[:2])
    dense = kept.measure(sweep.DENSE, timed=False)["quality"]["value"]
    row = kept.measure("vocabulary", timed=False, calibration=budget, min_count=1)
    assert row["achieved"]["vocabulary"] < len(tokenizer) and row["quality"]["value"] < dense
    other = study_subject(tmp_path / "other", tokenizer, OTHER[:2])
    with pytest.raises(WrongTask, match="splits its text into"):
        other.measure("vocabulary", timed=False, calibration=budget)


def test_scored_text_is_packed_from_as_many_examples_as_it_takes(tmp_path):
    subject = study_subject(tmp_path, byte_level(), TEXT)
    batches = subject.calibration(Calibration(n=2, length=48, scored=True))
    assert sum(len(batch["input_ids"]) for batch in batches) == 2
