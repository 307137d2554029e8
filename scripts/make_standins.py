"""Tiny stand-ins for the public data sets: same folders, configurations, splits, columns and types, invented content.

    python scripts/make_standins.py DIR
    svl benchmark=paper6 benchmark.data=DIR calibration=gqa calibration.path=DIR/GQA ...

With them every benchmark and calibration set runs offline, through the code that reads the real ones. Columns are those
of the hub's data cards as lmms-eval's task code (0.7.3) and svl use them; nothing of the real content is copied.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as Pictures

TEXT, INT, TEXTS, PICTURE = Value("string"), Value("int64"), List(Value("string")), Image()
COLORS = ["red", "green", "blue", "gray"]
Rows = list[dict[str, Any]]


def picture(seed: int) -> dict[str, Any]:
    """A PNG of random blocks, 32 x 24 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pictures.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def rotated(i: int) -> list[str]:
    """The colours, starting with another one each time."""
    return COLORS[i % 4 :] + COLORS[: i % 4]


def pope() -> tuple[dict[str, Any], Rows]:
    """Two positive and two negative questions of every split."""
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), TEXT)
    rows = [
        {
            "id": str(i), "question_id": str(i), "question": f"Is there a {COLORS[i % 4]} thing in the image?",
            "answer": "yes" if i % 2 else "no", "image_source": f"COCO_val2014_{i // 2:012}", "image": picture(i),
            "category": category,
        }
        for i, category in enumerate(c for c in ("random", "popular", "adversarial") for _ in range(4))
    ]  # fmt: skip
    return {**columns, "image": PICTURE, "category": TEXT}, rows


def mme() -> tuple[dict[str, Any], Rows]:
    """Pairs on one image each, whose questions are not neighbours, of four categories."""
    columns = {"question_id": TEXT, "image": PICTURE, **dict.fromkeys(("question", "answer", "category"), TEXT)}
    names = [(c, i) for c in ("existence", "OCR", "code_reasoning", "text_translation") for i in range(2)]
    rows = [
        {
            "question_id": f"{category}/{i}.png", "image": picture(10 * n + i), "answer": answer, "category": category,
            "question": f"Is item {n} {'here' if answer == 'Yes' else 'gone'}? Please answer yes or no.",
        }
        for answer in ("Yes", "No") for n, (category, i) in enumerate(names)
    ]  # fmt: skip
    return columns, rows


def scienceqa() -> tuple[dict[str, Any], Rows]:
    """Two to four choices, with and without a hint."""
    about = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    columns = {
        "image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT,
        **dict.fromkeys(about, TEXT),
    }  # fmt: skip
    rows = [
        {
            "image": picture(i), "question": f"Which colour is number {i}?", "choices": rotated(i)[: 2 + i % 3],
            "answer": i % 2, "hint": "Look closely." if i % 2 else "", **dict.fromkeys(about, "x"),
        }
        for i in range(8)
    ]  # fmt: skip
    return columns, rows


def aokvqa() -> tuple[dict[str, Any], Rows]:
    """Four choices."""
    columns = {
        "image": PICTURE, "question_id": TEXT, "question": TEXT, "choices": TEXTS, "correct_choice_idx": Value("int8"),
        "direct_answers": TEXT, "difficult_direct_answer": Value("bool"), "rationales": TEXTS,
    }  # fmt: skip
    rows = [
        {
            "image": picture(i), "question_id": f"q{i}", "question": f"What colour is the thing of kind {i}?",
            "choices": rotated(i), "correct_choice_idx": (i * 3) % 4, "direct_answers": "['red', 'reddish']",
            "difficult_direct_answer": False, "rationales": ["It is."],
        }
        for i in range(8)
    ]  # fmt: skip
    return columns, rows


def mmbench() -> tuple[dict[str, Any], Rows]:
    """Three questions, each in four (one in two) rotations, all first ones before all second ones."""
    columns = {"index": INT, **dict.fromkeys(("question", "hint", "answer", *"ABCD", "category"), TEXT)}
    columns |= {"image": PICTURE, **dict.fromkeys(("source", "L2-category", "comment", "split"), TEXT)}
    rows = []
    for turn in range(4):
        for i in range(3):
            options = rotated(turn)
            if i == 2:  # a question of two options has two rotations
                if turn > 1:
                    continue
                options = [*(["red", "green"] if turn == 0 else ["green", "red"]), "nan", "nan"]
            right = "ABCD"[options.index(COLORS[i % 2])]
            row = {
                "index": 300 + i + 1_000_000 * turn, "question": f"What is thing {i}?",
                "hint": "nan" if i else "It has a colour.", "answer": right, **dict(zip("ABCD", options, strict=True)),
                "category": ("object", "scene")[i % 2], "image": picture(i), "source": "x", "L2-category": "coarse",
                "comment": "nan", "split": "dev",
            }  # fmt: skip
            rows.append(row)
    return columns, rows


def seedbench() -> tuple[dict[str, Any], Rows]:
    """Questions on images and, which must be left out, on videos."""
    choices = [f"choice_{c}" for c in "abcd"]
    columns = {**dict.fromkeys(("answer", *choices, "data_id", "data_type", "question", "question_id"), TEXT)}
    columns |= {"question_type_id": Value("int16"), "image": List(PICTURE), "segment": List(INT)}
    rows = [
        {
            "answer": "ABCD"[i % 4], **dict(zip(choices, rotated(i), strict=True)), "data_id": str(i),
            "data_type": "video" if i % 3 == 1 else "image", "question": f"What is shown in {i}?",
            "question_id": str(1000 + i), "question_type_id": i % 5, "segment": [0, 1],
            "image": [picture(i + j) for j in range(4 if i % 3 == 1 else 1)],
        }
        for i in range(12)
    ]  # fmt: skip
    return columns, rows


def gqa() -> tuple[dict[str, Any], Rows]:
    """Questions that name their image."""
    columns = {
        **dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT), "isBalanced": Value("bool"),
        "groups": {"global": TEXT, "local": TEXT}, "entailed": TEXT, "equivalent": TEXT,
        "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}, "semanticStr": TEXT,
    }  # fmt: skip
    rows = [
        {
            "id": f"2{i:05}", "imageId": f"n{(i * 2) % 5}", "question": f"Which colour does shape {i} have?",
            "answer": COLORS[i % 4], "fullAnswer": f"It is {COLORS[i % 4]}.", "isBalanced": True,
            "groups": {"global": "color", "local": "x"}, "entailed": "", "equivalent": "", "semanticStr": "",
            "types": {"structural": "query", "semantic": "attr", "detailed": "x"},
        }
        for i in range(8)
    ]  # fmt: skip
    return columns, rows


def gqa_images() -> tuple[dict[str, Any], Rows]:
    """The images that they name."""
    return {"id": TEXT, "image": PICTURE}, [{"id": f"n{i}", "image": picture(100 + i)} for i in reversed(range(5))]


def textvqa() -> tuple[dict[str, Any], Rows]:
    """Ten answers each, as people gave them."""
    columns = {
        "image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": TEXTS, "image": PICTURE,
        "image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT, "answers": TEXTS, "image_classes": TEXTS, "set_name": TEXT, "ocr_name": TEXTS,
        "ocr_tokens": TEXTS,
    }  # fmt: skip
    rows = [
        {
            "image_id": f"i{i}", "question_id": i, "question": f"what does sign {i} say?", "question_tokens": [],
            "image": picture(i), "image_width": 32, "image_height": 24,
            "flickr_original_url": "", "flickr_300k_url": "",
            "answers": [COLORS[i % 4]] * 10, "image_classes": ["Sign"], "set_name": "val", "ocr_name": [],
            "ocr_tokens": ["EXIT", "RED"],
        }
        for i in range(6)
    ]  # fmt: skip
    return columns, rows


def vizwiz() -> tuple[dict[str, Any], Rows]:
    """Ten answers each; one question has none."""
    columns = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answers": TEXTS, "category": TEXT}
    rows = [
        {
            "question_id": f"VizWiz_val_{i:08}", "image": picture(i), "question": "What colour is this?",
            "answers": ["unanswerable" if i == 0 else COLORS[i % 4]] * 10, "category": "other",
        }
        for i in range(6)
    ]  # fmt: skip
    return columns, rows


def mmmu() -> tuple[dict[str, Any], Rows]:
    """Multiple choice and open questions, with up to two images between the words."""
    images = [f"image_{k}" for k in range(1, 8)]
    columns = {
        **dict.fromkeys(("id", "question", "options", "explanation"), TEXT), **dict.fromkeys(images, PICTURE),
        **dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT),
    }  # fmt: skip
    rows = []
    for i in range(8):
        several, closed = i % 3 == 2, i % 4 != 3
        row = {
            "id": f"validation_{('Art', 'Computer_Science')[i % 2]}_{i + 1}",
            "question": f"In <image 1>, {'compared with <image 2>, ' if several else ''}what is item {i}?",
            "options": str(rotated(i) if closed else []), "explanation": "?", **dict.fromkeys(images),
            "image_1": picture(i), "img_type": "['Photographs']", "answer": "ABCD"[i % 4] if closed else "3.5",
            "topic_difficulty": "Easy", "question_type": "multiple-choice" if closed else "open", "subfield": "x",
        }  # fmt: skip
        rows.append(row | ({"image_2": picture(50 + i)} if several else {}))
    return columns, rows


def realworldqa() -> tuple[dict[str, Any], Rows]:
    """Letters, numbers and words."""
    ask = "Please answer directly with only the letter of the correct option and nothing else."
    closed = "What colour is the car?\n\nA. red\nB. green\nC. blue\n" + ask
    questions = [(closed, "B"), ("How many cars are there?", "4"), ("Is the light red?", "Yes"), (closed, "C")]
    rows = [{"image": picture(i), "question": q, "answer": a} for i, (q, a) in enumerate(questions * 2)]
    return {"image": PICTURE, "question": TEXT, "answer": TEXT}, rows


def mmstar() -> tuple[dict[str, Any], Rows]:
    """Four kinds of questions, two of one category."""
    kinds = [
        ("coarse perception", "image emotion"), ("math", "geometry"), ("math", "statistical reasoning"),
        ("science & technology", "geography & earth science & agriculture"),
    ]  # fmt: skip
    columns = {"index": INT, "question": TEXT, "image": PICTURE, **dict.fromkeys(("answer", "category"), TEXT)}
    columns |= {"l2_category": TEXT, "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT}}
    rows = []
    for i in range(8):
        options = ", ".join(f"{letter}: {color}" for letter, color in zip("ABCD", rotated(i), strict=True))
        question = f"What does thing {i} look like?\nOptions: {options}"
        kind = dict(zip(("category", "l2_category"), kinds[i % 4], strict=True))
        meta = {"source": "x", "split": "val", "image_path": f"images/{i}.jpg"}
        answer = "ABCD"[(i * 3) % 4]
        rows.append(
            {"index": i, "question": question, "image": picture(i), "answer": answer, **kind, "meta_info": meta}
        )
    return columns, rows


def ai2d() -> tuple[dict[str, Any], Rows]:
    """The answer is the number of an option, as text."""
    columns = {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE}
    rows = [
        {"question": f"Which part is {i}?", "options": rotated(i), "answer": str((i * 3) % 4), "image": picture(i)}
        for i in range(6)
    ]
    return columns, rows


def chartqa() -> tuple[dict[str, Any], Rows]:
    """Numbers, percentages and words, from both parts of the test set."""
    answers = ["12.5", "red", "40%", "Yes", "0.7", "green"]
    columns = dict.fromkeys(("type", "question", "answer"), TEXT)
    rows = [
        {
            "type": ("human_test", "augmented_test")[i % 2], "question": f"What is the value of bar {i}?",
            "answer": answer, "image": picture(i),
        }
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    return {**columns, "image": PICTURE}, rows


def docvqa() -> tuple[dict[str, Any], Rows]:
    """One or two accepted answers."""
    columns = {
        "questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": INT,
        "ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT,
    }  # fmt: skip
    rows = [
        {
            "questionId": str(i), "question": f"What is written in line {i}?", "question_types": ["form"],
            "image": picture(i), "docId": i, "ucsf_document_id": "x", "ucsf_document_page_no": "1",
            "answers": [f"{COLORS[i % 4]} {i}", COLORS[i % 4]][: 1 + i % 2], "data_split": "val",
        }
        for i in range(6)
    ]  # fmt: skip
    return columns, rows


def llava_instruct() -> tuple[dict[str, Any], Rows]:
    """Conversations of two turns on one image; `images` beside the messages that mark its place."""
    part = {"index": INT, "text": TEXT, "type": TEXT}
    columns = {"messages": List({"content": List(part), "role": TEXT}), "images": List(PICTURE)}
    rows = []
    for i in range(8):
        asked = [{"index": None, "text": f"What is in scene {i}?\n", "type": "text"}]
        asked.append({"index": 0, "text": None, "type": "image"})
        said = [
            [{"index": None, "text": text, "type": "text"}] for text in (f"A {COLORS[i % 4]} thing.", "Sure?", "Yes.")
        ]
        contents = zip([asked, *said], ("user", "assistant") * 2, strict=True)
        rows.append({"messages": [{"content": c, "role": r} for c, r in contents], "images": [picture(i)]})
    return columns, rows


def coco_captions() -> tuple[dict[str, Any], Rows]:
    """Several captions of each image, one per row."""
    columns = {"image": PICTURE, "filename": TEXT, "cocoid": Value("int32"), "caption": TEXT}
    rows = [
        {"image": picture(i), "filename": f"{i}.jpg", "cocoid": i, "caption": f"A {c} thing, number {i}."}
        for i in range(8) for c in COLORS[:2]
    ]  # fmt: skip
    return columns, rows


def finevision() -> tuple[dict[str, Any], Rows]:
    """Turns of user and assistant, with ratings; one row has no image."""
    ratings = ("relevance", "visual_dependency", "image_correspondence", "formatting")
    columns = {
        "images": List(PICTURE), "texts": List({"user": TEXT, "assistant": TEXT}), "source": TEXT,
        **{f"{r}_ratings": List(INT) for r in ratings}, **{f"{r}_min": INT for r in ratings},
    }  # fmt: skip
    rows = [
        {
            "images": [picture(i)] if i else [], "source": "x", **{f"{r}_ratings": [5] for r in ratings},
            "texts": [
                {"user": f"Describe {i}.", "assistant": f"It is {COLORS[i % 4]}."}, {"user": "?", "assistant": "!"},
            ],
            **{f"{r}_min": 5 for r in ratings},
        }
        for i in range(8)
    ]  # fmt: skip
    return columns, rows


def wikitext() -> tuple[dict[str, Any], Rows]:
    """Lines: headings, paragraphs and empty ones."""
    lines = []
    for i in range(60):
        lines += [
            "",
            f" = Article {i} = \n",
            "",
            f" The {COLORS[i % 4]} thing number {i} is known for {i} things . \n" * 9,
        ]
    return {"text": TEXT}, [{"text": line} for line in lines]


# folder (with its owner where there are two) -> configuration ("" if the data set has one only) -> split -> content
DATA_SETS: dict[str, dict[str, dict[str, Any]]] = {
    "POPE": {"": {"test": pope}},
    "MME": {"": {"test": mme}},
    "ScienceQA": {"ScienceQA-IMG": {"train": scienceqa, "validation": scienceqa, "test": scienceqa}},
    "derek-thomas/ScienceQA": {"": {"train": scienceqa, "validation": scienceqa, "test": scienceqa}},
    "A-OKVQA": {"": {"train": aokvqa, "validation": aokvqa}},
    "MMBench": {"en": {"dev": mmbench}},
    "SEED-Bench": {"": {"test": seedbench}},
    "GQA": {
        "testdev_balanced_instructions": {"testdev": gqa}, "testdev_balanced_images": {"testdev": gqa_images},
        "train_balanced_instructions": {"train": gqa}, "train_balanced_images": {"train": gqa_images},
    },
    "textvqa": {"": {"validation": textvqa}},
    "VizWiz-VQA": {"": {"val": vizwiz}},
    "MMMU": {"": {"validation": mmmu}},
    "RealWorldQA": {"": {"test": realworldqa}},
    "MMStar": {"": {"val": mmstar}},
    "ai2d": {"": {"test": ai2d}},
    "ChartQA": {"": {"test": chartqa}},
    "DocVQA": {"DocVQA": {"validation": docvqa}},
    "llava-instruct-mix-vsft": {"": {"train": llava_instruct}},
    "coco_captions": {"": {"train": coco_captions}},
    "FineVision": {"LLaVA_Instruct_150K": {"train": finevision}},
    "wikitext": {"wikitext-2-raw-v1": {"train": wikitext}},
}  # fmt: skip


UNLISTED = {("ScienceQA", "train")}  # files that are there, but are commented out in the card


def write(folder: Path, names: Iterable[str] = DATA_SETS) -> Path:
    """Write the data sets into `folder`, each as `hf download` leaves it: a card, and parquet by split."""
    disable_progress_bars()
    for name in names:
        configurations = []
        for configuration, splits in DATA_SETS[name].items():
            place = folder / name / (configuration or "data")
            place.mkdir(parents=True, exist_ok=True)
            files = []
            for split, content in splits.items():
                columns, rows = content()
                file = place / f"{split}-00000-of-00001.parquet"
                Dataset.from_list(rows, features=Features(columns)).to_parquet(file)
                if (name, split) not in UNLISTED:
                    files.append({"split": split, "path": f"{place.name}/{split}-*"})
            configurations.append({"config_name": configuration or "default", "data_files": files})
        card = yaml.safe_dump({"configs": configurations})
        (folder / name / "README.md").write_text(f"---\n{card}---\nA stand-in with invented content.\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_standins.py DIR")
    print(write(Path(sys.argv[1])))
