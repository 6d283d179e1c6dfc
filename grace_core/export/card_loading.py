"""How to load a release, as its model card says it. Tests run what stands here."""

from __future__ import annotations

from grace_core.export.card_facts import Form, Release

REQUIREMENTS: dict[Form, tuple[str, ...]] = {
    "safetensors": ("transformers>=5.17", "torch", "torchvision", "pillow"),
    "compressed-tensors": (
        *("transformers>=5.17", "torch", "torchvision", "pillow"),
        "compressed-tensors>=0.17",
    ),
    "awq": ("transformers>=5.17", "torch", "torchvision", "pillow", "gptqmodel"),
}
"""What the code below imports, in the versions that it was tested with."""


def loading(release: Release) -> str:
    """The section, with code for transformers, for packed weights and for vLLM."""
    packed = [] if release.quantization is None else [_packed(release)]
    return "\n\n".join(["## Loading", _transformers(release), *packed, _vllm(release)])


def _transformers(release: Release) -> str:
    needs = " ".join(f'"{one}"' if ">" in one else one for one in REQUIREMENTS[release.form])
    dtype = "float16" if release.form == "awq" else "bfloat16"
    device = (
        'device = "cuda"  # AWQ\'s kernels need a GPU'
        if release.form == "awq"
        else 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    )
    return f"""### transformers

```bash
pip install {needs}
```

No code comes with the weights.

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

source = "{release.repository}"
{device}
model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.{dtype}).to(device)
processor = AutoProcessor.from_pretrained(source)

content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], tokenize=True,
    add_generation_prompt=True, return_dict=True, return_tensors="pt").to(device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

Without torchvision, `AutoTokenizer` and `AutoImageProcessor` take the place of `AutoProcessor`:

```python
from transformers import AutoImageProcessor, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(source)
image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
```"""


def _packed(release: Release) -> str:
    return f"""### Weights kept packed

`grace chat {release.repository} --image picture.png` of the GRACE pipeline runs the release as it
is stored, on a GPU or a CPU, without a server."""


def _vllm(release: Release) -> str:
    half = " --dtype half" if release.form == "awq" else ""
    return f"""### vLLM

{_of_vllm(release)}

```bash
vllm serve {release.repository} --max-model-len 8192{half}
```

```python
from vllm import LLM, SamplingParams

llm = LLM("{release.repository}", max_model_len=8192{', dtype="half"' if half else ""})
picture = {{"type": "image_url", "image_url": {{"url": "https://example.com/picture.png"}}}}
question = {{"type": "text", "text": "What is this?"}}
messages = [{{"role": "user", "content": [picture, question]}}]
print(llm.chat(messages, SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)
```"""


def _of_vllm(release: Release) -> str:
    if release.quantization is None:
        return "It loads as any BF16 checkpoint of its backbone."
    if release.form == "compressed-tensors":
        return (
            "vLLM reads `pack-quantized` from `config.json`, without a setting, and keeps the "
            "weights packed."
        )
    return (
        "vLLM reads AWQ from `config.json` and keeps the weights packed. `half` is for its AWQ "
        "kernel, which takes no BF16."
    )
