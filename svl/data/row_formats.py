"""How a row of a data set or of one's own file becomes a sample: FORMATS, and how columns tell which one it is."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svl.core import SvlError, did_you_mean, one_of
from svl.data.picture_fields import as_list
from svl.data.samples import IMAGE_MARK, VIDEO_MARK

DESCRIBE = "Describe this image."  # what is asked about images without a question
LETTERS = string.ascii_uppercase
TURNS = ("all", "first")
ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt"),
    "system": ("system",),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Attributes:
        format: a key of FORMATS; None: as the columns tell.
        prompt: what is asked where rows have no question.
        columns: the rows' column for a column that a format reads, {"prompt": "question"}; None: rows have none.
        images: the folder that paths of pictures and videos are relative to; None: the file's own.
        turns: of conversations: all (the last question, after everything before it), or first.
        frames: of a video file, how many frames are shown.

    Raises:
        SvlError: if there is no such format, column or choice of turns.
    """

    format: str | None = None
    prompt: str = DESCRIBE
    columns: Mapping[str, str | None] = field(default_factory=dict)
    images: Path | None = None
    turns: str = "all"
    frames: int = 8

    def __post_init__(self) -> None:
        if self.format is not None:
            one_of("calibration.format", self.format, list(FORMATS))
        one_of("calibration.turns", self.turns, TURNS)
        for column in self.columns:
            one_of("a key of calibration.columns", column, COLUMNS)
        if self.images is not None and not self.images.is_dir():
            raise SvlError(f"calibration.images: there is no folder '{self.images}'")

    def renamed(self, row: Row) -> Row:
        """The row with the columns that formats read; of those that it does not have, None."""
        kept = {column: value for column, value in row.items() if self.columns.get(column, "") is not None}
        return kept | {column: row.get(name) for column, name in self.columns.items() if name is not None}

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise SvlError if `columns` names one that the rows do not have."""
        for name in self.columns.values():
            if name is not None and name not in columns:
                listing = ", ".join(columns)
                raise SvlError(
                    f"calibration.columns names '{name}', but there is no such column{did_you_mean(name, columns)}; "
                    f"there are: {listing}"
                )


@dataclass(frozen=True)
class RowContent:
    """What a row says; its pictures and its video are as the row holds them."""

    prompt: str
    answer: str | None = None
    images: Any = None
    video: Any = None
    earlier: tuple[tuple[str, str], ...] = ()
    plain: bool = False


def find_format(columns: Collection[str], options: RowOptions) -> str:
    """The format of one's own rows: the one asked for, or what their columns tell.

    Raises:
        SvlError: if `options.columns` names a column that is not there.
        ValueError: if the columns tell no format; the message says which there are.
    """
    options.check_columns(columns)
    columns = options.renamed(dict.fromkeys(columns))
    if options.format is not None:
        return options.format
    if {"messages", "conversations"} & set(columns):
        return "messages"
    pictured = {"image", "images", "video"} & set(columns)
    without = "image" in options.columns  # the user says that there are none
    if "prompt" in columns and (pictured or without or "text" in columns):
        return "prompt"
    if pictured and {"caption", "text"} & set(columns):
        return "caption"
    if "text" in columns:
        return "text"
    missing = "image" if "prompt" in columns else "prompt"
    hint = did_you_mean(missing, columns)
    listing = ", ".join(columns)
    advice = f"calibration.columns={{{missing}: ...}} names it"
    if missing == "image":
        advice = f"{advice}, {{image: null}} says that there are no pictures"
    raise ValueError(f"there is no column '{missing}'{hint}; there are: {listing}; {advice}")


def read_row(row: Row, row_format: str, options: RowOptions) -> RowContent | None:
    """What a row says; None if it makes no sample.

    Raises:
        ValueError: if a column is missing, or does not hold what the format reads.
    """
    row = options.renamed(row)
    try:
        return FORMATS[row_format](row, options)
    except KeyError as error:
        missing, listing = str(error.args[0]), ", ".join(map(str, row))
        hint = did_you_mean(missing, row)
        raise ValueError(
            f"there is no column '{missing}'{hint}, which calibration.format={row_format} reads; "
            f"there are: {listing}; calibration.columns={{{missing}: ...}} names another"
        ) from error


def _prompt(row: Row, options: RowOptions) -> RowContent:
    if row.get("prompt") is None and isinstance(row.get("text"), str):
        return _text(row, options)
    earlier = tuple((turn["role"], turn["content"]) for turn in row.get("earlier") or ())
    return RowContent(_as_text(row, "prompt"), _answer(row), _pictures(row), row.get("video"), earlier)


def _question(row: Row, options: RowOptions) -> RowContent:
    return RowContent(_as_text(row, "question"), _answer(row), _pictures(row), row.get("video"))


def _choices(row: Row, options: RowOptions) -> RowContent | None:
    """A question with lettered choices, asked as the benchmarks do; rows without an image are left out."""
    if row["image"] is None:
        return None
    right = row["answer"] if "answer" in row else row["correct_choice_idx"]
    hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
    if len(row["choices"]) > len(LETTERS):
        raise SvlError(f"a question has {len(row['choices'])} choices, more than there are letters ({len(LETTERS)})")
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    ask = "Answer with the option's letter from the given choices directly."
    return RowContent(f"{hint}{_as_text(row, 'question')}\n{choices}\n{ask}", LETTERS[right], row["image"])


def _caption(row: Row, options: RowOptions) -> RowContent:
    caption = row["text"] if "text" in row and "caption" not in row else row["caption"]
    return RowContent(options.prompt, _said(caption, "caption"), _pictures(row), row.get("video"))


def _messages(row: Row, options: RowOptions) -> RowContent:
    """A conversation: `messages` or `conversations`, of role and content, or of from and value."""
    inline: list[Any] = []  # pictures that stand in the turns themselves
    turns = row["messages"] if row.get("messages") is not None else row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("its turns are not a list of objects")
    texts = [(_role(turn), _content(turn, inline)) for turn in turns]
    content = _conversation(texts, options, inline or _pictures(row), row.get("video"))
    if content.video is not None and not _count(texts, VIDEO_MARK) and not as_list(content.images):
        return _with_video_marks(content)
    return content


def _turns(row: Row, options: RowOptions) -> RowContent:
    """A conversation: `texts`, pairs of user and assistant."""
    texts = [(role, turn[role]) for turn in row["texts"] for role in ("user", "assistant")]
    return _conversation(texts, options, _pictures(row), None)


def _text(row: Row, options: RowOptions) -> RowContent:
    return RowContent(_as_text(row, "text"), plain=True)


# by name; the columns that are read are in the comments
FORMATS: dict[str, Callable[[Row, RowOptions], RowContent | None]] = {
    "prompt": _prompt,  # image or images, video, prompt, answer or answers, earlier; or text
    "question": _question,  # image or images, video, question, answer or answers
    "choices": _choices,  # image, question, choices, answer or correct_choice_idx (a number), hint
    "caption": _caption,  # image or images, video, caption or text
    "messages": _messages,  # image or images, video, messages or conversations
    "turns": _turns,  # images, texts of user and assistant
    "text": _text,  # text alone
}
COLUMNS = (
    *("image", "images", "video", "prompt", "question", "answer", "answers", "caption", "text"),
    *("messages", "conversations", "texts", "choices", "correct_choice_idx", "hint"),
)


def _as_text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} is not text")
    text: str = row[column]
    return text


def _pictures(row: Row) -> Any:
    return row["images"] if row.get("images") is not None else row.get("image")


def _answer(row: Row) -> str | None:
    """The answer; of several that people gave, the one that most gave, and the first of these."""
    answer = _said(row.get("answer"), "answer")
    return answer if answer is not None else _said(row.get("answers"), "answers")


def _said(value: Any, column: str) -> str | None:
    """The text of a value, of several that of the most frequent one; None if it is missing or blank.

    Raises:
        ValueError: if a value is a mapping, a list within a list, or bytes.
    """
    if isinstance(value, list | tuple):
        each = (entry["answer"] if isinstance(entry, dict) and "answer" in entry else entry for entry in value)
        said = [text for text in (_value_text(entry, column) for entry in each) if text is not None]
        return Counter(said).most_common(1)[0][0] if said else None
    return _value_text(value, column)


def _value_text(value: Any, column: str) -> str | None:
    if isinstance(value, dict | list | tuple | bytes):
        raise ValueError(f"{column} holds a {type(value).__name__}, but must be a text or number, or a list of these")
    if value is None or value != value or not str(value).strip():  # NaN: a number that is missing
        return None
    return str(value)


def with_whole_numbers(rows: Sequence[Row]) -> list[Row]:
    """Rows with integers in columns whose numbers are whole ones all, or missing, such as 3 for 3.0.

    Tables have no missing integers, so those that write them make such a column one of floats.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    found = {column: [row.get(column) for row in rows if row.get(column) is not None] for column in columns}
    whole = {
        column
        for column, values in found.items()
        if all(isinstance(value, float) and (value != value or value.is_integer()) for value in values)
    }
    return [{k: int(v) if k in whole and v is not None and v == v else v for k, v in row.items()} for row in rows]


def _role(turn: Row) -> str:
    name = turn["role"] if turn.get("role") is not None else turn["from"]
    for role, names in ROLES.items():
        if str(name).lower() in names:
            return role
    allowed = ", ".join(name for names in ROLES.values() for name in names)
    raise ValueError(f"a turn is by '{name}', but must be by one of: {allowed}")


def _content(turn: Row, inline: list[Any]) -> str:
    """The text of a turn, with marks where pictures stand; those that stand in the turn itself go to `inline`."""
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, str):
        return content
    pieces = []
    for part in content or ():
        if part.get("type") == "text":
            pieces.append(part.get("text") or "")
        elif part.get("type") in ("image", "image_url"):
            pieces.append(IMAGE_MARK)
            inline.extend(_inline_pictures(part))
        elif part.get("type") == "video":
            pieces.append(VIDEO_MARK)
        else:
            raise ValueError(f"a part of a turn is of type '{part.get('type')}', but must be text, image or video")
    return "".join(pieces)


def _inline_pictures(part: Row) -> Iterable[Any]:
    for key in ("image", "image_url", "url", "path", "base64"):
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return [value]
    return []


def _conversation(texts: list[tuple[str, str]], options: RowOptions, images: Any, video: Any) -> RowContent:
    """The content of a conversation: its last question or its first, and what was said before and after.

    Raises:
        ValueError: if user and assistant do not take turns.
    """
    system = [turn for turn in texts[:1] if turn[0] == "system"]
    spoken = texts[len(system) :]
    roles = [role for role, _ in spoken]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        listing = ", ".join(role for role, _ in texts)
        raise ValueError(f"its turns are by {listing or 'no one'}, but user and assistant must take turns")
    if options.turns == "first":
        images = _of_first_turns(spoken, images)
        spoken = spoken[:2]
    if len(as_list(images)) == 1:
        spoken = _picture_first(spoken)
    answer = spoken.pop()[1] if spoken[-1][0] == "assistant" else None
    *earlier, (_, prompt) = spoken
    return RowContent(prompt.strip(), _stripped(answer), images, video, (*system, *earlier))


def _picture_first(spoken: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turns whose only picture stands before the text of its turn, as LLaVA does it: no mark is needed in the first."""
    found = []
    for i, (role, text) in enumerate(spoken):
        if text.count(IMAGE_MARK) == 1:
            text = text.replace(IMAGE_MARK, "").strip()
            text = text if i == 0 else f"{IMAGE_MARK}\n{text}"
        found.append((role, text))
    return found


def _stripped(answer: str | None) -> str | None:
    return None if answer is None else answer.strip()


def _of_first_turns(spoken: list[tuple[str, str]], images: Any) -> Any:
    """Of pictures that have marks in the text, those of the first question and its answer."""
    return as_list(images)[: _count(spoken[:2], IMAGE_MARK)] if _count(spoken, IMAGE_MARK) else images


def _count(texts: list[tuple[str, str]], mark: str) -> int:
    return sum(text.count(mark) for _, text in texts)


def _with_video_marks(content: RowContent) -> RowContent:
    """Of a conversation on a video whose place has the mark of a picture, as LLaVA's data have it."""
    earlier = tuple((role, text.replace(IMAGE_MARK, VIDEO_MARK)) for role, text in content.earlier)
    prompt = content.prompt.replace(IMAGE_MARK, VIDEO_MARK)
    return RowContent(prompt, content.answer, content.images, content.video, earlier)
