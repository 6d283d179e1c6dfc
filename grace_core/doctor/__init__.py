"""Checks before anything expensive starts: is everything here that a run needs?

One file a concern, each a function that yields findings: `versions` (installed packages), `machine`
(GPUs, memory, limits; SLURM), `disk`, `inputs` (data and models), `hub`. `examination` asks all of
them; `findings` is what they say it in. Nothing is loaded or downloaded, and no torch is imported.
"""
