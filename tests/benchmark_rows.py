"""Made-up rows in the exact schema of the real data sets, and the files that hold such rows."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str, size: tuple[int, int] = (3, 2)) -> bytes:
    """An encoded picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


RED, GREEN, BLUE = png("red"), png("green"), png("blue")


def cell(data: bytes) -> dict[str, Any]:
    """A picture as `datasets.Image` stores it."""
    return {"bytes": data, "path": "x.png"}


def text_schema(*names: str, **others: pa.DataType) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names] + list(others.items()))


SCHEMAS = {
    "hallusionbench": text_schema(
        *("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note"),
        *("question_id", "question", "gt_answer_details", "gt_answer", "filename"),
        image=PICTURE,
    ),
    "mmbench": text_schema(
        *("index", "question", "hint", "answer", "A", "B", "C", "D", "category", "source"),
        *("L2-category", "comment", "split"),
        image=PICTURE,
    ),
    "scienceqa": text_schema(
        *("question", "hint", "task", "grade", "subject", "topic", "category", "skill"),
        *("lecture", "solution"),
        image=PICTURE,
        choices=pa.list_(pa.string()),
        answer=pa.int8(),
    ),
    "ai2d": text_schema("question", "answer", options=pa.list_(pa.string()), image=PICTURE),
    "mmmu": text_schema(
        *("id", "question", "options", "explanation", "img_type", "answer"),
        *("topic_difficulty", "question_type", "subfield"),
        **{f"image_{number}": PICTURE for number in range(1, 8)},
    ),
    "seedbench": text_schema(
        *("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type"),
        *("question", "question_id"),
        question_type_id=pa.int64(),
        image=pa.list_(PICTURE),
        segment=pa.list_(pa.int64()),
    ),
    "vqav2": text_schema(
        *("question_type", "multiple_choice_answer", "answer_type", "question"),
        answers=pa.list_(
            pa.struct(
                [
                    ("answer", pa.string()),
                    ("answer_confidence", pa.string()),
                    ("answer_id", pa.int64()),
                ]
            )
        ),
        image_id=pa.int64(),
        question_id=pa.int64(),
        image=PICTURE,
    ),
    "textvqa": text_schema(
        *("image_id", "question", "set_name"),
        question_id=pa.int32(),
        answers=pa.list_(pa.string()),
        image=PICTURE,
    ),
    "vizwiz": text_schema(
        *("question_id", "question", "category"), answers=pa.list_(pa.string()), image=PICTURE
    ),
    "pope": text_schema(
        *("id", "question_id", "question", "answer", "image_source", "category"), image=PICTURE
    ),
    "mme": text_schema("question_id", "question", "answer", "category", image=PICTURE),
    "mmstar": text_schema(
        *("question", "answer", "category", "l2_category"),
        index=pa.int64(),
        image=PICTURE,
        meta_info=pa.struct(
            [("source", pa.string()), ("split", pa.string()), ("image_path", pa.string())]
        ),
    ),
}


def _mmbench(index: int, answer: str, options: list[str | None], image: bytes) -> dict[str, Any]:
    return {
        "index": str(index),
        "question": "Which?",
        "hint": "Look." if index == 7 else "nan",
        "answer": answer,
        **dict(zip("ABCD", options, strict=True)),
        "category": "identity_reasoning",
        "source": "made up",
        "L2-category": "attribute_reasoning",
        "comment": "nan",
        "split": "dev",
        "image": cell(image),
    }


def _hallusion(number: int, figure: str, gold: str, image: bytes | None) -> dict[str, Any]:
    return {
        "category": "VS",
        "subcategory": "chart",
        "visual_input": "1" if image else "0",
        "set_id": "0",
        "figure_id": figure,
        "sample_note": "made up",
        "question_id": str(number),
        "question": "Is it red?",
        "gt_answer_details": "It is not.",
        "gt_answer": gold,
        "filename": "./VS/chart/0_1.png" if image else None,
        "image": cell(image) if image else None,
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "hallusionbench": [_hallusion(0, "1", "1", RED), _hallusion(0, "0", "0", None)],
    "mmbench": [
        _mmbench(7, "B", ["None", "NA", "null", "nan"], RED),
        _mmbench(1_000_007, "A", ["NA", "None", "nan", "nan"], RED),
    ],
    "scienceqa": [
        {
            "image": None if image is None else cell(image),
            "question": "Which?",
            "choices": choices,
            "answer": answer,
            "hint": hint,
            **dict.fromkeys(("task", "grade", "subject", "topic", "category", "skill"), "x"),
            "lecture": "long",
            "solution": "because",
        }
        for image, choices, answer, hint in (
            (GREEN, ["one", "None"], 1, "A fish swims."),
            (None, ["a", "b", "c", "d", "e"], 4, ""),
        )
    ],
    "ai2d": [
        {"question": "Which?", "options": ["w", "x", "y", "z"], "answer": "3", "image": cell(BLUE)}
    ],
    "mmmu": [
        {
            "id": name,
            "question": question,
            "options": options,
            "explanation": "",
            **dict.fromkeys((f"image_{number}" for number in range(1, 8)), None),
            **{f"image_{number}": cell(image) for number, image in pictures.items()},
            "img_type": "['Tables']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": "x",
        }
        for name, question, options, pictures, answer, kind in (
            (
                "validation_Music_1",
                "See <image 2> and <image 1>. Which?",
                "['<image 3>', 'None', \"it's\"]",
                {1: RED, 2: GREEN, 3: BLUE},
                "B",
                "multiple-choice",
            ),
            ("validation_Math_15", "How many? <image 1>", "[]", {1: RED}, "['1/2', '0.5']", "open"),
        )
    ],
    "seedbench": [
        {
            "answer": "C",
            **{f"choice_{letter}": letter.upper() * 2 for letter in "abcd"},
            "data_id": "1_2",
            "data_type": kind,
            "question": "Which?",
            "question_id": "49914",
            "question_type_id": number,
            "image": [cell(image) for image in images],
            "segment": None,
        }
        for kind, number, images in (
            ("image", 1, [RED]),
            ("video", 10, [GREEN, GREEN]),
            ("image", 5, [BLUE]),
        )
    ],
    "vqav2": [
        {
            "question_type": "what",
            "multiple_choice_answer": "net",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number}
                for number, text in enumerate(["net"] * 7 + ["a Net.", "mesh", "mesh"], start=1)
            ],
            "image_id": 5,
            "answer_type": "other",
            "question_id": 262148000,
            "question": "What is it?",
            "image": cell(RED),
        }
    ],
    "textvqa": [
        {
            "image_id": "003a",
            "question_id": 34602,
            "question": "what brand?",
            "answers": ["nokia"] * 9 + ["toshiba"],
            "set_name": "val",
            "image": cell(GREEN),
        }
    ],
    "vizwiz": [
        {
            "question_id": "VizWiz_val_00000000.jpg",
            "question": "Ok. What is it?",
            "answers": ["unanswerable"] * 10,
            "category": "unanswerable",
            "image": cell(BLUE),
        }
    ],
    "pope": [
        {
            "id": str(number),
            "question_id": "1",
            "question": "Is there a dog in the image?",
            "answer": answer,
            "image_source": "COCO_val2014_000000310196",
            "category": category,
            "image": cell(RED),
        }
        for number, (answer, category) in enumerate([("yes", "random"), ("no", "adversarial")])
    ],
    "mme": [
        {
            "question_id": "code_reasoning/0020.png",
            "question": f"Is it {number}? Please answer yes or no.",
            "answer": answer,
            "category": "code_reasoning",
            "image": cell(GREEN),
        }
        for number, answer in ((1, "Yes"), (2, "No"))
    ],
    "mmstar": [
        {
            "index": index,
            "question": "Which?\nOptions: A: red, B: None, C: x, D: y",
            "image": cell(RED),
            "answer": "B",
            "category": "math",
            "l2_category": "geometry",
            "meta_info": {"source": "x", "split": "y", "image_path": "z"},
        }
        for index in (0, 1)
    ],
}


def as_table(name: str) -> pa.Table:
    return pa.Table.from_pylist(ROWS[name], schema=SCHEMAS[name])


def write_parquet(name: str, folder: Path) -> Path:
    """One file, as in a clone of the repository without its card."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(as_table(name), folder / "rows.parquet", row_group_size=1)
    return folder


def write_arrow(name: str, folder: Path) -> Path:
    """What `datasets.Dataset.save_to_disk` leaves."""
    datasets.Dataset(as_table(name)).save_to_disk(str(folder))
    return folder


def write_jsonl(name: str, folder: Path) -> Path:
    """JSON Lines, pictures as files below `images`."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, row in enumerate(ROWS[name]):
        lines.append(json.dumps(_with_files(row, folder, str(number))))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_tsv(name: str, folder: Path) -> Path:
    """A table of text, pictures in base64, missing values as empty cells."""
    folder.mkdir()
    with (folder / "rows.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, SCHEMAS[name].names, delimiter="\t")
        writer.writeheader()
        for row in ROWS[name]:
            writer.writerow({key: _as_text(value) for key, value in row.items()})
    return folder


def _as_text(value: Any) -> Any:
    if isinstance(value, dict) and "bytes" in value:
        return base64.b64encode(value["bytes"]).decode()
    if isinstance(value, list):
        return repr([_as_text(part) for part in value])
    return "" if value is None else value


def _with_files(row: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    def moved(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [moved(part, f"{key}-{number}") for number, part in enumerate(value)]
        if isinstance(value, dict) and "bytes" in value:
            (folder / "images" / f"{name}-{key}.png").write_bytes(value["bytes"])
            return f"images/{name}-{key}.png"
        return value

    return {key: moved(value, key) for key, value in row.items()}
