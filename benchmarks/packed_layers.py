"""Layers of integers against dense layers, and pruned widths against their FLOPs, on this machine.

`python benchmarks/packed_layers.py [--calls 30] [--small] [--sections decoder encoders widths]`: decoding of
GPT-2 small's shape, MiniLM's and BERT-base's at batch 8, random weights, 128 tokens; torchao and bitsandbytes
beside where they can be imported. Each line is one run of `measure.latency`: the dense model, a second copy
of it and the variant in turns, in random order; a ratio is time over dense, with its 95 % interval, and the
noise floor is what two equal models differ by. Times depend on shapes only.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from lmcompress import compress, device
from lmcompress.compress import Context
from lmcompress.measure.calls import Shape, prepared_calls
from lmcompress.measure.compute import flops
from lmcompress.measure.latency import latency
from lmcompress.models.anatomy import anatomy, prunable
from lmcompress.models.packed import set_unpacking, unpacked_bytes
from lmcompress.models.surgery import keep_ffn, keep_heads, replace_modules

Variant = Callable[[nn.Module], nn.Module]
BF16, F32 = torch.bfloat16, torch.float32
# Aims: which variants, at which shape, at most which ratio
DECODING = ("rtn, 4 bits, groups", "decode_b1", 0.6)
ENCODING = ("rtn", "batch8", 1.05)
TORCHAO_INT4 = "torchao.prototype.quantization.int4.inference_workflow"  # its only 4 bits on a CPU


def main() -> None:
    """Print the machine, then a table per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--small", action="store_true", help="two blocks instead of all, to try the script")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a library that says the same at every call
    warnings.simplefilter("ignore")
    machine = device.machine()
    print(
        f"{machine['cpu']}, {machine['instructions']}, {torch.get_num_threads()} threads of torch "
        f"{torch.__version__}, load {os.getloadavg()[0]:.1f} on {machine['cores']} cores at the start"
    )
    for section in options.sections:
        torch.manual_seed(0)
        SECTIONS[section](options.calls, 2 if options.small else None)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


def decoder(calls: int, depth: int | None) -> None:
    """Time single tokens, and reading a prompt, all against dense float32."""
    config = GPT2Config(n_layer=depth or 12, vocab_size=8192, pad_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    shapes = [Shape("decode", 1), Shape("decode", 8), Shape("prefill", 1)]
    print(f"\nGPT-2 small's shape, {config.n_layer} blocks, vocabulary 8,192: time over dense float32")
    table(model, "decoder", shapes, variants(F32) | variants(BF16, dense=True), calls, DECODING)


def encoders(calls: int, depth: int | None) -> None:
    """Time a batch of 8 texts against the dense model of the same dtype."""
    minilm = {"hidden_size": 384, "num_hidden_layers": depth or 6, "intermediate_size": 1536}
    for name, sizes in (("MiniLM", minilm), ("BERT-base", {"num_hidden_layers": depth or 12})):
        for dtype in (F32, BF16):
            config = BertConfig(vocab_size=8192, **sizes)
            model = BertForSequenceClassification(config).eval().to(dtype)
            print(f"\n{name}'s shape, {config.num_hidden_layers} blocks: time over dense in {dtype}")
            shapes = [Shape("forward", 8), Shape("forward", 1)]
            table(model, "encoder", shapes, variants(dtype), calls, ENCODING)


def variants(dtype: torch.dtype, *, dense: bool = False) -> dict[str, Variant]:
    """Return what is timed for models in `dtype`: this project's layers, and the libraries' own."""
    short = str(dtype).removeprefix("torch.")
    made: dict[str, Variant] = {"dense": lambda model: model.to(dtype)} if dense else {}
    made |= {
        f"rtn, {bits} bits, {grid}": ours("rtn", dtype, bits=bits, group_size=size)
        for bits, size, grid in ((4, 64, "groups of 64"), (3, 64, "groups of 64"), (8, None, "per row"))
    }
    made["rtn, 4 bits, unpacked at load"] = unpacked(ours("rtn", dtype, bits=4, group_size=64))
    made["nf4"] = ours("nf4", dtype)
    made["int8-dynamic"] = ours("int8-dynamic", dtype)
    if dtype == BF16:
        made |= {"torchao int4 (tinygemm)": torchao_int4, "torchao int8 weights": torchao_int8}
        made |= {"bitsandbytes NF4": bitsandbytes_nf4, "bitsandbytes int8": bitsandbytes_int8}
    return {f"{name}, {short}": make for name, make in made.items()}


def ours(name: str, dtype: torch.dtype, **settings) -> Variant:
    """Return a technique of this project, for a model cast to `dtype`."""
    return lambda model: compress.get(name)(model.to(dtype), Context(), **settings)[0]


def unpacked(make: Variant) -> Variant:
    """Return a variant whose weights are floats from the start."""

    def unpack(model: nn.Module) -> nn.Module:
        packed = make(model)
        set_unpacking(packed, True)
        return packed

    return unpack


def table(
    dense: nn.Module,
    kind: str,
    shapes: list[Shape],
    made: dict[str, Variant],
    calls: int,
    aim: tuple[str, str, float],
) -> None:
    """Print a line per variant and shape; the floats that a variant holds by then are in the last column."""
    for name, make in made.items():
        fresh = type(dense)(dense.config).eval().to(next(dense.parameters()).dtype)
        fresh.load_state_dict(dense.state_dict())
        try:
            variant = make(fresh)
        except Exception as error:  # whatever a library ends in here, the table goes on
            print(f"  {name:<42} not here: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        for shape, times in latency(dense, variant, kind=kind, shapes=shapes, calls=calls)["shapes"].items():
            aimed = name.startswith(aim[0]) and shape == aim[1]
            verdict = f"aim {aim[2]}: {'met' if times['ratio'] <= aim[2] else 'MISSED'}" if aimed else ""
            print(
                f"  {name:<42} {shape:<10} {times['ratio']:.3f} [{times['ratio_low']:.3f}, "
                f"{times['ratio_high']:.3f}]  floor {times['noise_floor']:.2f}  {verdict}",
                flush=True,
            )
        with torch.no_grad():
            prepared_calls({name: variant}, shapes[-1], kind=kind)[name].run()
        if held := unpacked_bytes(variant):
            print(f"  {'':<42} by then it holds {held / 1e6:.0f} MB of floats beside the integers")


def as_linear(model: nn.Module) -> nn.Module:
    """Give GPT-2 linear layers in the place of Conv1D, which the libraries pass over; in bfloat16."""

    def like(layer: Conv1D) -> nn.Linear:
        linear = nn.Linear(layer.nx, layer.nf)
        linear.weight, linear.bias = nn.Parameter(layer.weight.t().contiguous()), layer.bias
        return linear

    replace_modules(model, lambda module: isinstance(module, Conv1D), like)
    return model.to(BF16)


def torchao_int4(model: nn.Module) -> nn.Module:
    """The same kernel as ours, through torchao's tensor subclass."""
    model = as_linear(model)
    return _torchao(model, import_module(TORCHAO_INT4).PrototypeInt4WeightOnlyConfig(group_size=64))


def torchao_int8(model: nn.Module) -> nn.Module:
    """Weights in int8, one scale per row."""
    return _torchao(as_linear(model), import_module("torchao.quantization").Int8WeightOnlyConfig())


def _torchao(model: nn.Module, config: object) -> nn.Module:
    """Quantize what this project quantizes; torchao passes over what it cannot do, in silence."""
    names = {layer.name for layer in prunable(model)}
    quantize = import_module("torchao.quantization").quantize_
    quantize(model, config, lambda module, name: name in names)
    skipped = [n for n in names if type(model.get_submodule(n).weight) is nn.Parameter]
    if skipped:
        raise ValueError(f"{len(skipped)} of {len(names)} layers were passed over")
    return model


def bitsandbytes_nf4(model: nn.Module) -> nn.Module:
    """NF4 in groups of 64, without double quantization."""
    return _bitsandbytes(
        model,
        lambda library, layer, weight: (
            library.nn.Linear4bit(*sizes(layer), layer.bias is not None, BF16, False, "nf4"),
            library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False),
        ),
    )


def bitsandbytes_int8(model: nn.Module) -> nn.Module:
    """LLM.int8() without its threshold for outliers."""
    return _bitsandbytes(
        model,
        lambda library, layer, weight: (
            library.nn.Linear8bitLt(*sizes(layer), layer.bias is not None, has_fp16_weights=False),
            library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False),
        ),
    )


def _bitsandbytes(model: nn.Module, make: Callable) -> nn.Module:
    library, model = import_module("bitsandbytes"), as_linear(model)
    weights = {id(layer.module.weight) for layer in prunable(model)}

    def like(layer: nn.Linear) -> nn.Module:
        quantized, weight = make(library, layer, layer.weight.detach())
        quantized.weight, quantized.bias = weight, layer.bias
        return quantized.to("cpu")

    replace_modules(model, lambda module: id(getattr(module, "weight", None)) in weights, like)
    return model


def sizes(layer: nn.Linear) -> tuple[int, int]:
    """Return its inputs and outputs."""
    return layer.in_features, layer.out_features


def widths(calls: int, depth: int | None) -> None:
    """Print time over FLOPs, both relative to dense, of feed-forwards cut to widths of several multiples."""
    bert = BertForSequenceClassification(BertConfig(num_hidden_layers=depth or 4, vocab_size=8192))
    small = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_heads": 8, "vocab_size": 6144}
    t5 = T5ForConditionalGeneration(T5Config(num_layers=3, **small))
    for name, model, kind, part, cuts in (
        ("BERT-base's shape, 4 blocks", bert, "encoder", "forward", (1536, 1552, 1544, 1540, 1537)),
        ("T5's encoder, 3 blocks of 256, feed-forward alone", t5, "encoder-decoder", "encode", (256, 250)),
    ):
        for dtype in (F32, BF16):
            dense = model.eval().to(dtype)
            print(f"\n{name}, {dtype}: time over FLOPs, both over dense")
            for width in cuts:
                line(f"feed-forward of {width}", dense, narrowed(dense, width), kind, Shape(part, 8), calls)
            if part == "encode":
                half = narrowed(dense, cuts[0], heads=4)
                line("half of the heads, too", dense, half, kind, Shape(part, 8), calls)


def narrowed(model: nn.Module, width: int, heads: int | None = None) -> nn.Module:
    """Return a copy with feed-forwards of `width` channels, and so many heads."""
    blocks = anatomy(model).blocks
    smaller = keep_ffn(model, {block.name: list(range(width)) for block in blocks})
    every = [attention.name for block in blocks for attention in block.attentions]
    return (keep_heads(smaller, {n: list(range(heads)) for n in every}) if heads else smaller).eval()


def line(name: str, dense: nn.Module, variant: nn.Module, kind: str, shape: Shape, calls: int) -> None:
    """Print one variant's time and FLOPs over dense, and their quotient."""
    times = latency(dense, variant, kind=kind, shapes=[shape], calls=calls)["shapes"][shape.name]
    share = flops(variant, kind=kind, shape=shape) / flops(dense, kind=kind, shape=shape)
    print(
        f"  {name:<26} time {times['ratio']:.3f} [{times['ratio_low']:.3f}, {times['ratio_high']:.3f}] FLOPs "
        f"{share:.3f} quotient {times['ratio'] / share:.2f}  floor {times['noise_floor']:.2f}",
        flush=True,
    )


SECTIONS = {"decoder": decoder, "encoders": encoders, "widths": widths}


if __name__ == "__main__":
    main()
