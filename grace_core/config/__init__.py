"""The one typed, frozen configuration tree: what it holds (`tree`) and how it is read (`load`)."""

from grace_core.config.load import load_config
from grace_core.config.tree import GraceConfig

__all__ = ["GraceConfig", "load_config"]
