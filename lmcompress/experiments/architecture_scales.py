"""The shapes of the models trained from scratch, and the scales at which they are trained."""

from dataclasses import dataclass

from lmcompress import device
from lmcompress.errors import BadSetting
from lmcompress.models.headwise import HeadwiseConfig

PHIS = ("none", "shared")
LINEAR = "linear"  # the control: φ without its nonlinearity, P z + p, shared by the heads of a layer


@dataclass(frozen=True)
class Scale:
    """What the runs of a scale have in common; `tokens` are input tokens of a run."""

    hidden: int
    heads: int
    vocabulary: int
    window: int
    batch_size: int
    tokens: int
    learning_rate: float
    vocabulary_texts: int  # training documents the tokenizer is made from
    bf16: bool = False  # and compiled, on a GPU
    layers: tuple[int, ...] = (5, 6, 7, 8)


SCALES = {
    "pocket": Scale(32, 4, 512, 128, 8, 50_000, 5e-3, 500),
    "middle": Scale(64, 4, 1024, 128, 8, 250_000, 3e-3, 2000),
    "full": Scale(1024, 8, 32_000, 512, 32, 100_000_000, 3e-4, 50_000, bf16=True),
}


def config_of(scale: str, layers: int, phi: str) -> HeadwiseConfig:
    """Return LLaMA-2's block at the widths of a scale; `phi` as in `HeadwiseConfig`, or "linear": no SiLU."""
    sizes = scale_named(scale)
    return HeadwiseConfig(
        **({"phi": "shared", "phi_activation": "linear"} if phi == LINEAR else {"phi": phi}),
        num_hidden_layers=layers,
        hidden_size=sizes.hidden,
        intermediate_size=64 * -(-(8 * sizes.hidden // 3) // 64),
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=2 * sizes.window,
        rms_norm_eps=1e-5,
        initializer_range=0.64 * sizes.hidden**-0.5,  # 0.02 at full scale; as wide a signal in small
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False},
    )


def eight_models(scale: str) -> dict[tuple[int, str], HeadwiseConfig]:
    """Return every depth of a scale, without φ and with one that the heads of a layer share."""
    return {(depth, phi): config_of(scale, depth, phi) for depth in scale_named(scale).layers for phi in PHIS}


def compiles(scale: Scale) -> bool:
    """Return whether the runs of a scale are compiled on the device of this process."""
    return scale.bf16 and device.choose().device.type == "cuda"


def scale_named(name: str) -> Scale:
    """Return a scale by name; another name is a `BadSetting`."""
    if name not in SCALES:
        raise BadSetting(f"no scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name]
