"""The toy world: everything needed to see the whole pipeline run within minutes.

Data
    `pictures`       scenes of coloured shapes and words, rasterised with NumPy
    `lettering`      the bitmap alphabet and the words
    `questions`      six families of questions, three forms of asking
    `conversations`  multi-turn conversations drawn from a mixture of forms
    `world`          `write_training_set` (ShareGPT4V's schema), `write_benchmark`, `prompt_for`

Models
    `tokenizer`      byte-level BPE with Qwen's special tokens and chat form
    `checkpoints`    teacher and student as `Qwen3VLForConditionalGeneration`, saved in full
    `encoding`       conversations as token rows
    `batched`        fast forward pass for equal pictures
    `scoring`        exact-match score on the held-out benchmark
    `pretrain`       `python -m grace_core.toy.pretrain teacher|student OUT`

The weights that `pretrain` made are in `assets/toy/{teacher,student}`, each with a
`provenance.json`.
"""
