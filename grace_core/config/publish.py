"""Section `publish`: what a release is called and where it goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grace_core.config.section import PositiveInt, RepositoryName, Section


class DirectoryDestination(Section):
    kind: Literal["directory"] = "directory"
    path: str = Field(
        "releases", min_length=1, description="folder, relative to `run_dir` or absolute"
    )


class HubDestination(Section):
    """The Hugging Face Hub; the token is in HF_TOKEN or a Prefect Secret block, never here."""

    kind: Literal["hub"] = "hub"
    namespace: RepositoryName = Field(
        description="user or organisation that owns the repositories, of letters, digits, dots, "
        "underscores and hyphens"
    )
    private: bool = Field(
        True, description="false: made public once the whole release is there and verified"
    )
    endpoint: str = Field(
        "https://huggingface.co",
        pattern=r"^https?://\S+$",
        description="base address of the Hub's API",
    )
    tag: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="git tag of the release in every repository, such as v2026.11.0; it is never "
        "moved. null: named by the content",
    )
    token_secret: str | None = Field(
        None,
        description="name of the Prefect Secret block that holds the token, for deployments whose "
        "environment has no HF_TOKEN",
    )


class RelatedModel(Section):
    """A model of another run, for the model zoo in the cards."""

    repository: str = Field(min_length=1, description="`owner/name` on the Hub")
    backbone: str
    precision: Literal["bf16", "w8", "w4"]
    group_size: PositiveInt | None = Field(
        None, description="weights that share one scale, of a quantized model"
    )
    description: str = ""


class Publish(Section):
    """What a release is called and where it goes."""

    enabled: bool = True
    approval: bool = Field(
        False,
        description="a person must approve: the pipeline then ends with its results and starts the "
        "deployment grace-publish/publish, which asks and publishes",
    )
    name: RepositoryName = Field(
        description="base name of the repositories without their owner, of letters, digits, dots, "
        "underscores and hyphens; `-BF16`, `-W8G128` and `-W4G128` are appended"
    )
    licence: str = Field(
        "apache-2.0",
        description="licence identifier of the Hub for the weights; the card adds what the data's "
        "licence means",
    )
    base_model: str = Field(description="Hub id of the student's base model, for the model card")
    teacher_model: str = Field(description="Hub id of the teacher, for the model card's text")
    dataset: str = Field(description="Hub id or name of the training data, for the model card")
    dataset_licence: str | None = Field(
        None,
        description="licence identifier of the training data; the card says what one that forbids "
        "commercial use means. null: known for ShareGPT4V, else not stated",
    )
    related: tuple[RelatedModel, ...] = Field(
        (), description="models of other runs that the card's model zoo lists beside these"
    )
    results_files: bool = Field(
        True,
        description="besides the card's metadata, write the scores of benchmarks that have a data "
        "set on the Hub as `.eval_results/*.yaml`",
    )
    destination: Annotated[DirectoryDestination | HubDestination, Field(discriminator="kind")] = (
        DirectoryDestination()
    )
