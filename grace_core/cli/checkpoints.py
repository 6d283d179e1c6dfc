"""Commands for checkpoints outside of a run: import a published one, pack a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from grace_core.cli.app import app, console

_PANEL = "Checkpoints"

Destination = Annotated[
    Path, typer.Option("--out", help="Folder to write; it must not exist.", show_default=False)
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Compares the logits.")]


@app.command(
    "import",
    rich_help_panel=_PANEL,
    epilog="Example: grace import Qwen3-VL-2B-GRACE-W4G128 --out runs/imported/w4",
)
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Published checkpoint: weights with qat_quantized_weights.bin, the packed form "
            "with awq_quantized_modules.json, or a packed release of this project.",
            show_default=False,
        ),
    ],
    out: Destination,
    base: Annotated[
        Path | None,
        typer.Option(
            help="For a LLaVA-1.5 of the original LLaVA code: the transformers checkpoint of the "
            "same model, such as llava-hf/llava-1.5-7b-hf; gives tokenizer and vision tower.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make a published quantized checkpoint one that can be evaluated, packed and trained on.

    Codes are kept to the bit and verified. Scales are rounded to bf16, as they are
    used here; import.json says how far that moves the logits. Nothing in the
    sidecar is run: a file that holds more than tensors is refused.
    """
    from grace_core.importing.checkpoint import MANIFEST, import_checkpoint

    manifest = import_checkpoint(folder, out, base=base, device=_device(device))
    for name in ("bits", "group_size", "layers", "equal_codes"):
        console.print(f"{name.replace('_', ' ')}: {manifest[name]:,}", highlight=False)
    console.print(f"scales: {json.dumps(manifest['scales'])}", highlight=False, soft_wrap=True)
    console.print(f"logits: {json.dumps(manifest['logits'])}", highlight=False, soft_wrap=True)
    typer.echo(out / MANIFEST)


@app.command(
    "pack",
    rich_help_panel=_PANEL,
    epilog="Example: grace pack runs/imported/w4 --form awq --out runs/imported/w4-awq",
)
def pack(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Trained or imported quantized checkpoint, such as <artifact>/model of stage w4.",
            show_default=False,
        ),
    ],
    out: Destination,
    form: Annotated[
        Literal["compressed-tensors", "awq"], typer.Option(help="How weights are stored.")
    ] = "compressed-tensors",
    device: DeviceOption = "auto",
) -> None:
    """Pack a quantized checkpoint into a release, proven equal to it.

    The same as stage `release` does: codes, scales, every other tensor, the other
    files and bf16 logits on text and pictures are compared before the folder gets
    its name.
    """
    from grace_core.export.awq import AWQ
    from grace_core.export.checkpoint import new_directory
    from grace_core.export.compressed import COMPRESSED
    from grace_core.export.exactness import check_release
    from grace_core.export.gate_batches import gate_batches
    from grace_core.export.release import export_packed
    from grace_core.quantization.checkpoint import load_scales

    chosen = AWQ if form == "awq" else COMPRESSED
    # Both say what is missing before anything is written.
    gate_batches(checkpoint)
    load_scales(checkpoint)
    with new_directory(out) as folder:
        export_packed(checkpoint, folder, chosen)
        report = check_release(checkpoint, folder, form=chosen, device=_device(device))
    console.print(
        f"{report.layers} layers, {report.codes:,} codes, {report.tensors} other tensors, "
        f"{report.positions} rows of logits: all equal",
        highlight=False,
    )
    typer.echo(out)


def _device(name: Literal["auto", "cpu", "cuda"]) -> str:
    from grace_core.bench.device import bench_device

    return str(bench_device(name))
