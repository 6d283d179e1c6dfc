"""What is wrong with a configuration, in words that say how to mend it.

Pydantic finds wrong values; this module puts its findings into words, and asks the rules about
whatever part of the tree is valid, so that everything is listed at once.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from grace_core.config.rules import Unknown, broken_rules
from grace_core.config.tree import RULES_BROKEN, GraceConfig

Key = tuple[str | int, ...]


def problems_of(tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Every problem of `tree`, whose validation raised `error`: wrong values, then broken rules."""
    details = [detail for detail in error.errors() if not _is_consequence(detail)]
    wrong = {_locate(detail["loc"]).key for detail in details}
    # Stands in for a configuration: it has the attributes that are valid, the rules ask no more.
    valid = typing.cast(GraceConfig, _valid_part(GraceConfig, tree, (), wrong))
    return [_in_words(detail) for detail in details] + broken_rules(valid)


def _is_consequence(detail: Any) -> bool:
    """Whether an error repeats others: broken rules, and lists too short for their wrong items."""
    if detail["type"] == "too_short":
        return bool(detail["ctx"]["actual_length"] < len(detail["input"]))
    return bool(detail["type"] == RULES_BROKEN)


class _Place(typing.NamedTuple):
    """Where an error is."""

    key: Key
    """Path in the file; pydantic's own also names the chosen member of a union."""
    models: list[type[BaseModel]]
    """What the last element is a key of."""
    field: FieldInfo | None


class _ValidPart:
    """A section's valid values; asking for another one raises `Unknown`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> NoReturn:
        raise Unknown(name)


def _valid_part(
    model: type[BaseModel], tree: Mapping[str, Any], key: Key, wrong: set[Key]
) -> _ValidPart:
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        here = (*key, name)
        if name not in tree:
            if not field.is_required():
                values[name] = field.get_default(call_default_factory=True)
            continue
        below = any(found[: len(here)] == here for found in wrong)
        sections = _sections_in(field.annotation)
        if not below:
            values[name] = _adapter(field).validate_python(tree[name])
        elif sections and here not in wrong and isinstance(tree[name], Mapping):
            section = next((s for s in sections if _tag(s) == tree[name].get("kind")), sections[0])
            values[name] = _valid_part(section, tree[name], here, wrong)
    return _ValidPart(values)


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    form: Any = typing.Annotated[field.annotation, field]
    return TypeAdapter(form)


def _in_words(detail: Any) -> str:
    place = _locate(detail["loc"])
    about = (*place.key, "kind") if detail["type"].startswith("union_tag") else place.key
    key = ".".join(map(str, about)) or "(whole file)"
    explain = _EXPLANATIONS.get(detail["type"], _wrong_value)
    return f"{key}: {explain(detail, place)}"


def _unknown_key(detail: Any, place: _Place) -> str:
    name, known = str(place.key[-1]), _keys_of(place.models)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    elsewhere = _keys_named(name, place.key[:-1])
    if elsewhere:
        return f"unknown key here; it belongs to {' or '.join(elsewhere)}"
    return f"unknown key; known here: {', '.join(known)}"


def _missing(detail: Any, place: _Place) -> str:
    return f"required, but missing; add it{_meaning(place)}"


def _wrong_member(detail: Any, place: _Place) -> str:
    assert place.field is not None
    tags = [str(_tag(section)) for section in _sections_in(place.field.annotation)]
    given = detail["ctx"].get("tag")
    if given is None:
        return f"required, but missing; add kind: {' or '.join(tags)}"
    return f"{given!r} is not known; use {_choice(given, tags)}"


def _wrong_choice(detail: Any, place: _Place) -> str:
    assert place.field is not None
    choices = [str(choice) for choice in _choices_in(place.field.annotation)]
    return f"{detail['input']!r} is not known; use {_choice(detail['input'], choices)}" + (
        _meaning(place) if not isinstance(detail["input"], str) else ""
    )


def _no_section(detail: Any, place: _Place) -> str:
    sections = _sections_in(place.field.annotation) if place.field else [GraceConfig]
    return f"expected keys below it: {', '.join(_keys_of(sections))}{_given(detail)}"


def _wrong_characters(detail: Any, place: _Place) -> str:
    return f"{detail['input']!r} is not a name of the right form{_meaning(place)}"


def _wrong_value(detail: Any, place: _Place) -> str:
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"{message}{_given(detail)}{_meaning(place)}"


_EXPLANATIONS: dict[str, Callable[[Any, _Place], str]] = {
    "extra_forbidden": _unknown_key,
    "missing": _missing,
    "union_tag_not_found": _wrong_member,
    "union_tag_invalid": _wrong_member,
    "literal_error": _wrong_choice,
    "string_pattern_mismatch": _wrong_characters,
    "model_type": _no_section,
    "model_attributes_type": _no_section,
    "dict_type": _no_section,
}


def _given(detail: Any) -> str:
    given = detail.get("input")
    return f" (given: {given!r})" if isinstance(given, str | int | float | bool | list) else ""


def _meaning(place: _Place) -> str:
    if place.field is None or not place.field.description:
        return ""
    return f"; meaning: {place.field.description}"


def _choice(given: object, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(given), choices, n=1)
    return f"one of {', '.join(choices)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _locate(location: Sequence[str | int]) -> _Place:
    key: list[str | int] = []
    models: list[type[BaseModel]] = [GraceConfig]
    beside, field = models, None
    for part in location:
        chosen = [model for model in models if len(models) > 1 and _tag(model) == part]
        if chosen:
            models = chosen
            continue
        key.append(part)
        if isinstance(part, int):
            continue
        beside = models
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        field = fields[0] if fields else None
        models = [section for found in fields for section in _sections_in(found.annotation)]
    return _Place(tuple(key), beside, field)


def _tag(section: type[BaseModel]) -> object:
    """The `kind` that chooses this member of a union; None for a section outside unions."""
    kind = section.model_fields.get("kind")
    return None if kind is None else kind.default


def _keys_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})


def _keys_named(name: str, parent: Key) -> list[str]:
    """Full keys whose last element is `name`: those below `parent`, or else wherever they are."""
    everywhere = [key for key in _all_keys(GraceConfig, ()) if key[-1] == name]
    below = [key for key in everywhere if key[: len(parent)] == parent]
    return [".".join(key) for key in (below or everywhere)][:3]


def _all_keys(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for section in _sections_in(field.annotation):
            yield from _all_keys(section, (*prefix, name))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in _parts(annotation) for section in _sections_in(part)]


def _choices_in(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in _parts(annotation) for choice in _choices_in(part)]


def _parts(annotation: Any) -> Sequence[Any]:
    """What a union or a collection is made of."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return typing.get_args(annotation)
    return ()
