"""The sidecar of an officially published checkpoint, read without running anything in it.

GRACE's training code leaves `qat_quantized_weights.bin` beside the weights
(https://github.com/ForeverBlue816/GRACE, `qat_modules.materialize_quantized_state_dict` at
b73fa9b4): a flat dictionary, pickled by `torch.save`, with for each quantized module

    <module>.weight      (O, I)   code * scale in the model's dtype
    <module>.log_scale   (G,)     log of the scales, row by row of the (O, I / g) groups
    <module>.bias        (O,)     where there is one

A pickle is a program. torch's weights-only reader runs none of it but what rebuilds tensors, and
refuses the rest; what it returns is then held to the form above.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_core.errors import GraceError

SIDECAR = "qat_quantized_weights.bin"
PARTS = ("weight", "log_scale", "bias")
_DAMAGE = (
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    AttributeError,
    TypeError,
)
"""What torch's reader raises for a file that is cut or altered."""


@dataclass(frozen=True)
class SidecarLayer:
    """One quantized module as stored; tensors are mapped from the file.

    Attributes:
        weight: (O, I), floating.
        log_scale: (O, G) fp32.
    """

    weight: Tensor
    log_scale: Tensor

    @property
    def group_size(self) -> int:
        return self.weight.shape[1] // self.log_scale.shape[1]


def read_sidecar(file: Path) -> dict[str, SidecarLayer]:
    """The quantized modules by name, in the order of the file.

    Raises:
        GraceError: the file holds anything but tensors, is damaged, or its tensors do not make
            layers; every problem of the tensors is named.
    """
    stored = _load(file)
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise GraceError(f"{file}: holds no dictionary of tensors by name; not a GRACE sidecar")
    problems = [problem for name, value in stored.items() for problem in _unsound(name, value)]
    _refuse(file, problems)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in stored))
    _refuse(file, [problem for module in modules for problem in _misfit(module, stored)])
    if not modules:
        raise GraceError(f"{file}: no quantized module is in it")
    return {module: _layer(module, stored) for module in modules}


def _load(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise GraceError(
            f"{file}: not a file that torch.save writes since version 1.6; other pickles are not "
            "read, as reading one can run any program"
        )
    try:
        with zipfile.ZipFile(file) as entries:
            stored = [entry.compress_type == zipfile.ZIP_STORED for entry in entries.infolist()]
        if not all(stored):  # torch would map the compressed bytes as if they were values
            raise GraceError(f"{file}: compressed, which torch.save never does; get it again")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's message goes on to advise reading it nevertheless; only the name is taken from it.
        named = re.search(r"(?:GLOBAL|global:?) (\S+)", str(error))
        what = f" (it asks for {named[1]})" if named else ""
        raise GraceError(
            f"{file}: refused, because it holds more than tensors{what}, and unpickling that could "
            "run any program; do not read it by other means, get it from a source you trust"
        ) from None
    except _DAMAGE as error:
        first = (str(error).splitlines() or [""])[0]
        raise GraceError(
            f"{file}: damaged ({type(error).__name__}: {first}); download it again"
        ) from error


def _unsound(name: str, value: object) -> list[str]:
    """What makes a value unfit to be read further, whatever it is meant to be."""
    if name.rpartition(".")[2] not in PARTS or not name.rpartition(".")[0]:
        return [f"{name}: no {', '.join(PARTS)} of a module"]
    if type(value) not in (Tensor, torch.nn.Parameter):
        return [f"{name}: {type(value).__name__}, not a tensor"]
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.is_quantized or not value.is_floating_point():
        return [f"{name}: {value.dtype}, {value.layout}; plain floating-point values are stored"]
    if not value.is_contiguous():  # a few bytes may pose as a tensor of any size
        return [f"{name}: its values do not lie one after the other"]
    return []


def _misfit(module: str, stored: Mapping[str, Tensor]) -> list[str]:
    missing = [part for part in ("weight", "log_scale") if f"{module}.{part}" not in stored]
    if missing:
        return [f"{module}: without {' and '.join(missing)}"]
    weight, log_scale = stored[f"{module}.weight"], stored[f"{module}.log_scale"]
    bias = stored.get(f"{module}.bias")
    if weight.ndim != 2 or weight.numel() == 0:
        return [f"{module}.weight: of shape {tuple(weight.shape)}, no matrix"]
    outputs, inputs = weight.shape
    groups, left = divmod(log_scale.numel(), outputs)
    if log_scale.ndim != 1 or left or groups == 0 or inputs % groups:
        return [
            f"{module}.log_scale: {tuple(log_scale.shape)} values do not divide a weight of shape "
            f"{tuple(weight.shape)} into groups"
        ]
    if bias is not None and bias.shape != (outputs,):
        return [f"{module}.bias: of shape {tuple(bias.shape)} beside {outputs} outputs"]
    if not torch.isfinite(log_scale).all():
        return [f"{module}.log_scale: not finite"]
    return []


def _layer(module: str, stored: Mapping[str, Tensor]) -> SidecarLayer:
    weight = stored[f"{module}.weight"].detach()
    log_scale = stored[f"{module}.log_scale"].detach().float().view(weight.shape[0], -1)
    return SidecarLayer(weight, log_scale)


def _refuse(file: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + ("" if len(problems) <= 5 else "; and more")
        raise GraceError(f"{file}: {len(problems)} problems: {shown}")
