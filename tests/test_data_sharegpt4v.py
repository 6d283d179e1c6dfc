"""Annotation files: what is read, and which records are refused for which reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_core.data import sharegpt4v
from grace_core.data.sharegpt4v import (
    RawRecord,
    Reason,
    Record,
    Turn,
    UnusableRecord,
    parse_record,
    read_records,
)
from grace_core.errors import GraceError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _good() -> dict[str, Any]:
    return {
        "id": "a",
        "image": ["1.png", "2.png"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>?"},
            {"from": "gpt", "value": "Alike."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "Look."},
        ],
    }


def _parse(value: Any) -> Record:
    return parse_record(RawRecord(3, "f.json", value))


def _reason(value: Any) -> Reason:
    with pytest.raises(UnusableRecord) as caught:
        _parse(value)
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_how_far_the_reading_is(tmp_path: Path, suffix: str) -> None:
    """Two files of several megabytes: it grows, and ends with all bytes of both."""
    records = [_good() | {"id": "x" * 1000} for _ in range(3000)]
    lines = "\n".join(json.dumps(record) for record in records)
    text = json.dumps(records) if suffix == "json" else lines
    files = [tmp_path / f"{number}.{suffix}" for number in (1, 2)]
    for file in files:
        file.write_text(text)
    positions = [raw.bytes_read for raw in read_records(files)]
    assert positions == sorted(positions)
    assert 0 < positions[0] < positions[2999] <= len(text) < positions[-1] == 2 * len(text)


def test_a_record_is_parsed_whole() -> None:
    assert _parse(_good()) == Record(
        "a",
        ("1.png", "2.png"),
        (
            Turn("user", "<image> and <image>?"),
            Turn("assistant", "Alike."),
            Turn("user", "Why?"),
            Turn("assistant", "Look."),
        ),
    )


def test_the_messages_schema_means_the_same() -> None:
    good = _good()
    renamed = {
        "id": "a",
        "images": good["image"],
        "messages": [
            {
                "role": {"human": "user", "gpt": "assistant"}[turn["from"]],
                "content": turn["value"],
            }
            for turn in good["conversations"]
        ],
    }
    assert _parse(renamed) == _parse(good)


@pytest.mark.parametrize(
    ("given_id", "record_id"),
    [("x", "x"), (90210, "90210"), (None, "#3"), (True, "#3"), ([1], "#3"), ("\ud83d", "#3")],
)
def test_what_cannot_serve_as_an_id_counts_as_absent(given_id: Any, record_id: str) -> None:
    assert _parse({**_good(), "id": given_id}).record_id == record_id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": ["1.png", "2.png"]}, Reason.BAD_IMAGE_FIELD),
        ({"messages": []}, Reason.BAD_CONVERSATION),
        ({"conversations": [["human", "x"]]}, Reason.BAD_CONVERSATION),
        ({"image": ["1.png", None]}, Reason.BAD_IMAGE_FIELD),
        ({"image": {"path": "1.png"}}, Reason.BAD_IMAGE_FIELD),
        ({"image": "data:image/png;base64,AAAA"}, Reason.BAD_IMAGE_FIELD),
        ({"image": "file:/etc/passwd"}, Reason.BAD_IMAGE_FIELD),
        ({"image": "a\0.png"}, Reason.BAD_IMAGE_FIELD),
        ({"image": "a\ud800.png"}, Reason.BAD_IMAGE_FIELD),
    ],
)
def test_reasons_that_the_prepared_set_lacks(change: dict[str, Any], reason: Reason) -> None:
    assert _reason({**_good(), **change}) == reason


def test_a_tag_in_an_answer_is_refused_even_when_the_count_fits() -> None:
    value = {
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "<image>"},
        ],
    }
    assert _reason(value) == Reason.IMAGE_COUNT


@st.composite
def mutated_records(draw: st.DrawFn) -> Any:
    """A good record in which some values, at any depth, are replaced or removed."""
    value: Any = copy.deepcopy(_good())
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and draw(st.booleans()):
                holder = holder[key]
                continue
            if draw(st.booleans()):
                del holder[key]
            else:
                holder[key] = draw(JSON_VALUES)
            break
    return value


@given(mutated_records() | JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_any_element_is_either_a_sound_record_or_has_a_reason(value: Any) -> None:
    try:
        record = _parse(value)
    except UnusableRecord as error:
        assert error.detail
        return
    roles = [turn.role for turn in record.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    assert all(turn.text.strip() for turn in record.turns)
    assert sum(turn.text.count("<image>") for turn in record.turns) == len(record.images)


# --- files


def _read(file: Path) -> list[Any]:
    return [raw.value for raw in read_records([file])]


@given(
    st.lists(JSON_VALUES, max_size=6),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_the_streaming_reader_equals_json_load(
    tmp_path_factory: pytest.TempPathFactory,
    elements: list[Any],
    indent: int | str | None,
    ascii_only: bool,
    chunk: int,
) -> None:
    text = json.dumps(elements, indent=indent, ensure_ascii=ascii_only) + "\n"
    file = tmp_path_factory.getbasetemp() / "elements.json"
    file.write_bytes(text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        # A window of a few characters makes every element straddle its end somewhere.
        patch.setattr(sharegpt4v, "_CHUNK_CHARACTERS", chunk)
        assert _read(file) == elements


def test_elements_larger_than_the_window_and_cut_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = ["\U0001f642" * 50, -12.5e-30, True, {"a": [None] * 40}, "\ud83d", 123456789]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(elements))
    for chunk in range(1, 30):
        monkeypatch.setattr(sharegpt4v, "_CHUNK_CHARACTERS", chunk)
        assert _read(file) == elements


def test_no_more_than_a_window_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" + ",".join(['{"a": 1}'] * 1000) + ', {"a": }]')
    monkeypatch.setattr(sharegpt4v, "_CHUNK_CHARACTERS", 64)
    reader = read_records([file])
    # The damage at the end of the file does not keep what stands before it from being read.
    assert [next(reader).value for _ in range(1000)] == [{"a": 1}] * 1000
    with pytest.raises(GraceError, match="record 1000"):
        next(reader)


def test_json_lines_by_suffix_and_by_content(tmp_path: Path) -> None:
    text = '{"id": 1}\n\n  {"id": 2}\r\n{"id": 3}'
    for name in ("a.jsonl", "a.json"):
        file = tmp_path / name
        file.write_text(text)
        assert _read(file) == [{"id": 1}, {"id": 2}, {"id": 3}]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    for name, text in (("a.json", '[{"id": 1}]'), ("b.json", '{"id": 1}'), ("c.jsonl", '{"id":1}')):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert _read(file) == [{"id": 1}]


def test_the_index_runs_over_all_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.jsonl"
    one.write_text("[1, 2]")
    two.write_text("3\n4\n")
    found = [(raw.index, raw.source_file, raw.value) for raw in read_records([one, two])]
    assert found == [
        (0, "one.json", 1),
        (1, "one.json", 2),
        (2, "two.jsonl", 3),
        (3, "two.jsonl", 4),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "empty"),
        ("a.json", "  \n", "empty"),
        ("a.json", "<html>", "begins with '<'"),
        ("a.json", '[{"id": 1}', r"character 10, in or after record 1 \(expected ',' or '\]'\)"),
        ("a.json", '[{"id": 1}, {"id": "ab', "character 19, in or after record 1"),
        ("a.json", "[1, 2,]", "character 6, in or after record 2"),
        ("a.json", "[1 2]", "character 3, in or after record 1"),
        ("a.json", "[1] [2]", "character 4, in or after record 1 .text after the end"),
        ("a.json", '[{"id": 1}]{"id": 2}', "text after the end of the array"),
        ("a.json", "[" + "[" * 100_000, "record 0"),
        ("a.json", "[" + "9" * 5000 + "]", "record 0"),
        ("a.json", '{\n "data": []\n}', "line 1 is not valid JSON"),
        ("a.jsonl", '{"id": 1}\n{"id": 2} {"id": 3}\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"id": 1}\n{"id": ', "line 2 is not valid JSON"),
    ],
)
def test_damaged_files_are_refused_with_their_position(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(GraceError, match=message) as caught:
        _read(file)
    assert str(file) in str(caught.value)


def test_missing_and_wrongly_encoded_files(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="check the path"):
        _read(tmp_path / "none.json")
    file = tmp_path / "latin.json"
    file.write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(GraceError, match="not UTF-8"):
        _read(file)


def test_real_files_stream_to_what_json_load_gives(shared_data: Path) -> None:
    for name in (
        "sharegpt4v_bad/records.json",
        "tuxpaint_sharegpt4v/tuxpaint_sharegpt4v.json",
        "qwen_demo/single_images.json",
        "llamafactory_demo/mllm_demo.json",
    ):
        file = shared_data / name
        assert _read(file) == json.loads(file.read_text(encoding="utf-8"))
