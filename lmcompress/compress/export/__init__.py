"""Compression that ends in another runtime: OpenVINO and ONNX Runtime graphs."""
