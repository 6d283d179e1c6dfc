"""`grace bench decode`: how fast tokens are decoded with packed weights."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_core.cli.app import console
from grace_core.cli.bench import DeviceOption, ShapesOption, bench, write_result
from grace_core.errors import GraceError

if TYPE_CHECKING:
    import torch

    from grace_core.bench.decode import DecodeTable

_WEIGHTS = ("bf16", "w8", "w4")
_TEXT_TOKENS = 50


@bench.command(
    epilog="Examples:\n\n"
    "grace bench decode                                     random weights of the 2B shapes\n\n"
    "grace bench decode runs/demo/releases/Toy-GRACE-W4G128   a release\n\n"
    "grace bench decode --weights bf16,w4 --batches 1,8     a part of the table\n\n"
    "grace bench decode --products --batches 1,8,128        single products, by kernel",
)
def decode(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A release or checkpoint; without, random weights of the shapes.",
            show_default=False,
        ),
    ] = None,
    shapes: ShapesOption = "real",
    device: DeviceOption = "auto",
    weights: Annotated[str, typer.Option(help="Of the shapes, with commas between.")] = ",".join(
        _WEIGHTS
    ),
    batches: Annotated[
        str, typer.Option(help="Rows decoded side by side, with commas between.")
    ] = "1,2,4,8,16,32,64",
    products: Annotated[
        bool,
        typer.Option(
            "--products",
            help="Instead: time the products of the 2B shapes one by one, with as many rows as "
            "--batches says, each way beside cuBLAS with bf16 weights. Needs a GPU.",
        ),
    ] = False,
    plans: Annotated[
        bool, typer.Option("--plans", help="With --products: other plans of the kernels too.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for decode.json and decode.md.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure decoding with BF16, W8 and W4 weights.

    One step puts a token of each row through the decoder, 256 tokens in the cache
    before it: milliseconds, tokens/s and memory, started kernel by kernel and as a
    CUDA graph, beside the time that the bytes of a step take at the rate of a large
    copy. Also the prefill of one picture with 50 tokens, and what transformers'
    own generate takes for a token.

    A row that fails is shown as failed; the exit code is then 1.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from grace_core.bench.device import bench_device

    where = bench_device(device)
    sizes = [_number(size) for size in batches.split(",")]
    if products:
        _products(where, sizes, output, every_plan=plans)
        return
    named = weights.split(",")
    unknown = sorted(set(named) - set(_WEIGHTS))
    if unknown:
        raise GraceError(f"no weights {', '.join(unknown)}; there are {', '.join(_WEIGHTS)}")
    with tempfile.TemporaryDirectory(prefix="grace-bench-") as folder:
        table = _measured(model, shapes, named, sizes, where, Path(folder), output)
    console.print(table.to_rich())
    if table.failed:
        raise typer.Exit(1)


def _measured(
    model: Path | None,
    shapes: Any,
    weights: list[str],
    batches: list[int],
    device: torch.device,
    folder: Path,
    output: Path,
) -> DecodeTable:
    from PIL import Image

    from grace_core.artifacts import environment
    from grace_core.bench.decode import DecodeBench, DecodeTable
    from grace_core.bench.measure import Meter
    from grace_core.bench.random_models import random_model, random_packed_model
    from grace_core.bench.samples import folder_without_weights
    from grace_core.bench.shapes import GROUP_SIZE, SHAPES
    from grace_core.inference.loading import load_release, packing_of
    from grace_core.models.loading import read_checkpoint
    from grace_core.models.visual_inputs import VisualInputs

    chosen = SHAPES[shapes]
    rate = Meter(device, repeats=2).ceilings().bytes_per_second
    if model is not None:
        checkpoint = read_checkpoint(model)
        packing = packing_of(checkpoint)
        weights = ["bf16" if packing is None else f"w{packing.bits}"]
        visual = VisualInputs(checkpoint)
    else:
        checkpoint = folder_without_weights(folder / "shapes", chosen, "student")
        visual = VisualInputs(checkpoint, max_pixels=chosen.picture_side**2)
    picture = Image.new("RGB", (chosen.picture_side, chosen.picture_side), (90, 120, 150))
    found = DecodeTable(
        f"{shapes} shapes" if model is None else model.name,
        _device_name(device),
        environment(),
        rate,
    )
    bench_of_device = DecodeBench(device, visual, rate)
    for name in weights:
        if model is not None:
            made = load_release(model, device)
        elif name == "bf16":
            made = random_model(chosen, "student", device)
        else:
            made = random_packed_model(
                chosen, "student", device, bits=int(name[1:]), group_size=GROUP_SIZE
            )
        for line in bench_of_device.lines(name, made, batches, picture, _TEXT_TOKENS):
            found.lines.append(line)
            write_result(output, "decode", found.to_json(), found.to_markdown())
            took = "failed" if line.best is None else f"{line.best:.3f} ms"
            text = f"{line.weights} {line.what}, batch {line.batch}: {took}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        del made
    return found


def _products(device: torch.device, rows: list[int], output: Path, *, every_plan: bool) -> None:
    if device.type != "cuda":
        raise GraceError("--products times kernels of a GPU, and torch sees none here")
    from grace_core.artifacts import environment
    from grace_core.bench import products

    logging.getLogger("grace_core").setLevel(logging.ERROR)
    found: list[products.Timed] = []
    for some in products.products(device, rows, every_plan=every_plan):
        found += some
        as_markdown = products.to_markdown(_device_name(device), found)
        write_result(output, "products", products.to_json(environment(), found), as_markdown)
    console.print(
        (output / "products.md").read_text(encoding="utf-8"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _device_name(device: torch.device) -> str:
    import torch

    from grace_core.hardware import hardware

    return torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise GraceError(f"--batches takes numbers with commas between, such as 1,8; not {text!r}")
    return int(text)
