"""What all sections of the configuration are made of.

Every section is frozen and refuses unknown keys, so a typing error fails instead of leaving a
default in place.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is meant, not true or false (in YAML also yes, no, on, off)")
    return value


Int = Annotated[int, BeforeValidator(_no_switch)]
Float = Annotated[float, BeforeValidator(_no_switch)]
PositiveInt = Annotated[Int, Field(gt=0)]
Share = Annotated[Float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Float, Field(gt=0.0, le=1.0)]
RepositoryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
