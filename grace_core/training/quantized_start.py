"""How the student of a quantized training becomes one: freshly, or with a checkpoint's scales."""

from __future__ import annotations

from torch import nn

from grace_core.errors import GraceError
from grace_core.models.families import Family
from grace_core.quantization.checkpoint import is_quantized, load_scales
from grace_core.quantization.convert import convert, convert_with_scales, quantizable_linears
from grace_core.quantization.scales import ScaleBank
from grace_core.training.job import TrainingJob


def quantized_start(model: nn.Module, job: TrainingJob, family: Family) -> ScaleBank:
    """Replace the decoder's projections by quantized ones.

    Scales are the start's where it is a quantized checkpoint, else the best of a few candidates.

    Raises:
        GraceError: the checkpoint's quantized layers are not the decoder's projections.
    """
    if is_quantized(job.student):
        trained = load_scales(job.student)
        assert (trained.bits, trained.group_size) == (job.bits, job.group_size), "checked before"
        expected = quantizable_linears(model, family.decoder)
        if trained.scales.keys() != expected.keys():
            differing = sorted(trained.scales.keys() ^ expected.keys())
            raise GraceError(
                f"{job.student}: its quantized layers are not those that are trained, first "
                f"{differing[0]}; a checkpoint of another recipe cannot be gone on from"
            )
        return convert_with_scales(
            model, trained.scales, bits=trained.bits, group_size=trained.group_size
        )
    return convert(model, decoder_prefix=family.decoder, bits=job.bits, group_size=job.group_size)
