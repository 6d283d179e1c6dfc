"""What is raised where the Hugging Face Hub cannot be reached, whichever client is installed.

huggingface_hub lets the errors of its HTTP library through: httpx below version 2, httpx2 from then
on. Both may be installed.
"""

from __future__ import annotations

import importlib

import huggingface_hub
from packaging.version import Version

_LIBRARY = "httpx2" if Version(huggingface_hub.__version__).major >= 2 else "httpx"

TransportError: type[Exception] = importlib.import_module(_LIBRARY).TransportError
"""The connection failed or timed out; a sub-class says how."""
