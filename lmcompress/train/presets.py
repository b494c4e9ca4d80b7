"""Published training recipes, their switches one by one, and longer contexts for models with rotary positions."""

import copy

import torch
from torch import nn
from transformers.activations import ACT2FN

from lmcompress.errors import BadSetting, UnknownFamily
from lmcompress.models.anatomy import anatomy
from lmcompress.models.serialization import register_module
from lmcompress.train.lora import Lora
from lmcompress.train.spec import TrainSpec

_KINDS = ("linear", "dynamic", "yarn")
SWITCHES = {  # name -> fields of a `TrainSpec`; None where the switch is not one of those
    "bf16": {"dtype": torch.bfloat16},
    "four pieces a step": {"micro_batches": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "eager attention": {"attention": "eager"},
    "compiled": {"compile": True},
    "attention dropout 0.1": {"attention_dropout": 0.1},
    "hidden dropout 0.1": {"hidden_dropout": 0.1},
    "no clipping": {"clip": 1e9},
    "no warm-up": {"warmup_steps": 0},
    "constant rate": None,
    "rates falling by layer, 0.8": {"layer_decay": 0.8},
    "LoRA": {"lora": Lora(rank=16, alpha=32.0)},
    "QLoRA": {"lora": Lora(rank=16, alpha=32.0, bits=4)},
    "GELU": None,
    "norm on embeddings": None,
    "two processes, sharded": None,
}


def published() -> dict:
    """The sheared model's recipe at full scale (METHODS, section 9): everything of a `TrainSpec` but its data."""
    return {
        "steps": 100_000,
        "batch_size": 128,
        "micro_batches": 4,
        "learning_rate": 1e-4,
        "min_learning_rate": 1e-5,
        "warmup_steps": 2000,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "clip": 1.0,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "dtype": torch.bfloat16,
    }


def switched(model: nn.Module, spec: TrainSpec, switch: str) -> tuple[nn.Module, dict, int]:
    """With one switch of `SWITCHES` on, or none ("baseline"): the model, fields of `spec` to change, and processes.

    Raises:
        BadSetting: no such switch.
    """
    if switch not in ("baseline", *SWITCHES):
        raise BadSetting(f"no switch {switch!r}; there are baseline, {', '.join(SWITCHES)}.")
    changes = (
        {"min_learning_rate": spec.learning_rate} if switch == "constant rate" else SWITCHES.get(switch) or {}
    )
    if switch in ("GELU", "norm on embeddings"):
        model = copy.deepcopy(model)
        _gelu(model) if switch == "GELU" else _norm_embeddings(model)
    return model, changes, 2 if switch.startswith("two processes") else 1


@register_module
class NormedEmbedding(nn.Embedding):
    """A table whose rows are normed: x / rms(x) · gain; the gain begins at the rows' own mean size."""

    def __init__(self, rows: int, width: int, padding_idx: int | None = None):
        super().__init__(rows, width, padding_idx)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Normed rows, `(...)` to `(..., width)`."""
        found = super().forward(ids)
        return found * torch.rsqrt(found.square().mean(-1, keepdim=True) + 1e-5) * self.gain

    def spec(self) -> dict:
        """What `from_spec` needs."""
        return {"rows": self.num_embeddings, "width": self.embedding_dim, "padding_idx": self.padding_idx}

    @classmethod
    def from_spec(cls, spec: dict) -> "NormedEmbedding":
        """A table with the shapes of the one `spec` was taken from."""
        return cls(**spec)


def _norm_embeddings(model: nn.Module) -> None:
    (table,) = anatomy(model).embeddings
    old = table.module
    new = NormedEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx)
    new.weight = old.weight  # tied to the head where it was
    new.gain.data.fill_(float(old.weight.detach().square().mean().sqrt()))
    model.set_submodule(table.name, new)


def _gelu(model: nn.Module) -> None:
    model.config.hidden_act = "gelu"
    for block in anatomy(model).blocks:
        owner = model.get_submodule(block.ffn.output.name.rpartition(".")[0])
        owner.act_fn = ACT2FN["gelu"]


def longer(model: nn.Module, factor: float, kind: str = "linear", *, trained: int | None = None) -> nn.Module:
    """Stretch rotary positions in place, and in the config, for texts `factor` times as long as in training.

    "linear": all angles divided by `factor` (Chen et al. 2023). "dynamic": the base grows with the text once it is
    longer than in training (NTK-aware), short texts stay exactly as they were. "yarn": slow angles are divided, fast
    ones kept, and logits made sharper (Peng et al. 2023). Local attention, where a family has both, is left alone.

    Args:
        trained: tokens of a text in training; default the config's limit.

    Returns:
        `model`.

    Raises:
        UnknownFamily: no rotary positions.
        BadSetting: no such kind, a factor not above 1, or positions that are stretched already.
    """
    if kind not in _KINDS or factor <= 1:
        raise BadSetting(f"kind={kind!r}, factor={factor}: kinds are {', '.join(_KINDS)}; factor is above 1.")
    rotaries = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not rotaries:
        raise UnknownFamily(
            f"{type(model).__name__} has no rotary positions to stretch; its length is fixed by its table of "
            "positions, or has no limit."
        )
    config = rotaries[0][1].config
    before, trained = config.rope_parameters, trained or config.max_position_embeddings
    nested = "full_attention" in before
    old = before["full_attention"] if nested else before
    if old["rope_type"] != "default":
        raise BadSetting(f"positions are {old['rope_type']} already; begin with the model as it was trained.")
    config.max_position_embeddings = trained
    new = old | {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        new["original_max_position_embeddings"] = trained
    config.rope_parameters = before | {"full_attention": new} if nested else new
    if kind != "dynamic":  # which measures texts against the length of training, read from the config
        config.max_position_embeddings = round(factor * trained)
    for name, rotary in rotaries:
        model.set_submodule(name, type(rotary)(config=config).to(model.device))
    return model
