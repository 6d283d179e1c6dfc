"""The `README.md` of the index repository: which models make the release, and where to get them."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from grace_core.publish.index import INDEX, ReleaseIndex


def index_card(index: ReleaseIndex, *, repository: str, licence: str) -> str:
    """The card's whole text, metadata block first."""
    data = ModelCardData(license=licence, tags=["grace", "release-index"])
    lines = ["| Model | Commit | Tag | Size |", "|---|---|---|---:|"]
    for model in index.models.values():
        lines.append(
            f"| [{model.repository}](/{model.repository}) | `{model.commit}` | `{model.tag}` | "
            f"{model.bytes / 1e9:.2f} GB |"
        )
    labels = ", ".join(label.upper() for label in index.models)
    text = f"""# Release of {labels}

These models belong together: each quantized one was trained from the full-precision one, and all
were scored in the same run. `{INDEX}` names the commit of each. It is written last, once every
model is there and verified, so what it names is always whole; a `main` branch may be ahead of it
while a new release is being published.

{chr(10).join(lines)}

```python
import json
from huggingface_hub import hf_hub_download
from transformers import AutoModelForImageTextToText

index = json.load(open(hf_hub_download("{repository}", "{INDEX}")))
chosen = index["models"]["{next(reversed(index.models))}"]
model = AutoModelForImageTextToText.from_pretrained(chosen["repository"], revision=chosen["commit"])
```
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
