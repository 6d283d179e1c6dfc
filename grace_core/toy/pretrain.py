"""Pretrain the toy teacher or student: `python -m grace_core.toy.pretrain`.

Plain PyTorch: Muon and AdamW, linear warm-up and cosine decay, cross-entropy on the assistant's
tokens, a fresh stream of generated records (no record is seen twice, none is wrong), bf16 autocast;
weights are kept in fp32 and saved in bf16.

Both learn to look first (captions and short answers) and then everything. The student goes on with
captions alone, which makes it a model with something to learn: its vision tower knows shapes,
colours, places and words, but its decoder has half forgotten how to answer questions.
"""

import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3VLForConditionalGeneration

from grace_core.errors import GraceError
from grace_core.toy.batched import Encoder, encode_pictures, hidden_states
from grace_core.toy.checkpoints import Role, build_model, save_checkpoint
from grace_core.toy.conversations import Mixture, converse
from grace_core.toy.encoding import encode_conversation
from grace_core.toy.pictures import draw_scene, render
from grace_core.toy.scoring import pad_rows, score_benchmark
from grace_core.toy.tokenizer import shared_tokenizer
from grace_core.toy.world import stream

PROVENANCE_FILE = "provenance.json"
BENCHMARK_SEED = 2026
"""Seed of the held-out benchmark that the shipped scores refer to."""

_SNAPSHOT_STEPS = 500


@dataclass(frozen=True)
class Recipe:
    """One run of training.

    Attributes:
        phases: mixtures in their order, each with the share of the steps at which it ends.
        steps: optimizer steps; a step sees `batch_size` records.
        learning_rate: the peak, of Muon (scaled to AdamW's update size) and AdamW alike.
        max_length: tokens a row; as many turns are asked as fit.
        independent_share: of the rows, those whose questions do not see each other. Else later
            answers can be read off earlier ones, which teaches the models to look less.
    """

    phases: tuple[tuple[float, Mixture], ...]
    steps: int
    batch_size: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    max_length: int = 128
    independent_share: float = 0.8

    def mixture_at(self, step: int) -> Mixture:
        return next(mixture for end, mixture in self.phases if step < end * self.steps or end == 1)


_TURNS = (9, 9)
_LOOKING = Mixture(forms={"describe": 0.4, "free": 0.6}, turns=_TURNS)
_EVERYTHING = Mixture(
    forms={"describe": 0.15, "free": 0.25, "yesno": 0.3, "mcq": 0.3}, turns=_TURNS
)

_CAPTIONS = Mixture(forms={"describe": 1.0}, turns=(1, 1))

RECIPES: dict[Role, tuple[Recipe, ...]] = {
    "teacher": (Recipe(phases=((0.3, _LOOKING), (1.0, _EVERYTHING)), steps=2600),),
    "student": (
        Recipe(phases=((0.25, _LOOKING), (1.0, _EVERYTHING)), steps=1400),
        Recipe(phases=((1.0, _CAPTIONS),), steps=150, batch_size=32, warmup_steps=10),
    ),
}
"""Runs one after another, each with a schedule and optimizers of its own."""


class _Batches(Dataset[dict[str, Tensor]]):
    """Batch number `index` of the stream, a function of (stream_name, seed, index) alone."""

    def __init__(self, recipe: Recipe, stream_name: str, seed: int) -> None:
        self.recipe = recipe
        self.stream_name = stream_name
        self.seed = seed

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = index * self.recipe.batch_size
        pictures, rows = [], []
        for record in range(first, first + self.recipe.batch_size):
            rng = stream(self.stream_name, self.seed, record)
            scene = draw_scene(rng, held_out=False)
            turns = converse(scene, self.recipe.mixture_at(index), rng)
            pictures.append(render(scene))
            rows.append(
                encode_conversation(
                    turns,
                    newline_after_picture=rng.random() < 0.5,
                    max_length=self.recipe.max_length,
                    independent=rng.random() < self.recipe.independent_share,
                )
            )
        pixels = torch.from_numpy(np.stack(pictures))
        return {"pixels": pixels} | pad_rows(rows, length=self.recipe.max_length)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then cosine down to zero at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def supervised_loss(
    model: Qwen3VLForConditionalGeneration,
    batch: dict[str, Tensor],
    encode: Encoder = encode_pictures,
) -> Tensor:
    """Mean cross-entropy over the batch's supervised tokens."""
    hidden = hidden_states(model, batch["pixels"], batch["ids"], batch["segments"], encode)
    targets = batch["supervised"][:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets])
    return F.cross_entropy(logits.float(), batch["ids"][:, 1:][targets])


def build_optimizers(
    model: Qwen3VLForConditionalGeneration, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head, patches, norms and biases."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not any(s in name for s in ("embed", "lm_head"))
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    role: Role,
    recipes: tuple[Recipe, ...],
    *,
    seed: int,
    device: torch.device,
    workers: int,
    compiled: bool,
    snapshot: Path,
) -> Qwen3VLForConditionalGeneration:
    """Train the role's model from random weights, recipe after recipe; returns it in fp32.

    Every `_SNAPSHOT_STEPS` steps the weights so far are written to `snapshot`.
    """
    torch.set_float32_matmul_precision("high")
    model = build_model(role, seed=seed).to(device).train()
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward is slow here
    encode: Encoder = encode_pictures
    if compiled:
        encode = torch.compile(encode_pictures, dynamic=False)
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    shared_tokenizer()  # built once here, inherited by the workers
    started = time.monotonic()
    for run, recipe in enumerate(recipes):
        optimizers = build_optimizers(model, recipe)
        for step, batch in enumerate(_stream(recipe, f"pretrain/{run}", seed, workers, device)):
            loss = _step(model, batch, encode, optimizers, step, recipe)
            if step % 20 == 0 or step + 1 == recipe.steps:
                figures = f"loss {loss.item():.4f} {time.monotonic() - started:.0f} s"
                print(f"{role} run {run} step {step} {figures}", flush=True)
            if step and step % _SNAPSHOT_STEPS == 0:
                # A copy: it leaves the compiled code and its shapes alone.
                copied = copy.deepcopy(model).eval()
                print(f"{role} run {run} step {step} {_headline(_score(copied, 240, 240))}")
                save_checkpoint(copied, snapshot)
    return model.eval()


def _step(
    model: Qwen3VLForConditionalGeneration,
    batch: dict[str, Tensor],
    encode: Encoder,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    recipe: Recipe,
) -> Tensor:
    """One optimizer step; returns its loss in nats a supervised token."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate_at(step, recipe)
    with torch.autocast(batch["pixels"].device.type, torch.bfloat16):
        loss = supervised_loss(model, batch, encode)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _stream(
    recipe: Recipe, name: str, seed: int, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        _Batches(recipe, name, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_use_one_thread,
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _score(
    model: Qwen3VLForConditionalGeneration, choice_count: int, yesno_count: int
) -> dict[str, float]:
    return score_benchmark(
        model, seed=BENCHMARK_SEED, choice_count=choice_count, yesno_count=yesno_count
    )


def _headline(scores: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.1f}" for name, value in scores.items())


def pretrain(
    role: Annotated[Role, typer.Argument(help="teacher or student")],
    out: Annotated[Path, typer.Argument(help="directory to write, must not exist yet")],
    seed: Annotated[int, typer.Option(help="of weights and data")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    workers: Annotated[int, typer.Option(help="data processes; 0 = in the trainer")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="compile the models, needs g++")
    ] = True,
) -> None:
    """Pretrain the toy teacher or student on a fresh stream of records."""
    if out.exists():
        raise GraceError(f"Toy pretraining: {out} exists; name a new directory or remove it.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    partial = out.with_name(out.name + ".partial")
    model = train(
        role,
        RECIPES[role],
        seed=seed,
        device=torch.device(device),
        workers=workers,
        compiled=compiled,
        snapshot=partial,
    )
    # Scored as it will be loaded: weights rounded to bf16.
    model = copy.deepcopy(model).to(torch.bfloat16).float()
    scores = _score(model, 1200, 1200)
    print(f"{role} done: {_headline(scores)}", flush=True)
    save_checkpoint(model, partial)
    provenance = _provenance(role, seed, device, scores, time.monotonic() - started)
    text = json.dumps(provenance, indent=2) + "\n"
    (partial / PROVENANCE_FILE).write_text(text, encoding="utf-8")
    os.replace(partial, out)


def _provenance(
    role: Role, seed: int, device: str, scores: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "role": role,
        "command": f"grace toy pretrain {role} OUT --seed {seed}",
        "seed": seed,
        "recipes": [asdict(recipe) for recipe in RECIPES[role]],
        "records_seen": sum(recipe.steps * recipe.batch_size for recipe in RECIPES[role]),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "seconds": round(seconds),
        "scores": {
            "benchmark_seed": BENCHMARK_SEED,
            "items": {"toy-choice": 1200, "toy-yesno": 1200},
            "per_cent": {name: round(value, 2) for name, value in scores.items()},
        },
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Entry point of `python -m grace_core.toy.pretrain`."""
    typer.run(pretrain)


if __name__ == "__main__":
    main()
