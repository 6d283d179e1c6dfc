"""GRACE: confidence-gated relational distillation and quantization-aware training of VLMs."""

__version__ = "0.1.0"
