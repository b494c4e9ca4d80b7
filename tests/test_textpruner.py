"""TextPruner behind the adapter: it chooses what ours chooses; its results are saved and reloaded."""

import sys

import pytest
import torch
from torch import nn
from transformers import XLMConfig, XLMForSequenceClassification

from lmcompress import compress
from lmcompress.compress import Context
from lmcompress.errors import BadData, BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.models.surgery import keep_ffn
from tests.test_structured import batches
from tests.tiny_models import FAMILIES, logits, reloaded, tiny

WORKS = ["bert", "roberta", "electra", "albert"]


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("textpruner", exc_type=ImportError)


def texts(count: int = 3) -> list[dict]:
    """Padded texts with a class each."""
    draw = torch.Generator().manual_seed(3)
    return [batch | {"labels": torch.randint(2, (3,), generator=draw)} for batch in batches(count)]


def prune(name: str, model: nn.Module, calibration=None, **settings):
    return compress.get(name)(model, Context(calibration=calibration or texts()), **settings)


@pytest.mark.parametrize(
    "head, even, n_iters",  # every two of the three choices meet
    [("classification", True, 1), ("classification", False, 2), ("lm", True, 2), ("lm", False, 1)],
)
@pytest.mark.parametrize("family", WORKS)
def test_ours_and_textpruner_keep_the_very_same_weights(family, head, even, n_iters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {"heads": 2 if even else 3, "ffn": 20, "even": even, "n_iters": n_iters}
    asked |= {"calibration": texts() if head == "classification" else batches(3)}
    theirs, their_report = prune("textpruner", tiny(family, head), **asked)
    assert not list(tmp_path.iterdir())  # it writes importances and a folder for models
    assert "prune_heads" not in vars(theirs.base_model)
    ours, our_report = prune("heads-ffn", tiny(family, head), **asked)
    assert their_report.achieved == our_report.achieved and their_report.layers == our_report.layers
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert torch.equal(logits(ours), logits(reloaded(theirs, tmp_path / "m", report=their_report)))


def test_only_where_a_block_would_lose_all_its_heads_they_differ():
    """TextPruner gives the block one back and so keeps more than was asked; ours keeps the number asked."""
    asked = {"heads": 2, "even": False, "calibration": batches(3)}
    kept = {}
    for name in ("textpruner", "heads-ffn"):
        pruned, _ = prune(name, tiny("bert"), **asked)
        kept[name] = sorted(block.attention.heads for block in anatomy(pruned).blocks)
    assert kept == {"textpruner": [1, 4], "heads-ffn": [1, 3]}


def test_logits_need_no_labels_and_are_computed_in_the_model_s_precision(monkeypatch):
    from textpruner import TransformerPruner

    seen, score = [], TransformerPruner.get_importance_score_with_logits

    def watched(self, *args):
        seen.append(self.model_rep.dtype)
        return score(self, *args)

    monkeypatch.setattr(TransformerPruner, "get_importance_score_with_logits", watched)
    unlabelled = [{n: v for n, v in batch.items() if n != "labels"} for batch in texts()]
    asked = {"ffn": 20, "n_iters": 2, "use_logits": True, "calibration": unlabelled}
    pruned, report = prune("textpruner", tiny("bert", "classification"), **asked)
    assert seen == [torch.float32, torch.float32]
    assert [(b.attention.heads, b.ffn.width) for b in anatomy(pruned).blocks] == [(4, 20), (4, 20)]
    with pytest.raises(BadData, match="labels"):
        prune("textpruner", tiny("bert", "classification"), ffn=20, calibration=unlabelled)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WORKS])
def test_families_it_cannot_do_refuse_with_the_way_out(family):
    why = "crashes on it" if family in ("t5", "t5_gated", "bart") else "knows no"
    with pytest.raises(UnknownFamily, match=f"{why}.*Use heads-ffn"):
        prune("textpruner", tiny(family), heads=2, calibration=batches())


def test_other_models_it_cannot_do_refuse():
    xlm = XLMForSequenceClassification(XLMConfig(vocab_size=100, emb_dim=32, n_layers=2, n_heads=4))
    decoder = tiny("bert", is_decoder=True)
    grouped = tiny("albert", "classification", num_hidden_groups=2)
    pruned = keep_ffn(tiny("bert"), {"bert.encoder.layer.1": range(20)})
    reasons = {"crashes": xlm, "bert decoders": decoder, "first layer only": grouped, "before": pruned}
    for why, model in reasons.items():
        pytest.raises(UnknownFamily, prune, "textpruner", model, heads=2).match(f"{why}.*heads-ffn")


@pytest.mark.parametrize("asked", [{}, {"heads": 0}, {"heads": 5}, {"ffn": 1.5}, {"heads": 2, "n_iters": 0}])
def test_bad_settings_refuse(asked):
    with pytest.raises(BadSetting, match="heads=0.5|from 1 to|whole number"):
        prune("textpruner", tiny("bert", "classification"), **asked)


def test_a_missing_library_ends_in_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "textpruner", None)
    with pytest.raises(BadSetting, match="pip install --no-deps textpruner==1.1.post2"):
        prune("textpruner", tiny("bert", "classification"), heads=2)
