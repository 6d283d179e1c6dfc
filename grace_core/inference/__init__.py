"""Running released models as they are stored: weights stay packed, tokens are decoded one by one.

Imports `models`, `quantization` and the reading of checkpoints; nothing of training or evaluation.
"""
