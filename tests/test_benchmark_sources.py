"""The benchmarks from parquet, Arrow, JSON Lines and TSV: the same questions from each."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grace_core.config.evaluation import BenchmarkName
from grace_core.config.evaluation import PromptStyle as PromptStyleName
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import BENCHMARKS, find_benchmark
from grace_core.evaluation.items import Item, Picture
from grace_core.evaluation.loading.place import Wanted, locate
from grace_core.evaluation.loading.prepared import PicturePack
from grace_core.evaluation.loading.rows import load_items
from grace_core.evaluation.prompts import LETTER, SHORT, STYLES
from tests.benchmark_rows import (
    BLUE,
    GREEN,
    RED,
    ROWS,
    SCHEMAS,
    as_table,
    write_arrow,
    write_jsonl,
    write_parquet,
    write_tsv,
)

NAMES = {RED: "[red]", GREEN: "[green]", BLUE: "[blue]"}
FORMS: dict[str, Callable[[str, Path], Path]] = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "jsonl": write_jsonl,
    "tsv": write_tsv,
}


def load(name: str, path: Path, **options: Any) -> list[Item]:
    wanted = Wanted(path=path, **options.pop("wanted", {}))
    declared = find_benchmark(name)
    return load_items(declared, locate(declared, wanted), **options)


def asked(item: Item) -> str:
    """The content as one text, pictures by their colour."""
    return "".join(
        part if isinstance(part, str) else NAMES[part.encoded()] for part in item.question.content
    )


# By hand, from section 1.2 of the prompt formats' table: LLaVA's words.
PROMPTS = {
    "hallusionbench": ["[red]Is it red?", "Is it red?"],
    "mmbench": [
        f"[red]Look.\nWhich?\nA. None\nB. NA\nC. null\n{LETTER}",
        f"[red]Which?\nA. NA\nB. None\n{LETTER}",
    ],
    "scienceqa": [
        f"[green]Context: A fish swims.\nWhich?\nA. one\nB. None\n{LETTER}",
        f"Which?\nA. a\nB. b\nC. c\nD. d\nE. e\n{LETTER}",
    ],
    "ai2d": [f"[blue]Which?\nA. w\nB. x\nC. y\nD. z\n{LETTER}"],
    "mmmu": [
        f"See [green] and [red]. Which?\nA. [blue]\nB. None\nC. it's\n\n{LETTER}",
        f"How many? [red]\n\n{SHORT}",
    ],
    "seedbench": [
        f"[red]Which?\nA. AA\nB. BB\nC. CC\nD. DD\n{LETTER}",
        f"[blue]Which?\nA. AA\nB. BB\nC. CC\nD. DD\n{LETTER}",
    ],
    "vqav2": [f"[red]What is it?\n{SHORT}"],
    "textvqa": [f"[green]what brand?\n{SHORT}"],
    "vizwiz": [
        "[blue]Ok. What is it?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.\n{SHORT}"
    ],
    "pope": [f"[red]Is there a dog in the image?\n{SHORT}"] * 2,
    "mme": [f"[green]Is it {number}?\n{SHORT}" for number in (1, 2)],
    "mmstar": [
        "[red]Which?\nOptions: A: red, B: None, C: x, D: y\n" + LETTER.removesuffix("."),
    ]
    * 2,
}
GOLDS = {
    "hallusionbench": [("Yes",), ("No",)],
    "mmbench": [("B",), ("A",)],
    "scienceqa": [("B",), ("E",)],
    "ai2d": [("D",)],
    "mmmu": [("B",), ("1/2", "0.5")],
    "seedbench": [("C",), ("C",)],
    "vqav2": [(*("net",) * 7, "a Net.", "mesh", "mesh")],
    "textvqa": [(*("nokia",) * 9, "toshiba")],
    "vizwiz": [("unanswerable",) * 10],
    "pope": [("Yes",), ("No",)],
    "mme": [("Yes",), ("No",)],
    "mmstar": [("B",), ("B",)],
}
IDS = {
    "hallusionbench": ["VS_chart_0_1_0", "VS_chart_0_0_0"],
    "mmbench": ["7", "1000007"],
    "scienceqa": ["0", "1"],
    "ai2d": ["0"],
    "mmmu": ["validation_Music_1", "validation_Math_15"],
    # The row left out counts where ids repeat, as it does in the recorded sets.
    "seedbench": ["49914", "49914#3"],
    "vqav2": ["262148000"],
    "textvqa": ["34602"],
    "vizwiz": ["VizWiz_val_00000000.jpg"],
    "pope": ["random_1", "adversarial_1"],
    "mme": ["code_reasoning/0020.png", "code_reasoning/0020.png#2"],
    "mmstar": ["0", "1"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_every_form_gives_the_same_questions(name: str, form: str, tmp_path: Path) -> None:
    folder = FORMS[form](name, tmp_path / "data")
    items = load(name, folder)
    assert [asked(item) for item in items] == PROMPTS[name]
    assert [item.gold.answers for item in items] == GOLDS[name]
    assert [item.id for item in items] == IDS[name]
    for item in items:
        assert all(picture.open().size == (3, 2) for picture in item.question.pictures)
    if form != "arrow":
        (file,) = [each for each in folder.iterdir() if each.is_file()]
        assert [asked(item) for item in load(name, file)] == PROMPTS[name]


@pytest.mark.parametrize("name", ROWS)
def test_pictures_are_not_decoded_before_they_are_opened(name: str, tmp_path: Path) -> None:
    """Damaged ones are found when a model is to see them, and cost no other item its answer."""
    rows = json.loads(json.dumps(ROWS[name], default=lambda data: ""))

    def damaged(value: Any) -> Any:
        if isinstance(value, list):
            return [damaged(part) for part in value]
        if isinstance(value, dict) and "bytes" in value:
            return {"bytes": b"no picture", "path": None}
        return value

    rows = [{key: damaged(value) for key, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS[name]), tmp_path / "rows.parquet")
    items = load(name, tmp_path)
    with pytest.raises(Exception, match="none of the formats"):
        items[0].question.pictures[0].open()


def write_references(folder: Path, *shown: str) -> None:
    """MMBench's table with rows 7, 1000007, 9 and these picture cells."""
    rows = [{**ROWS["mmbench"][0], "index": index} for index in ("7", "1000007", "9")]
    lines = ["\t".join("l2-category" if key == "L2-category" else key for key in rows[0])]
    for row, image in zip(rows, shown, strict=True):
        lines.append("\t".join({**row, "image": image}.values()))
    (folder / "MMBench_DEV_EN.tsv").write_text("\n".join(lines) + "\n")


def test_a_row_may_show_the_picture_of_another_even_a_later_one(tmp_path: Path) -> None:
    """VLMEvalKit's tables write the picture once and its row's index elsewhere."""
    write_references(tmp_path, "9", "9", base64.b64encode(BLUE).decode())
    for limit in (1, 2, 3):
        items = load("mmbench", tmp_path, limit=limit)
        assert [item.question.pictures[0].encoded() for item in items] == [BLUE] * limit
    assert items[0].gold.fields["l2_category"] == "attribute_reasoning"


def test_a_reference_leads_to_a_picture_and_not_to_another_reference(tmp_path: Path) -> None:
    write_references(tmp_path, "9", "7", base64.b64encode(BLUE).decode())
    with pytest.raises(GraceError, match=r"MMBench_DEV_EN\.tsv:3: .*'7' is neither a file"):
        load("mmbench", tmp_path)


def changed(name: str, column: str, value: pa.DataType | None, new: str = "") -> pa.Table:
    """The table with a column left out, renamed, or of another type."""
    table = as_table(name)
    position = table.schema.get_field_index(column)
    if new:
        return table.rename_columns(
            [new if each == column else each for each in table.schema.names]
        )
    if value is None:
        return table.remove_column(position)
    return table.set_column(position, column, pa.nulls(table.num_rows, value).fill_null(0))


@pytest.mark.parametrize(
    ("name", "column", "kind", "says"),
    [
        ("mmbench", "A", None, "column 'A', which should hold text, is missing"),
        ("mmbench", "hint", None, "column 'hint', which should hold text, is missing"),
        ("scienceqa", "answer", pa.string(), "column 'answer' should hold a whole number, but"),
        ("scienceqa", "choices", pa.int64(), "column 'choices' should hold a list of texts, but"),
        ("ai2d", "question", pa.int64(), "should hold text, but holds a whole number (0)"),
        ("mmstar", "image", pa.float64(), "'image' should hold a picture, but holds a number"),
        ("mmmu", "image_3", None, "column 'image_3', which should hold a picture, is missing"),
    ],
)
def test_a_column_that_does_not_fit_is_named(
    name: str, column: str, kind: pa.DataType | None, says: str, tmp_path: Path
) -> None:
    table = changed(name, column, kind) if kind != pa.string() else changed_to_text(name, column)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(GraceError) as caught:
        load(name, tmp_path)
    assert says in str(caught.value)
    assert "set `repository`, `config` and `split`, or `path`" in str(caught.value)


def changed_to_text(name: str, column: str) -> pa.Table:
    table = as_table(name)
    texts = pa.array(["first"] * table.num_rows)
    return table.set_column(table.schema.get_field_index(column), column, texts)


def test_a_column_may_have_the_name_of_a_copy(tmp_path: Path) -> None:
    pq.write_table(changed("mmbench", "L2-category", None, "l2-category"), tmp_path / "a.parquet")
    assert load("mmbench", tmp_path)[0].gold.fields["l2_category"] == "attribute_reasoning"


def test_a_picture_that_the_text_names_must_be_there(tmp_path: Path) -> None:
    rows = [{**ROWS["mmmu"][0], "image_3": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS["mmmu"]), tmp_path / "a.parquet")
    with pytest.raises(GraceError, match="names <image 3>, but the row has no such picture"):
        load("mmmu", tmp_path)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("../secret.png", "leads out of the root"),
        ("/etc/hostname", "is absolute"),
        ("images/none.png", "does not exist"),
        ("data:image/png;base64,****", "in base64"),
        ([], "should hold a picture, but holds a list"),
        (3, "'3' is neither a file below"),
    ],
)
def test_a_picture_that_cannot_be_had_is_named(image: object, says: str, tmp_path: Path) -> None:
    row = {**ROWS["ai2d"][0], "image": image}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(GraceError, match=r"rows\.jsonl:1: ") as caught:
        load("ai2d", tmp_path)
    assert says in str(caught.value)


def test_pictures_may_lie_below_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = write_jsonl("ai2d", tmp_path / "data")
    rows = folder / "rows.jsonl"
    rows.rename(tmp_path / "rows.jsonl")
    with pytest.raises(GraceError, match="set `pictures` to its folder"):
        load("ai2d", tmp_path / "rows.jsonl")
    (item,) = load("ai2d", tmp_path / "rows.jsonl", wanted={"pictures": folder})
    assert asked(item) == PROMPTS["ai2d"][0]


def test_a_limit_stops_reading_and_packs_no_more(tmp_path: Path) -> None:
    folder = write_parquet("mmstar", tmp_path / "data")
    with PicturePack(tmp_path) as pack:
        (item,) = load("mmstar", folder, limit=1, store=pack)
    assert pack.count == 1
    assert item.question.pictures[0].encoded() == RED


def test_rows_that_are_left_out_need_no_pictures(tmp_path: Path) -> None:
    """Video rows of SEED-Bench hold many frames, or none where only the pictures were fetched."""
    with PicturePack(tmp_path) as pack:
        load("seedbench", write_parquet("seedbench", tmp_path / "data"), store=pack)
    assert pack.count == 2  # red and blue; green is a video's


def test_an_option_called_nan_in_the_middle_stays_text(tmp_path: Path) -> None:
    row = {**ROWS["mmbench"][0], **dict(zip("ABCD", ["nan", "NaN", "n/a", "1"], strict=True))}
    table = pa.Table.from_pylist([row], schema=SCHEMAS["mmbench"])
    pq.write_table(table, tmp_path / "rows.parquet")
    (item,) = load("mmbench", tmp_path)
    assert item.gold.choices == {"A": "nan", "B": "NaN", "C": "n/a", "D": "1"}


def test_real_questions_with_several_pictures(shared_data: Path, tmp_path: Path) -> None:
    """Items of MMMU as its authors publish them: pictures in question and options, in order."""
    root = shared_data / "mmmu_items"
    if not root.is_dir():
        pytest.skip(f"real items not found at {root}")
    lines = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    rows = [
        {
            "id": f"validation_Music_{number}",
            "question_type": "multiple-choice",
            **dict.fromkeys((f"image_{count}" for count in range(1, 8)), None),
            **line,
            "options": repr(line["options"]),
        }
        for number, line in enumerate(lines)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load("mmmu", tmp_path, wanted={"pictures": root})
    assert len(items) == len(lines) == 21
    for item, line in zip(items, lines, strict=True):
        pictures = item.question.pictures
        assert all(picture.open().mode == "RGB" for picture in pictures)
        text = line["question"] + "".join(line["options"])
        numbers = sorted(range(1, 8), key=lambda n, text=text: text.find(f"<image {n}>"))  # type: ignore[misc]
        expected = [
            (root / line[f"image_{number}"]).read_bytes()
            for number in numbers
            if f"<image {number}>" in text
        ]
        mentioned = [picture.encoded() for picture in pictures[len(pictures) - len(expected) :]]
        assert mentioned == expected
        assert "<image" not in "".join(p for p in item.question.content if isinstance(p, str))
    assert max(len(item.question.pictures) for item in items) == 5


def test_configurations_name_the_declared_benchmarks_and_styles() -> None:
    assert set(get_args(BenchmarkName)) == set(BENCHMARKS)
    assert set(get_args(PromptStyleName)) == set(STYLES)


def test_columns_that_score_are_enough_for_the_gold() -> None:
    """Recorded responses are scored from rows without questions and pictures."""
    for name, rows in ROWS.items():
        declared = find_benchmark(name)
        names = [column for column, each in declared.columns.items() if each.scores]
        picture = next((n for n, c in declared.columns.items() if c.type == "picture"), None)
        for row in rows:
            values = {column: row[column] for column in names if column != picture}
            if name == "mmmu":
                values["options"] = ["x", "y", "z"]
            assert declared.gold(values, "id").answers
    assert isinstance(Picture(RED).key, str)
