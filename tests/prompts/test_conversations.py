"""Chat files in the usual forms become one kind of conversation; faults name line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankonce.errors import DataError
from rankonce.prompts.conversations import (
    Conversation,
    Turn,
    count_conversations,
    parse_conversation,
    read_conversations,
)

ASKED = (Turn(role="user", content="Name a colour."), Turn(role="assistant", content="Blue."))


def messages(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


@pytest.mark.parametrize(
    "data",
    [
        messages(("user", "Name a colour."), ("assistant", "Blue.")),
        messages(("user", [{"type": "text", "text": "Name a colour."}]), ("assistant", "Blue.")),
        {**messages(("user", "Name a colour."), ("assistant", "Blue."), tool_calls=None), "id": 7},
        {
            "conversations": [
                {"from": "human", "value": "Name a colour."},
                {"from": "gpt", "value": "Blue."},
            ]
        },
        {"instruction": "Name a colour.", "input": "", "output": "Blue.", "source": "by hand"},
    ],
)
def test_the_usual_forms_are_one_conversation(data: dict[str, Any]) -> None:
    assert parse_conversation(json.dumps(data)).turns == ASKED


def test_the_system_comes_first_in_every_form() -> None:
    system = Turn(role="system", content="Be brief.")
    pairs = [("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Blue.")]
    forms = [
        messages(*pairs),
        {"conversations": [{"from": role, "value": text} for role, text in pairs]},
        {"system": "Be brief.", "instruction": "Name a colour.", "output": "Blue."},
    ]
    for form in forms:
        assert parse_conversation(json.dumps(form)).turns == (system, *ASKED)


def test_an_input_stands_below_its_instruction() -> None:
    line = json.dumps({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    assert parse_conversation(line).turns[0].content == "Add.\n2 and 3"


def test_a_conversation_survives_being_written_and_read() -> None:
    first = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    first["messages"][1]["weight"] = 0
    conversation = parse_conversation(json.dumps(first))
    assert [turn.is_learnt for turn in conversation.turns] == [True, False, True, True]
    assert parse_conversation(json.dumps(conversation.as_json())) == conversation


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("{", "is not JSON"),
        ([], "one of the fields messages, conversations, instruction"),
        ({"text": "Blue."}, "one of the fields messages, conversations, instruction"),
        (messages(("bot", "Hi")), r"messages\[0\]\.role"),
        (messages(("user", 7)), r"messages\[0\]\.content"),
        (messages(("user", "a"), ("assistant", "b"), name="x"), r"messages\[0\]\.name: unknown"),
        (messages(("user", "a"), ("assistant", "b"), weight=2), r"messages\[0\]\.weight"),
        (messages(("user", "a"), ("assistant", "b"), weight=0), "nothing to learn"),
        (messages(("user", "a")), "should end with an answer"),
        (messages(("assistant", "a")), r"turns\[0\]\.role: should be user"),
        (messages(("user", "a"), ("user", "b")), r"turns\[1\]\.role: should be assistant"),
        (messages(("user", "a"), ("assistant", " ")), r"turns\[1\]\.content: .* is empty"),
        (messages(("user", "a"), ("system", "b")), r"turns\[1\]\.role: should be assistant"),
        (messages(), "should end with an answer"),
        ({"conversations": [{"from": "them", "value": "a"}]}, r"conversations\[0\]\.from"),
        ({"instruction": "a"}, "output: Field required"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ],
)
def test_a_fault_names_its_line_and_field(tmp_path: Path, data: Any, fault: str) -> None:
    path = tmp_path / "chat.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"})
    line = data if isinstance(data, str) else json.dumps(data)
    path.write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"chat\.jsonl: line 3: .*{fault}"):
        list(read_conversations([path]))


def test_files_are_read_one_after_the_other_from_any_place(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for place, path in enumerate(paths):
        lines = [json.dumps({"instruction": f"{place}{n}", "output": "x"}) for n in range(3)]
        path.write_text("\n\n".join(lines) + "\n")
    asked = [one.turns[0].content for one in read_conversations(paths, skip=2)]
    assert asked == ["02", "10", "11", "12"]
    assert count_conversations(paths) == 6


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"chat\.jsonl: cannot be read"):
        list(read_conversations([tmp_path / "chat.jsonl"]))


def test_the_first_questions_keep_the_system() -> None:
    turns = (Turn(role="system", content="Be brief."), *ASKED, *ASKED)
    conversation = Conversation(turns=turns)
    assert conversation.num_questions == 2
    assert conversation.first_questions(1).turns == turns[:3]
