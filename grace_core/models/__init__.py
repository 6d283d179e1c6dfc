"""Vision-language models: what differs between families, loading, and the packed forward pass.

`families` names the parts of each family, `loading` reads checkpoints, `visual_inputs` turns
pictures into a model's inputs, `rows` makes packed rows, `packed_attention` keeps attention within
samples, `forward` returns the hidden states that the losses need, `fused_forward` makes them with
few kernels on a GPU, `activations` says what they take.
"""
