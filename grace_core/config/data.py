"""Section `data`: where the records come from and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grace_core.config.section import PositiveInt, Section, Share


class ToyData(Section):
    """Generated pictures of shapes with conversations, in ShareGPT4V's schema."""

    kind: Literal["toy"] = "toy"
    records: PositiveInt = Field(2400, description="training records to generate")
    wrong_answer_share: Share = Field(
        0.1,
        description="share (0.1 is 10 %) of training answers that are wrong, as in machine-made "
        "annotations",
    )


class ShareGPT4VData(Section):
    """ShareGPT4V annotation files (JSON array or JSON Lines) and the root of their pictures."""

    kind: Literal["sharegpt4v"] = "sharegpt4v"
    annotations: tuple[str, ...] = Field(
        min_length=1,
        description="annotation files, relative to `root` or absolute; read in this order",
    )
    root: str = Field(
        description="folder below which every picture must lie; `${GRACE_DATA_ROOT}` is expanded"
    )
    limit: PositiveInt | None = Field(None, description="use the first so many records only")


class Data(Section):
    """Where the records come from and how they become tokens."""

    source: Annotated[ToyData | ShareGPT4VData, Field(discriminator="kind")]
    max_tokens: PositiveInt = Field(
        8192, description="tokens; a longer record is quarantined, never cut"
    )
    min_pixels: PositiveInt = Field(784, description="pixels; smaller pictures are enlarged")
    max_pixels: PositiveInt = Field(200_704, description="pixels; larger pictures are reduced")
    max_decoded_pixels: PositiveInt = Field(
        100_000_000, description="pixels; a picture file that decodes to more is quarantined"
    )
    max_quarantined_share: Share = Field(
        0.05,
        description="share (0.05 is 5 %) of records that may be quarantined, of all and of those "
        "with pictures in any one folder of the root (of 100 records or more)",
    )
    held_out_share: Share = Field(
        0.0, description="share (0.1 is 10 %) of records kept from training, for the held-out loss"
    )
