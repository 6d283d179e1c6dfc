"""What a node says of itself, in a few words; shared by the tree and the picture."""

from __future__ import annotations

from grace_core.lineage.graph import Node

_COUNTS = ("records", "used", "quarantined", "held_out", "tokens")
_HARDWARE = ("gpu", "cpu")


def title(node: Node) -> str:
    """Its stage or kind, with its name where that says more."""
    return node.stage if node.name == node.stage else f"{node.stage} {node.name}"


def details(node: Node) -> list[str]:
    """Counts, scores, settings or places: what tells this node from others of its kind."""
    if node.from_outside:
        return [f"revision {node.revision[:12]}"] if node.revision else []
    if not node.present:
        return ["its folder is gone"]
    if node.stage == "publish":
        return [f"{place.location} at {place.revision[:12]}" for place in node.published.values()]
    if node.stage == "world":
        return [f"{node.config['records']:,} records"] if "records" in node.config else []
    if node.stage.startswith("evaluate-"):
        return scores(node)
    if "training" in node.config:
        return _training(node)
    if node.stage.startswith("release-") and "bytes" in node.metrics:
        return [f"{node.metrics['bytes'] / 1e6:,.1f} MB"]
    counted = {name: node.metrics[name] for name in _COUNTS if name in node.metrics}
    if counted.get("held_out") == 0:
        del counted["held_out"]
    return [f"{count:,.0f} {name.replace('_', ' ')}" for name, count in counted.items()]


def scores(node: Node) -> list[str]:
    """What an evaluation measured, without how well the answers could be read."""
    return [f"{name} {value:.1f}" for name, value in node.metrics.items() if "/" not in name]


def hardware(node: Node) -> str:
    """`2 x NVIDIA H200`, or the processor."""
    return next((node.environment[name] for name in _HARDWARE if name in node.environment), "")


def _training(node: Node) -> list[str]:
    training = node.config["training"]
    length = f"{training['steps']} steps" if training["steps"] else f"{training['epochs']} epochs"
    ranks = node.environment.get("world_size")
    of = "" if ranks is None else f", {ranks} process{'' if ranks == '1' else 'es'}"
    lines = [length, f"ZeRO-{training['zero_stage']}{of}"]
    if node.config.get("precision"):
        lines.append(f"{node.config['precision'].upper()}, groups of {node.config['group_size']}")
    return lines
