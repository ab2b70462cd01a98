"""Writes a function on images as an ONNX graph; `conversion` says how."""
