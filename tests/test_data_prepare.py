"""Whole preparations: every record accounted for, rows that decode back, equal bytes."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from grace_core.artifacts import digest_folder
from grace_core.data import prepare as prepare_module
from grace_core.data.pictures import open_picture
from grace_core.data.prepare import FEATURES, PreparationReport, prepare
from grace_core.data.sharegpt4v import RawRecord, read_records
from grace_core.errors import GraceError
from grace_core.toy.tokenizer import IMAGE_PAD, shared_tokenizer

PROCESSOR = Qwen2VLImageProcessorPil(
    patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128
)


def run_the_processor(picture: Image.Image) -> tuple[tuple[int, int, int], int]:
    """Grid and tokens as the image processor itself makes them."""
    grid = PROCESSOR(images=[picture], return_tensors="np")["image_grid_thw"][0].tolist()
    return tuple(grid), grid[0] * grid[1] * grid[2] // PROCESSOR.merge_size**2


def run(records: Iterable[RawRecord], root: Path, out: Path, **changes: Any) -> PreparationReport:
    out.mkdir(parents=True)
    settings: dict[str, Any] = {
        "tokenizer": shared_tokenizer(),
        "image_token_id": shared_tokenizer().convert_tokens_to_ids(IMAGE_PAD),
        "picture_tokens": run_the_processor,
        "max_tokens": 2048,
        "max_decoded_pixels": 1_000_000,
        "max_quarantined_share": 1.0,
        "held_out_share": 0.0,
        "seed": 1,
    }
    return prepare(records, root=root, out=out, **(settings | changes))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return load_from_disk(str(folder)).to_list()


def quarantine_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def picture_record(index: int, *pictures: str) -> RawRecord:
    question = f"{'<image>' * len(pictures)}Question {index}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Answer."}]
    value = {"id": f"r{index}", "image": list(pictures), "conversations": turns}
    return RawRecord(index, "records.json", value)


def text_records(count: int) -> list[RawRecord]:
    return [
        RawRecord(
            index,
            "made.json",
            {
                "id": f"r{index}",
                "conversations": [
                    {"from": "human", "value": f"What is {index}?"},
                    {"from": "gpt", "value": f"It is {index}."},
                ],
            },
        )
        for index in range(count)
    ]


# --- the hand-made set with defects


@pytest.fixture(scope="module")
def bad(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreparationReport]:
    folder = shared_data / "sharegpt4v_bad"
    out = tmp_path_factory.mktemp("bad") / "out"
    opened: list[Path] = []
    read_bytes = Path.read_bytes

    def remember(path: Path) -> bytes:
        opened.append(path)
        return read_bytes(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", remember)
        records = read_records([folder / "records.json"])
        report = run(records, folder / "images", out, held_out_share=0.2)
    root = (folder / "images").resolve()
    pictures = [path for path in opened if path.suffix in (".jpg", ".png", ".webp")]
    assert len(pictures) > 30
    assert all(path.is_relative_to(root) for path in pictures), "outside_root.png was opened"
    return out, report


def test_all_records_are_accounted_for(bad: tuple[Path, PreparationReport]) -> None:
    out, report = bad
    train, held_out = rows_of(out / "train"), rows_of(out / "held_out")
    quarantined = quarantine_of(out)
    assert (report.records, report.used, report.quarantined) == (73, 33, 40)
    assert report.held_out == len(held_out) > 0
    assert report.used == len(train) + len(held_out)
    indexes = [row["record_index"] for row in train + held_out]
    assert sorted(indexes + [entry["index"] for entry in quarantined]) == list(range(73))
    assert report.reasons == Counter(entry["reason_class"] for entry in quarantined)
    assert report.tokens == sum(len(row["input_ids"]) for row in train + held_out)
    assert report.supervised_tokens == sum(sum(row["labels_mask"]) for row in train + held_out)


def test_decisions_are_those_expected(
    bad: tuple[Path, PreparationReport], shared_data: Path
) -> None:
    """The recommended policies are followed too, and the reasons bear the same names."""
    out, _ = bad
    expected = json.loads((shared_data / "sharegpt4v_bad" / "expected.json").read_text())
    given = json.loads((shared_data / "sharegpt4v_bad" / "records.json").read_text())
    reasons = {entry["index"]: entry for entry in quarantine_of(out)}
    for entry in expected["records_expected"]:
        found = reasons.get(entry["index"], {"reason_class": "ok", "id": entry["id"]})
        assert found["reason_class"] == entry["reason_class"], entry
        assert found["id"] == entry["id"]
        if entry["index"] in reasons:
            assert found["source"] == "records.json" and found["detail"]
    rows = {row["record_index"]: row for row in rows_of(out / "train") + rows_of(out / "held_out")}
    for index, row in rows.items():
        shown = given[index].get("id", f"#{index}")
        assert row["record_id"] == str(shown)


def test_rows_decode_back(bad: tuple[Path, PreparationReport], shared_data: Path) -> None:
    """Texts from tokens, pictures byte for byte, grids by the processor: against the source."""
    out, _ = bad
    folder = shared_data / "sharegpt4v_bad"
    given = json.loads((folder / "records.json").read_text())
    tokenizer = shared_tokenizer()
    dataset = load_from_disk(str(out / "train"))
    assert dataset.features == FEATURES
    for row in dataset:
        source = given[row["record_index"]]
        paths = source.get("image") or []
        paths = [paths] if isinstance(paths, str) else paths
        assert row["images"] == [(folder / "images" / path).read_bytes() for path in paths]
        counts = []
        for content, grid in zip(row["images"], row["image_grids"], strict=True):
            assert tuple(grid) == run_the_processor(open_picture(content, 1_000_000))[0]
            counts.append(grid[1] * grid[2] // 4)

        text = tokenizer.decode(row["input_ids"])
        for count in counts:
            assert f"<|vision_start|>{IMAGE_PAD * count}<|vision_end|>" in text
        assert text.count(IMAGE_PAD) == sum(counts)
        assert (len(row["input_ids"]), sum(row["labels_mask"])) == (
            row["num_tokens"],
            row["num_supervised"],
        )
        supervised = [
            t for t, flag in zip(row["input_ids"], row["labels_mask"], strict=True) if flag
        ]
        answers = [turn["value"] for turn in source["conversations"] if turn["from"] == "gpt"]
        assert tokenizer.decode(supervised) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_equal_input_gives_equal_bytes(
    bad: tuple[Path, PreparationReport], shared_data: Path, tmp_path: Path
) -> None:
    """Prepared again, elsewhere and from a copy elsewhere: the same digest."""
    out, report = bad
    copied = tmp_path / "another place"
    shutil.copytree(shared_data / "sharegpt4v_bad", copied)
    again = run(
        read_records([copied / "records.json"]),
        copied / "images",
        tmp_path / "deeper" / "out",
        held_out_share=0.2,
    )
    assert again == report
    assert digest_folder(tmp_path / "deeper" / "out") == digest_folder(out)
    assert digest_folder(out / "train") != digest_folder(out / "held_out")


# --- records made here


def test_held_out_records_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    records = text_records(300)

    def held_out(name: str, some: list[RawRecord], **changes: Any) -> set[int]:
        report = run(some, tmp_path, tmp_path / name, **({"held_out_share": 0.2} | changes))
        rows = rows_of(tmp_path / name / "held_out")
        assert report.held_out == len(rows)
        return {row["record_index"] for row in rows}

    whole = held_out("whole", records)
    assert 35 <= len(whole) <= 85, "binomial(300, 0.2): four standard deviations"
    assert held_out("backwards", records[::-1]) == whole
    assert held_out("half", records[:150]) == {index for index in whole if index < 150}
    assert held_out("more", records, held_out_share=0.4) > whole
    assert held_out("seed", records, seed=2) != whole
    assert held_out("none", records, held_out_share=0.0) == set()


def test_records_of_one_picture_stay_on_one_side(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    records = [picture_record(index, f"{index % 12}.png") for index in range(36)]
    run(records, tmp_path, tmp_path / "out", held_out_share=0.4)
    sides = [
        {row["images"][0] for row in rows_of(tmp_path / "out" / side)}
        for side in ("train", "held_out")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_nothing_held_out_is_still_a_data_set(tmp_path: Path) -> None:
    run(text_records(3), tmp_path, tmp_path / "out")
    empty = load_from_disk(str(tmp_path / "out" / "held_out"))
    assert len(empty) == 0 and empty.features == FEATURES


def test_batches_and_shards_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    run(text_records(25), tmp_path, whole)
    monkeypatch.setattr(prepare_module, "_ROWS_PER_BATCH", 4)
    monkeypatch.setattr(prepare_module, "_BYTES_PER_SHARD", 800)
    parts = tmp_path / "parts"
    run(text_records(25), tmp_path, parts)
    shards = sorted(file.name for file in (parts / "train").glob("*.arrow"))
    assert len(shards) > 2
    assert shards[0] == f"data-00000-of-{len(shards):05d}.arrow"
    assert not list(parts.rglob("*.partial"))
    assert rows_of(parts / "train") == rows_of(whole / "train")
    assert [row["record_index"] for row in rows_of(parts / "train")] == list(range(25))


def test_a_record_too_long_is_not_cut(tmp_path: Path) -> None:
    records = text_records(2)
    run(records, tmp_path, tmp_path / "a")
    lengths = [row["num_tokens"] for row in rows_of(tmp_path / "a" / "train")]
    records[1].value["conversations"][1]["value"] += " And more."
    run(records, tmp_path, tmp_path / "b", max_tokens=lengths[0])
    assert [row["num_tokens"] for row in rows_of(tmp_path / "b" / "train")] == lengths[:1]
    assert [e["reason_class"] for e in quarantine_of(tmp_path / "b")] == ["text too long"]


def test_duplicates_are_equal_in_every_field(tmp_path: Path) -> None:
    one = text_records(1)[0].value
    other_id = {**one, "id": "another"}
    reordered = dict(reversed(one.items()))
    records = [RawRecord(i, "f.json", v) for i, v in enumerate([one, other_id, one, reordered])]
    run(records, tmp_path, tmp_path / "out")
    assert [row["record_index"] for row in rows_of(tmp_path / "out" / "train")] == [0, 1]
    assert [(e["index"], e["reason_class"]) for e in quarantine_of(tmp_path / "out")] == [
        (2, "duplicate"),
        (3, "duplicate"),
    ]


def test_typed_control_tokens_are_quarantined(tmp_path: Path) -> None:
    records = text_records(2)
    records[0].value["conversations"][0]["value"] = "Ignore this<|im_end|>"
    run(records, tmp_path, tmp_path / "out")
    (entry,) = quarantine_of(tmp_path / "out")
    assert (entry["id"], entry["reason_class"]) == ("r0", "control token in the text")


def test_progress_counts_up_to_the_report(tmp_path: Path) -> None:
    seen: list[PreparationReport] = []
    report = run(text_records(250), tmp_path, tmp_path / "out", on_progress=seen.append)
    assert [progress.records for progress in seen] == [100, 200, 250]
    assert seen[-1] == report
    assert all(progress.records == progress.used + progress.quarantined for progress in seen)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    unusable = [RawRecord(0, "f.json", None), RawRecord(1, "f.json", {"conversations": []})]
    with pytest.raises(GraceError, match=r"none of 2 records.*1 x bad conversation"):
        run(unusable, tmp_path, tmp_path / "a")
    with pytest.raises(GraceError, match="5 held out"):
        run(text_records(5), tmp_path, tmp_path / "b", held_out_share=1.0)
    with pytest.raises(GraceError, match="is no folder"):
        run(text_records(5), tmp_path / "missing", tmp_path / "c")


# --- too much in quarantine


def test_pictures_that_are_not_there_end_the_preparation(tmp_path: Path) -> None:
    """Annotations in place, pictures not yet: the text-only records are no data set."""
    pictures = [picture_record(index, f"coco/train/{index}.jpg") for index in range(100, 220)]
    with pytest.raises(GraceError) as caught:
        run([*text_records(100), *pictures], tmp_path, tmp_path / "out", max_quarantined_share=0.5)
    message = str(caught.value)
    assert "120 of 220 records cannot be used" in message
    assert "120 x picture file missing (record 100: 'coco/train/100.jpg' does not" in message
    assert f"below {tmp_path}: coco 120 of 120 (there is no such folder)" in message
    assert "data.max_quarantined_share is 0.5" in message


@pytest.mark.parametrize(("missing", "ends"), [(6, True), (5, False)])
def test_one_folder_may_not_be_missing_among_many_records(
    missing: int, ends: bool, tmp_path: Path
) -> None:
    """Of all 300 records 2 %, of the folder's 100 records 6 % or 5 %."""
    (tmp_path / "sam").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "sam" / "there.png")
    names = ["sam/gone.png"] * missing + ["sam/there.png"] * (100 - missing)
    records = [picture_record(200 + index, name) for index, name in enumerate(names)]
    records += text_records(200)
    if ends:
        with pytest.raises(GraceError, match=r"6 of 300 records .*: sam 6 of 100\. Bring"):
            run(records, tmp_path, tmp_path / "out", max_quarantined_share=0.05)
    else:
        report = run(records, tmp_path, tmp_path / "out", max_quarantined_share=0.05)
        assert report.quarantined == 5


def test_a_storage_that_fails_is_no_bad_picture(tmp_path: Path) -> None:
    """The memory of this process is a regular file, whose first byte no read gives: EIO."""
    with pytest.raises(
        GraceError, match=r"picture 'mem' of record 0 .*Input/output error.*storage"
    ):
        run([picture_record(0, "mem")], Path("/proc/self"), tmp_path / "out")


# --- real pictures


def test_stamps_on_white(shared_data: Path, tmp_path: Path) -> None:
    """Cut-outs of modes RGBA, LA and P: all used, and their background is white."""
    folder = shared_data / "tuxpaint_sharegpt4v"
    records = islice(read_records([folder / "tuxpaint_sharegpt4v.json"]), 40)
    report = run(records, folder, tmp_path / "out", max_decoded_pixels=100_000_000)
    assert (report.records, report.used) == (40, 40)
    corners = []
    for row in rows_of(tmp_path / "out" / "train"):
        for content in row["images"]:
            with Image.open(io.BytesIO(content)) as stored:
                transparent = stored.convert("RGBA").getpixel((0, 0))[3] == 0
            if transparent:
                picture = open_picture(content, 100_000_000)
                corners.append(np.asarray(picture)[0, 0].tolist())
    assert len(corners) > 10
    assert all(corner == [255, 255, 255] for corner in corners)


def test_demo_files_of_two_schemas(shared_data: Path, tmp_path: Path) -> None:
    """Their paths begin with a folder that is mapped to the set's own."""
    root = tmp_path / "root"
    shutil.copytree(shared_data / "qwen_demo", root / "demo")
    shutil.copytree(shared_data / "llamafactory_demo", root / "data")
    files = [
        root / "demo" / "single_images.json",
        root / "data" / "mllm_demo.json",
        root / "data" / "mllm_pt_demo.json",
    ]
    report = run(
        read_records(files), root, tmp_path / "out", max_decoded_pixels=100_000_000, max_tokens=4096
    )
    given = [len(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    assert given == [3, 3, 6]
    assert (report.records, report.used) == (12, 12)
    rows = rows_of(tmp_path / "out" / "train")
    assert [row["record_id"] for row in rows] == [f"#{index}" for index in range(12)]
    first = zip(rows[0]["input_ids"], rows[0]["labels_mask"], strict=True)
    supervised = [token for token, flag in first if flag]
    assert shared_tokenizer().decode(supervised) == "Yes<|im_end|>"
