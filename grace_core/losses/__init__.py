"""The terms of GRACE's training loss, L_total = L_CE + beta * L_GDKD + omega * L_RCKA (Eq. 21).

Each term is a pure function of plain tensors in its own module:

- `cross_entropy`: L_CE
- `distillation`: decoupled distillation (Eq. 1-3), and plain KL for the ablation
- `gate`: confidence of the teacher per token (Eq. 4-5)
- `relational`: L_RCKA, alignment of the visual tokens' relations (Eq. 10-13)
- `controller`: beta, once per optimizer step (Eq. 18-20)
- `supervised_terms`, `fused_head`: the terms of a token with their gradient at once, and with the
  heads that make the logits; `kernels` on a GPU
- `truncated_teacher`, `truncated_distillation`, `truncated_terms`: the same from what is kept of a
  recorded teacher's logits; `stored_relation`: what is kept of its pictures
- `objective`: their weighted sum over an optimizer step

Every term returns values per token or per image, or their sum, never a mean: a mean over one
micro-batch weighs its tokens by how samples happened to be dealt out. The caller sums over all
micro-batches and ranks of an optimizer step and divides once, by the global count.

Any floating dtype goes in; arithmetic and results are at least fp32. Gradients reach the student
only.

Shapes: N supervised tokens, V vocabulary; n visual tokens of one image, d hidden width.
"""
