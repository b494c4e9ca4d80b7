"""What each switch of the training recipe buys, one at a time: time, memory, loss after the same tokens."""

import copy
import json
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN

from lmcompress.errors import BadSetting
from lmcompress.measure.peak import peak_rss_bytes
from lmcompress.models.anatomy import anatomy
from lmcompress.models.serialization import register_module
from lmcompress.paths import scratch_folder
from lmcompress.train import launch
from lmcompress.train.lora import Lora
from lmcompress.train.spec import History, TrainSpec


def switched(model: nn.Module, spec: TrainSpec, switch: str) -> dict:
    """Train a copy of `model` with one switch on, or "baseline" for none, in a fresh process.

    Returns:
        "tokens_per_s" and "step_ms" (median over the steps after the first tenth, without evaluation),
        "peak_bytes" and "peak_kind" ("rss" of the process with its libraries, or "cuda"), and "loss": the
        mean training loss over the last tenth of the steps up to "tokens".
    """
    changed, fields = with_switch(model, spec, switch)
    with scratch_folder() as folder:
        spec = replace(spec, **fields, checkpoint=None, evaluate=None)
        launch.prepare(changed, spec, folder)
        processes = 2 if switch == SHARDED else 1
        history, text = launch.start(folder, spec, processes=processes, module=__name__)
    peaks = [json.loads(line) for line in text.splitlines() if line.startswith('{"peak_bytes"')]
    return _speed(history) | max(peaks, key=lambda peak: peak["peak_bytes"]) | _loss_at_end(history)


def with_switch(model: nn.Module, spec: TrainSpec, switch: str) -> tuple[nn.Module, dict]:
    """Return the model to train with one of `SWITCHES` on, and the fields of `spec` to change."""
    if switch not in ("baseline", *SWITCHES):
        raise BadSetting(f"no switch {switch!r}; there are baseline, {', '.join(SWITCHES)}.")
    change = SWITCHES.get(switch)
    if switch == "constant rate":
        return model, {"min_learning_rate": spec.learning_rate}
    if not callable(change):
        return model, change or {}
    model = copy.deepcopy(model)
    change(model)
    return model, {}


@register_module
class NormedEmbedding(nn.Embedding):
    """A table whose rows are normed: x / rms(x) · gain; the gain begins at the rows' own mean size."""

    def __init__(self, rows: int, width: int, padding_idx: int | None = None):
        super().__init__(rows, width, padding_idx)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return normed rows, `(...)` to `(..., width)`."""
        rows = super().forward(ids)
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * self.gain

    def spec(self) -> dict:
        """Return what `from_spec` needs."""
        return {"rows": self.num_embeddings, "width": self.embedding_dim, "padding_idx": self.padding_idx}

    @classmethod
    def from_spec(cls, spec: dict) -> "NormedEmbedding":
        """Return a table with the shapes of the one `spec` was taken from."""
        return cls(**spec)


def _norm_embeddings(model: nn.Module) -> None:
    (table,) = anatomy(model).embeddings
    plain = table.module
    normed = NormedEmbedding(plain.num_embeddings, plain.embedding_dim, plain.padding_idx)
    normed.weight = plain.weight  # tied to the head where it was
    normed.gain.data.fill_(float(plain.weight.detach().square().mean().sqrt()))
    model.set_submodule(table.name, normed)


def _gelu(model: nn.Module) -> None:
    model.config.hidden_act = "gelu"
    for block in anatomy(model).blocks:
        owner = model.get_submodule(block.ffn.output.name.rpartition(".")[0])
        owner.act_fn = ACT2FN["gelu"]


SHARDED = "two processes, sharded"
SWITCHES = {  # name -> fields of a `TrainSpec`, or what changes the model; None where it is neither
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
    "GELU": _gelu,
    "norm on embeddings": _norm_embeddings,
    SHARDED: None,
}


def _speed(history: History) -> dict:
    first = len(history.steps) // 10
    columns = ([0, *(step[name] for step in history.steps)] for name in ("seconds", "tokens"))
    seconds, tokens = (np.diff(column)[first:] for column in columns)
    return {"tokens_per_s": float(np.median(tokens / seconds)), "step_ms": float(1000 * np.median(seconds))}


def _loss_at_end(history: History) -> dict:
    losses = [step["loss"] for step in history.steps[-max(1, len(history.steps) // 10) :]]
    return {"loss": float(np.mean(losses)), "tokens": history.steps[-1]["tokens"]}


def main() -> None:
    """Run the folder that is named, and print what memory it took at most."""
    launch.main()
    on_cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_cuda else peak_rss_bytes()
    print(json.dumps({"peak_bytes": peak, "peak_kind": "cuda" if on_cuda else "rss"}))


if __name__ == "__main__":
    main()
