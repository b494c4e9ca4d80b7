"""Runs a saved graph with its own runtime alone: `python read_graphs.py FOLDER INPUTS.npz OUTPUTS.npz`.

Neither this project nor torch or transformers may be imported. A decoder gets its ids in two calls.
"""

import sys
from pathlib import Path

for forbidden in ("lmcompress", "helpers", "torch", "transformers"):
    sys.modules[forbidden] = None

import numpy as np  # noqa: E402


class OpenVINO:
    """A file as a function of arrays by name, which keeps keys and values itself."""

    def __init__(self, file: Path):
        import openvino

        compiled = openvino.compile_model(file, "CPU")
        self.request = compiled.create_infer_request()
        self.has_beams = any("beam_idx" in port.get_names() for port in compiled.inputs)
        self.request.reset_state()

    def __call__(self, inputs: dict) -> dict:
        batch = len(inputs["input_ids"])
        beams = {"beam_idx": np.arange(batch, dtype=np.int32)} if self.has_beams else {}
        return {port.get_any_name(): array for port, array in self.request.infer(inputs | beams).items()}


class Onnx:
    """A file as a function of arrays by name, its keys and values handed on from call to call."""

    def __init__(self, file: Path):
        import onnxruntime

        self.session, self.past = onnxruntime.InferenceSession(file), {}

    def __call__(self, inputs: dict) -> dict:
        batch = len(inputs["input_ids"])
        ports = self.session.get_inputs()
        past = {p.name: p.shape for p in ports if p.name.startswith("past") and p.name not in inputs}
        empty = {n: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for n, shape in past.items()}
        names = [port.name for port in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, empty | self.past | inputs)))
        present = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
        self.past = {name: present[name] for name in past}
        return outputs


def main(folder: Path, given: dict) -> dict:
    """Return the last output of the graphs in `folder`, over all of its tokens."""
    kinds = {"openvino_{}model.xml": OpenVINO, "{}model.onnx": Onnx}
    name = next(name for name in kinds if list(folder.glob(name.format("*"))))
    read = lambda part: kinds[name](folder / name.format(part))  # noqa: E731
    if "text" in given:
        from tokenizers import Tokenizer

        encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(str(given["text"]))
        given = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
        given = {name: np.array([row]) for name, row in given.items()}
        return read("")(given | {"token_type_ids": np.zeros_like(given["input_ids"])})
    if "decoder_input_ids" not in given and "position_ids" not in given:
        return read("")(given)
    shared, ids = {}, given["input_ids"]
    if "decoder_input_ids" in given:
        encoded = read("encoder_")({name: given[name] for name in ("input_ids", "attention_mask")})
        shared = {name.replace("present", "past_key_values"): encoded[name] for name in encoded}
        del shared["last_hidden_state"]
        shared["encoder_attention_mask"], ids = given["attention_mask"], given["decoder_input_ids"]
    decoder, logits = read("decoder_" if shared else ""), []
    for start, end in ((0, 4), (4, ids.shape[1])):
        inputs = {"input_ids": ids[:, start:end]} | shared
        if not shared:
            inputs |= {"attention_mask": given["attention_mask"][:, :end]}
            inputs |= {"position_ids": given["position_ids"][:, start:end]}
        logits.append(decoder(inputs)["logits"])
    return {"logits": np.concatenate(logits, axis=1)}


if __name__ == "__main__":
    outputs = main(Path(sys.argv[1]), dict(np.load(sys.argv[2])))
    np.savez(sys.argv[3], logits=outputs["logits"])
