"""Quantized checkpoints of other formats, made into ones that the stages go on from."""
