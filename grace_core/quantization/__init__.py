"""Quantization-aware training with learned scales: mathematics, layer, surgery, storage."""
