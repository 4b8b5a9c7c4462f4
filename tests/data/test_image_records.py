"""Images in records of every format: what they are called, and where they stand in the texts."""

from __future__ import annotations

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from one_record import failing, one
from PIL import Image

from cit_fast.data import Example, ReadOptions, Task, TaskSource, load_task, read_dataset, read_file
from cit_fast.data.images import IMAGE_MARK, checked_images, name_of_bytes, open_image
from cit_fast.data.kept_task import kept, read_kept, write_kept
from cit_fast.errors import ConfigError, DataError

A, B = "/data/a.png", "/data/b.png"
TEXT = {"type": "text", "text": "What is this?"}


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def llava(question, images=A, *more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}, *more]
    return {"image": images, "conversations": turns}


def chat(content, **fields):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}], **fields}


# ------------------------------------------------------------------------------------------------- marks in the text


@pytest.mark.parametrize(
    ("question", "images", "expected"),
    [
        ("<image>\nWhat is this?", A, "What is this?"),
        ("What is this?", A, "What is this?"),
        (" <image> <image>\n\nSame?", [A, B], "Same?"),
        ("Same?", [A, B], "Same?"),
        ("What is this?\n<image>", A, "What is this?\n<image>"),
        ("<image>\nor <image>?", [A, B], "<image>\nor <image>?"),
        ("<image>", A, "<image>"),  # nothing else is asked
        ("<image>\nWhat is this?", None, "<image>\nWhat is this?"),
        (" What does <image> mean?", [], " What does <image> mean?"),
    ],
)
def test_where_images_stand(question, images, expected):
    for example in (
        one(llava(question, images)),
        one({"instruction": question, "output": "A cat.", "image": images}),
        one({"prompt": question, "answer": "A cat.", "image": images}),
        one({"prompt": question, "completion": "A cat.", "images": images}),
        one(chat(question, images=images)),
    ):
        assert (example.instruction, example.messages) == (expected, ())
        assert example.images == ((images,) if isinstance(images, str) else tuple(images or ()))


@pytest.mark.parametrize(
    ("question", "images", "said"),
    [
        ("<image>\nSame?", [A, B], "2 images and 1 <image>; write it once where each stands, or leave it out"),
        ("<image> <image>\nSame?", A, "1 image and 2 <image>; "),
    ],
)
def test_another_number_of_marks_than_of_images(question, images, said):
    for record in (llava(question, images), {"instruction": question, "output": "x", "images": images}):
        assert failing(record).startswith(f"here:1: {said}")


def test_the_file_and_the_record_are_named(write):
    path = write("t.json", [llava("<image>\nWhat?", A), llava("<image>\nSame?", [A, B])])
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}: record 2: 2 images and 1 <image>; ")


def test_instruction_and_input_are_counted_together():
    record = {"input": "<image>", "output": "x", "images": [A, B]}
    example = one({"instruction": "Compare <image> with the other.", **record})
    assert (example.instruction, example.input) == ("Compare <image> with the other.", "<image>")
    first = one({"instruction": "<image>\nCompare.", **record})
    assert first.instruction == "<image>\nCompare."
    assert "1 image and 2 <image>" in failing({"instruction": "<image>", "input": "<image>", "output": "x", "image": A})


def test_turns_of_a_conversation():
    def asked(first, images, second):
        more = {"from": "human", "value": second}, {"from": "gpt", "value": "Yes, <image>."}
        return one(llava(first, images, *more))

    example = asked("<image>\nWhat?", A, "Sure?")
    assert example.messages[:2] == (("user", "What?"), ("assistant", "A cat."))
    assert example.messages[2:] == (("user", "Sure?"), ("assistant", "Yes, <image>."))
    assert (example.instruction, example.images) == ("Sure?", (A,))
    system = one({"system": "See <image>.", **llava("<image>\nWhat?", A)})
    assert system.messages[:2] == (("system", "See <image>."), ("user", "What?"))
    assert system.instruction == "What?"
    later = asked("What?", [A, B], "<image> and <image>?")
    assert later.messages[2] == ("user", "<image> and <image>?")
    both = asked("<image>\nWhat?", [A, B], "<image>\nThis?")
    assert [text for role, text in both.messages if role == "user"] == ["<image>\nWhat?", "<image>\nThis?"]
    assert both.instruction == "<image>\nThis?"


def test_a_system_text_of_alpaca_does_not_hide_the_mark():
    record = {"system": "Be brief.", "instruction": "<image>\nWhat?", "input": "Say.", "output": "x", "image": A}
    example = one(record)
    assert (example.messages[1], example.instruction) == (("user", "What?\n\nSay."), "What?")
    bare = one({**record, "instruction": "<image>"})
    assert (bare.messages[1], bare.instruction) == (("user", "Say."), "<image>")


def test_key_parts_move_with_the_text():
    record = {"instruction": "<image>\nAnswer in one word.", "output": "x", "image": A}
    assert one({**record, "key_parts": ["one word"]}).key_part_texts == ("one word",)
    assert one({**record, "key_parts": [[8, 14]]}).key_part_texts == ("Answer",)
    marked = one({**record, "instruction": "<image>\nAnswer in [[one word]]."}, key_part_markers=("[[", "]]"))
    assert (marked.instruction, marked.key_part_texts) == ("Answer in one word.", ("one word",))
    first = one({**record, "instruction": "<image>\nWhat?\nIn a word."}, instruction_part="first-line")
    assert first.task_instruction == "What?"


# --------------------------------------------------------------------------------------------------- parts of a turn


@pytest.mark.parametrize(
    ("content", "own", "expected", "images"),
    [
        ([{"type": "image", "image": A}, TEXT], None, "What is this?", (A,)),
        ([{"type": "image", "path": A}, {"type": "image", "url": B}, TEXT], None, "What is this?", (A, B)),
        ([TEXT, {"type": "image", "image": A}], None, "What is this?<image>", (A,)),
        ([TEXT, {"type": "image"}, TEXT], A, "What is this?<image>What is this?", (A,)),
        ([{"type": "image"}, TEXT, {"type": "image", "url": B}], [A], "<image>What is this?<image>", (A, B)),
        ([{"type": "image", "url": B}, TEXT, {"type": "image"}], [A], "<image>What is this?<image>", (B, A)),
        ([{"type": "image_url", "image_url": {"url": B, "detail": "low"}}, TEXT], None, "What is this?", (B,)),
        ([{"type": "image_url", "image_url": B}, TEXT], None, "What is this?", (B,)),
        ([{"type": "image", "base64": "eA=="}, TEXT], None, "What is this?", ("data:image/png;base64,eA==",)),
        ([{"type": "image", "image": {"bytes": b"x"}}, TEXT], None, "What is this?", (name_of_bytes(b"x"),)),
        ([{"type": "image", "text": None, "image": A}, {**TEXT, "image": None}], None, "What is this?", (A,)),
        ([TEXT, TEXT], A, "What is this?\nWhat is this?", (A,)),
        ([{"type": "image"}, {"type": "text", "text": "<image> this?"}], [A, B], "this?", (A, B)),
        ([{"type": "text", "text": "Is <image> "}, {"type": "image", "url": B}], [A], "Is <image> <image>", (A, B)),
    ],
)
def test_parts_of_a_turn(content, own, expected, images):
    example = one(chat(content, images=own))
    assert (example.instruction, example.images) == (expected, images)


def test_placeholders_without_names():
    assert "image parts without a name: 2, names in 'images': 1; name each" in failing(
        chat([{"type": "image"}, {"type": "image"}, TEXT], image=A)
    )
    assert "image parts without a name: 1, names in 'images': 0; name each" in failing(chat([{"type": "image"}, TEXT]))
    assert "3 images and 1 <image>" in failing(chat([{"type": "image"}, TEXT], images=[A, A, B]))
    drawn = {"role": "assistant", "content": [{"type": "image", "url": A}]}
    said = failing({"messages": [{"role": "user", "content": "Draw."}, drawn]})
    assert "turn 2: an image in the assistant's turn" in said


# ------------------------------------------------------------------------------------------------------------- names


def test_paths_start_from_the_folder_of_the_file(write, tmp_path):
    records = [llava("<image>\nWhat?", name) for name in ("./coco/1.jpg", "../1.jpg", A, "https://example.org/1.jpg")]
    for path in (write("t.json", records), write("t.jsonl", records)):
        expected = [f"{tmp_path}/coco/1.jpg", f"{tmp_path}/../1.jpg", A, "https://example.org/1.jpg"]
        assert [example.images[0] for example in read_file(path)] == expected
        elsewhere = read_file(path, ReadOptions(images="/pictures"))
        assert [example.images[0] for example in elsewhere][:3] == ["/pictures/coco/1.jpg", "/pictures/../1.jpg", A]
    table = write("t.csv", "instruction,output,image\nWhat?,x,a.png\nWhy?,y,\n")
    assert [example.images for example in read_file(table)] == [(f"{tmp_path}/a.png",), ()]


def test_a_relative_file_has_images_of_absolute_paths(write, tmp_path, monkeypatch):
    write("t.json", [llava("What?", "a.png")])
    monkeypatch.chdir(tmp_path)
    assert read_file("t.json")[0].images == (f"{tmp_path}/a.png",)
    assert read_file("t.json", ReadOptions(images="pictures"))[0].images == (f"{tmp_path}/pictures/a.png",)
    assert one({"instruction": "i", "output": "x", "image": "a.png"}).images == (f"{tmp_path}/a.png",)


def test_super_ni_instances_have_images(write, tmp_path):
    instances = [{"input": "<image> here", "output": "x", "image": "a.png"}]
    path = write("t.json", {"Definition": "Do.", "Instances": instances})
    assert read_file(path)[0].images == (f"{tmp_path}/a.png",)
    assert read_file(path, ReadOptions(images="/p"))[0].images == ("/p/a.png",)


def test_a_task_as_coin_and_ucit_lay_it_out(tmp_path):
    folder, images = tmp_path / "instructions" / "ImageNet-R", tmp_path / "datasets"
    folder.mkdir(parents=True)
    (images / "ImageNet-R").mkdir(parents=True)
    (images / "ImageNet-R" / "1.png").write_bytes(png())
    question = "What is the object in the image?\nAnswer the question using a single word or phrase."
    train = [{"id": "1", **llava(f"<image>\n{question}", "./ImageNet-R/1.png")}] * 4
    test = [{"question_id": "1", "image": "./ImageNet-R/1.png", "text": question, "answer": "cat"}]
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test_3000.json").write_text(json.dumps(test))
    options = {"columns": {"prompt": "text"}, "splits": {"test": "test_3000"}}
    task = load_task(TaskSource(path=str(folder), images=str(images), **options))
    assert {example.instruction for example in (*task.train, *task.test)} == {question}
    assert {example.images for example in (*task.train, *task.test)} == {(f"{images}/ImageNet-R/1.png",)}
    assert task.test[0].references == ("cat",)
    assert checked_images(task.train, "error") == (task.train, ())


def test_the_folder_of_images_does_not_apply_to_a_built_in_task():
    with pytest.raises(ConfigError, match="images does not apply to the built-in task"):
        TaskSource(builtin="units", images="/pictures")


def test_a_missing_image_is_named_with_its_record(write, tmp_path):
    path = write("t.jsonl", [llava("<image>\nWhat?", "a.png"), llava("<image>\nWhat?", "b.png")])
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(DataError) as caught:
        checked_images(read_file(path), "error")
    assert str(caught.value) == f"{path}:2: image {tmp_path}/b.png: no such file"


# ---------------------------------------------------------------------------------------------------- bytes of tables


def test_bytes_of_parquet_are_kept_as_they_are(tmp_path):
    here = tmp_path / "here.png"
    here.write_bytes(png("blue"))
    images = [
        {"bytes": png(), "path": None},
        {"bytes": png(), "path": "a.png"},
        {"bytes": png(), "path": str(here)},
        {"bytes": png(), "path": "/gone/a.png"},
        {"bytes": None, "path": "here.png"},
    ]
    rows = [{"instruction": "What?", "output": "x", "image": image} for image in images]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = load_task(TaskSource(path=str(tmp_path / "a.parquet")), dev=0, test=0)
    bytes_ = name_of_bytes(png())
    assert [example.images[0] for example in task.train] == [bytes_, bytes_, str(here), bytes_, str(here)]
    assert open_image(bytes_).getpixel((0, 0)) == (255, 0, 0)
    elsewhere = load_task(TaskSource(path=str(tmp_path / "a.parquet"), images="/p"), dev=0, test=0)
    assert elsewhere.train[4].images == ("/p/here.png",)


def test_a_path_beside_bytes_may_be_no_path():
    for path in ("/" + "a" * 5000, "/a\0b"):
        record = {"instruction": "What?", "output": "x", "image": {"bytes": b"x", "path": path}}
        assert one(record).images == (name_of_bytes(b"x"),)


@pytest.mark.parametrize("decode", [True, False])
def test_columns_of_images(tmp_path, decode):
    (tmp_path / "b.png").write_bytes(png("blue"))
    features = datasets.Features(
        {
            "instruction": datasets.Value("string"),
            "output": datasets.Value("string"),
            "images": datasets.List(datasets.Image(decode=decode)),
        }
    )
    images = [{"bytes": png(), "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}]
    row = {"instruction": "Same?", "output": "no", "images": images}
    dataset = datasets.Dataset.from_list([row, {**row, "images": []}], features=features)
    first, second = read_dataset(dataset, ReadOptions(), where="here")
    assert first.images == (name_of_bytes(png()), str(tmp_path / "b.png"))
    assert second.images == ()
    dataset.save_to_disk(str(tmp_path / "saved"))
    task = load_task(TaskSource(path=str(tmp_path / "saved")), dev=0, test=0)
    assert [open_image(name).getpixel((0, 0)) for name in task.train[0].images] == [(255, 0, 0), (0, 0, 255)]


def test_a_column_of_bare_bytes(tmp_path):
    rows = [{"instruction": f"What {number}?", "output": "x", "image": png()} for number in range(120)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = load_task(TaskSource(path=str(tmp_path / "a.parquet")), dev=0, test=0)
    assert [example.instruction for example in task.train] == [row["instruction"] for row in rows]
    assert {example.images for example in task.train} == {(name_of_bytes(png()),)}


def test_what_is_no_image():
    for image in ({"a": 1}, {"bytes": "x"}):
        assert "'image' must be a path, or an object" in failing({"instruction": "i", "output": "x", "image": image})
    assert "'image' must be a text, not a list" in failing({"instruction": "i", "output": "x", "image": [[A]]})


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_runs_memory_gives_the_images_back(tmp_path):
    names = (A, name_of_bytes(png()), "/data/\u00e9 \u2028.png")
    example = Example(f"{IMAGE_MARK} {IMAGE_MARK} {IMAGE_MARK}", references=("x",), images=names)
    task = Task("shapes", (example,), test=(example,))
    write_kept(tmp_path / "shapes.json", kept(task, "digest", [0]))
    back = read_kept(tmp_path / "shapes.json")
    assert (back.train, back.test) == (task.train, task.test)
