"""Asking models the questions of benchmarks, fast and in a way that survives being killed.

`interface` is what every engine can do; `generation` does it with transformers' models, `vllm` with
vLLM. `run` asks all questions of a benchmark, in one process or in several that share the work.
"""
