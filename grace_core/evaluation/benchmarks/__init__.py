"""The benchmarks: a declaration each, found by name."""

from __future__ import annotations

import difflib

from grace_core.config.evaluation import ChosenBenchmark
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks.ai2d import AI2D, AI2D_NO_MASK
from grace_core.evaluation.benchmarks.gqa import GQA
from grace_core.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from grace_core.evaluation.benchmarks.mmbench import MMBENCH
from grace_core.evaluation.benchmarks.mme import MME
from grace_core.evaluation.benchmarks.mmmu import MMMU
from grace_core.evaluation.benchmarks.mmstar import MMSTAR
from grace_core.evaluation.benchmarks.pope import POPE
from grace_core.evaluation.benchmarks.scienceqa import SCIENCEQA
from grace_core.evaluation.benchmarks.seedbench import SEEDBENCH
from grace_core.evaluation.benchmarks.toy import TOY_CHOICE, TOY_YESNO
from grace_core.evaluation.benchmarks.vqa import TEXTVQA, VIZWIZ, VQAV2
from grace_core.evaluation.declaration import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        HALLUSIONBENCH,
        MMBENCH,
        SCIENCEQA,
        AI2D,
        AI2D_NO_MASK,
        MMMU,
        SEEDBENCH,
        MMSTAR,
        VQAV2,
        GQA,
        TEXTVQA,
        VIZWIZ,
        POPE,
        MME,
        TOY_CHOICE,
        TOY_YESNO,
    )
}
"""By name: the model card's seven in its order, the paper's other sets, the toy ones."""


def find_benchmark(name: str) -> Benchmark:
    """The declaration of a benchmark. Raises GraceError, with the nearest name, for another."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), BENCHMARKS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(BENCHMARKS)}"
    raise GraceError(f"no benchmark is called {name!r}; {hint}")


def is_generated(chosen: ChosenBenchmark) -> bool:
    """Whether its rows are those of the toy world."""
    declared = find_benchmark(chosen.name)
    return declared.source is None and chosen.path is None and chosen.repository is None
