"""What a release is called."""

from __future__ import annotations

from grace_core.config.publish import HubDestination
from grace_core.config.tree import GraceConfig


def release_name(base: str, label: str, group_size: int) -> str:
    """`Toy-GRACE-BF16` for label bf16, `Toy-GRACE-W4G128` for w4 with groups of 128."""
    return f"{base}-{'BF16' if label == 'bf16' else f'{label.upper()}G{group_size}'}"


def repository_name(config: GraceConfig, label: str) -> str:
    """The release's name, with the owner in front where it goes to the Hub."""
    name = release_name(config.publish.name, label, config.quantize.group_size)
    destination = config.publish.destination
    return f"{destination.namespace}/{name}" if isinstance(destination, HubDestination) else name


def index_repository(config: GraceConfig) -> str:
    """`Toy-GRACE-Releases`: what holds the release index, with the owner in front on the Hub."""
    name, destination = f"{config.publish.name}-Releases", config.publish.destination
    return f"{destination.namespace}/{name}" if isinstance(destination, HubDestination) else name
