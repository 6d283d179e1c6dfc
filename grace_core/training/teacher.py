"""The frozen teacher of a training: whole on every rank's device, or sharded over the ranks.

Sharded, its weights are divided by ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054), whatever the
student's own ZeRO stage: each rank holds 1 / R of every tensor, and a module's weights are whole
only while it is called. So all ranks make the same calls in the same order: callers see to it that
they make as many passes, and each use of the head counts.

The model is two things to DeepSpeed. All but the head is an engine without an optimizer, which
gathers the next module's weights while one computes; that relies on every pass calling the same
modules. The head is called in the teacher's passes and in the student's, so it is not part of them
and is gathered by itself (:class:`_ShardedHead`).
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist

from grace_core.config.models import TeacherWeights
from grace_core.config.training import Training
from grace_core.losses.fused_head import SupervisedHead, supervised_head
from grace_core.losses.objective import Teacher
from grace_core.models.families import Family
from grace_core.models.forward import RowStates, row_states
from grace_core.models.fused_forward import choose_forward
from grace_core.models.loading import CheckpointFolder, load_model
from grace_core.models.rows import PackedRow
from grace_core.training.engine import initialized, join_process_group
from grace_core.training.zero import sharded_teacher_settings

log = logging.getLogger(__name__)


def load_teacher(
    folder: CheckpointFolder, weights: TeacherWeights, training: Training, device: torch.device
) -> Teacher:
    """Load a teacher; called by all ranks of the group.

    Sharded, it is never whole on the device. On the CPU it is: there the weights are the files'
    own pages, which all ranks of a machine share.
    """
    sharded = weights == "sharded"
    model = load_model(folder, device="cpu" if sharded else device, attention="packed")
    model.requires_grad_(False)
    if sharded:
        return _sharded(model, folder.family, training, device)
    choose_forward(model, folder.family, training.kernels)
    return Teacher.of(model, folder.family)


def gathered_bytes(teacher: Teacher) -> int:
    """What its head takes on a device beside the student's activations, if it is sharded."""
    weight = teacher.head.weight
    return int(getattr(weight, "ds_numel", 0)) * weight.element_size()


def _sharded(model: Any, family: Family, training: Training, device: torch.device) -> Teacher:
    """Divide a model that is on the CPU over the ranks, tensor by tensor on their devices."""
    settings = sharded_teacher_settings(
        training, processes=dist.get_world_size(), device=device.type
    )
    join_process_group()
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=model.dtype)
    model.to(device)  # buffers; of parameters nothing is left to be moved
    choose_forward(model, family, training.kernels)
    head = _ShardedHead(supervised_head(model))
    model.lm_head = head
    engine = initialized(_AllButTheHead(model, family), settings)
    engine.eval()
    log.info(
        "teacher sharded over %d ranks: %.2f GB of weights on each",
        dist.get_world_size(),
        sum(p.ds_tensor.nbytes for p in model.parameters()) / 1e9,
    )

    def states(row: PackedRow) -> RowStates:
        predicting, *visual = engine(row)
        return RowStates(predicting, visual)

    return Teacher(states, head)


class _ShardedHead(SupervisedHead):
    """A head whose weight is gathered for each call."""

    def forward(self, input: Tensor, **how: Any) -> Any:
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        with deepspeed.zero.GatheredParameters(own):
            return super().forward(input, **how)


class _AllButTheHead(nn.Module):
    """The module whose call is one pass, as ZeRO-3 needs one to begin and end with."""

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__()
        self.body = model.model
        reached = set(self.body.parameters()) | set(model.lm_head.parameters())
        assert reached == set(model.parameters()), "every weight is the body's or the head's"
        # In a tuple, so that the head is no module of this one.
        self._model = (model, family)

    def forward(self, row: PackedRow) -> tuple[Tensor, ...]:
        states = row_states(*self._model, row)
        return states.predicting, *states.visual
