"""Several small trainings one after the other in one process group: each start costs seconds.

    torchrun --standalone --nproc-per-node 2 -m tests.training_process CASES.json OUT

CASES.json is a list of {"name", "do", "job", ...}; `do` names one of the functions in `ACTIONS`.
Each case leaves OUT/<name>.json and, where it has tensors to show, OUT/<name>.safetensors. What a
case raises is left as {"error": [type, text]}; it must be raised by all ranks alike, or they hang.
"""

from __future__ import annotations

import faulthandler
import gc
import inspect
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from grace_core.models.forward import RowStates
from grace_core.models.loading import CheckpointFolder, load_model, read_checkpoint
from grace_core.models.rows import packed_row
from grace_core.models.visual_inputs import VisualInputs
from grace_core.training import loop
from grace_core.training.checkpoint import unique_parameters
from grace_core.training.job import TrainingJob
from grace_core.training.loop import Trainer
from grace_core.training.stopping import StopSignal
from grace_core.training.teacher import load_teacher
from tests.prepared_rows import prepared_row

CPU = torch.device("cpu")
Outcome = tuple[dict[str, Any], dict[str, Tensor]]


def first_step(case: dict[str, Any], job: TrainingJob) -> Outcome:
    """One optimizer step: what DeepSpeed made of the model, what was measured, the gradients."""
    trainer = Trainer(job, CPU)
    facts = _facts(trainer)
    gradients: dict[str, Tensor] = {}
    step = trainer.engine.step

    def look_then_step() -> None:
        if trainer.engine.is_gradient_accumulation_boundary():
            for name, parameter in unique_parameters(trainer.student.model):
                if parameter.requires_grad:
                    gradient = safe_get_full_grad(parameter)
                    gradients[name] = gradient.detach().float().clone()
        step()

    trainer.engine.step = look_then_step
    rows = next(iter_rows(trainer))
    theta = None if trainer.bank is None else trainer.bank.flat.detach().clone()
    report = trainer.optimizer_step(rows)
    tensors = {f"weight.{name}": value for name, value in gradients.items()}
    if trainer.bank is not None:
        tensors |= {"theta.before": theta, "theta.after": trainer.bank.flat.detach().clone()}
        tensors["theta.gradient"] = trainer.bank.flat.grad.clone()
    pictures = [len(row.visual_spans) for row in rows]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {"pictures": pictures, **facts})
    report_of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(report_of_all, vars(report))
    return {"ranks": everyone, "reports": report_of_all, "beta": trainer.controller.beta}, tensors


def iter_rows(trainer: Trainer) -> Any:
    """This rank's rows, a list for each optimizer step."""
    rows = iter(trainer._rows())
    while True:
        yield [next(rows) for _ in range(trainer._rows_per_process)]


def _facts(trainer: Trainer) -> dict[str, Any]:
    model = trainer.student.model
    parameters = dict(unique_parameters(model))
    buffers = {name: str(b.dtype) for name, b in model.named_buffers() if "inv_freq" in name}
    facts: dict[str, Any] = {
        "weight_dtypes": sorted({str(p.dtype) for p in parameters.values()}),
        "rotary_dtypes": buffers,
        "sizes": {name: p.numel() for name, p in parameters.items()},
        "state_dict": sorted(trainer.engine.module.state_dict()),
        "engine": {
            "train_batch_size": trainer.engine.train_batch_size(),
            "accumulation": trainer.engine.gradient_accumulation_steps(),
            "stage": trainer.engine.zero_optimization_stage(),
        },
        "teacher": trainer.teacher is not None,
        "optimizer_state": len(trainer.engine.basic_optimizer.state),
    }
    if hasattr(next(iter(parameters.values())), "ds_id"):
        facts["whole_sizes"] = {name: p.ds_numel for name, p in parameters.items()}
        facts["shard_sizes"] = {name: p.ds_tensor.numel() for name, p in parameters.items()}
    if trainer.bank is not None:
        bank = trainer.bank
        pointer = bank.flat.data_ptr()
        facts["theta"] = {
            "dtype": str(bank.flat.dtype),
            "leaf_dtypes": sorted({str(bank.layer(name).dtype) for name in bank}),
            "module_dtypes": sorted(
                {str(model.get_submodule(name).theta.dtype) for name in bank},
            ),
            "leaves_share_storage": all(
                model.get_submodule(name).theta is bank.layer(name)
                and bank.layer(name).untyped_storage().data_ptr()
                == bank.flat.untyped_storage().data_ptr()
                for name in bank
            ),
            "layers": list(bank),
            "in_parameters": any(p.data_ptr() == pointer for p in parameters.values()),
        }
    return facts


def train(case: dict[str, Any], job: TrainingJob) -> Outcome:
    """The whole job; the last rank is told to stop in step `sigterm_after`, where that is given.

    After step `poison_after` a weight of the first rank becomes NaN. With `damage`, a byte of the
    newest checkpoint has changed before the run continues.
    """
    if case.get("damage") and dist.get_rank() == 0:
        newest = max(job.checkpoints.glob("step-*"))
        _flip_a_byte(newest / "optimizer-00000.safetensors")
    dist.barrier()
    stop = StopSignal()
    stop.listen()
    plain_step = Trainer.optimizer_step

    def eventful_step(trainer: Trainer, rows: Any) -> Any:
        report = plain_step(trainer, rows)
        last_rank = dist.get_rank() == dist.get_world_size() - 1
        if trainer.step == case.get("sigterm_after") and last_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if trainer.step == case.get("poison_after") and dist.get_rank() == 0:
            with torch.no_grad():
                trainer.student.model.lm_head.weight[0, 0] = float("nan")
        return report

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    loop.log.addHandler(handler)
    Trainer.optimizer_step = eventful_step  # type: ignore[method-assign]
    try:
        finished = loop.train(job, CPU, stop)
    finally:
        Trainer.optimizer_step = plain_step  # type: ignore[method-assign]
        loop.log.removeHandler(handler)
    return {"finished": finished, "log": records}, {}


def sharded_teachers(case: dict[str, Any], job: TrainingJob) -> Outcome:
    """States and logits of the tiny teachers in `folders`, whole and sharded."""
    found = {
        name: _whole_and_sharded(read_checkpoint(Path(folder)), job)
        for name, folder in case["folders"].items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {"ranks": everyone}, {}


@torch.no_grad()
def _whole_and_sharded(folder: CheckpointFolder, job: TrainingJob) -> dict[str, Any]:
    visual = VisualInputs(folder, min_pixels=1024, max_pixels=16384)
    model = load_model(folder, device=CPU)
    text_alone = dist.get_rank() > 0
    samples = [prepared_row(model, i, pictures=0 if text_alone else i) for i in range(3)]
    row = packed_row(samples, visual)
    whole, sharded = (
        load_teacher(folder, weights, job.training, CPU) for weights in ("whole", "sharded")
    )
    expected = whole.states(row)
    passes = [_same_states(sharded.states(row), expected) for _ in range(4)]
    logits = sharded.head(expected.predicting)
    # The module that DeepSpeed was given holds everything but the head.
    body = inspect.getclosurevars(sharded.states).nonlocals["engine"].module
    parameters = {**dict(body.named_parameters()), "head": sharded.head.weight}
    return {
        "passes": passes,
        "logits": torch.equal(logits, whole.head(expected.predicting)),
        "whole": [name for name, one in parameters.items() if one.numel()],
        "shares": {name: one.ds_tensor.numel() for name, one in parameters.items()},
        "halves": {name: -(-one.ds_numel // 2) for name, one in parameters.items()},
        "buffers": sorted({str(b.dtype) for b in body.buffers() if b.is_floating_point()}),
    }


def _same_states(found: RowStates, expected: RowStates) -> bool:
    both = zip(
        [found.predicting, *found.visual], [expected.predicting, *expected.visual], strict=True
    )
    return all(torch.equal(one, other) for one, other in both)


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


ACTIONS: dict[str, Callable[[dict[str, Any], TrainingJob], Outcome]] = {
    "first_step": first_step,
    "train": train,
    "sharded_teachers": sharded_teachers,
}


def main(cases: Path, out: Path) -> None:
    # DeepSpeed collects garbage a dozen times while it sets up; what the imports left stays anyway.
    gc.freeze()
    faulthandler.dump_traceback_later(450)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    dist.init_process_group("gloo")
    for case in json.loads(cases.read_text(encoding="utf-8")):
        started = time.monotonic()
        tensors: dict[str, Tensor] = {}
        try:
            found, tensors = ACTIONS[case["do"]](case, TrainingJob.model_validate(case["job"]))
        except Exception as error:
            traceback.print_exc()
            found = {"error": [type(error).__name__, str(error)]}
        if dist.get_rank() == 0:
            if tensors:
                save_file(tensors, out / f"{case['name']}.safetensors")
            found["seconds"] = time.monotonic() - started
            (out / f"{case['name']}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
