import json
from pathlib import Path

from rankonce.serving.batches.lines import check_lines, read_body
from tests.serving.batches.conftest import line


def test_lines_are_found_again_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    bodies = [{"query": "häßlich"}, {"n": 1.5}, {"items": ["a\nb"]}]
    texts = [
        json.dumps(line(f"ü{n}", "/v1/rank", body), ensure_ascii=False)
        for n, body in enumerate(bodies)
    ]
    # Line ends of both kinds, a blank line, and none at the end.
    path.write_bytes(f"{texts[0]}\r\n \n{texts[1]}\n{texts[2]}".encode())
    lines, faults = check_lines(path, endpoint="/v1/rank", max_lines=3, max_line_bytes=1000)
    assert faults == []
    assert [(found.number, found.custom_id) for found in lines] == [(1, "ü0"), (3, "ü1"), (4, "ü2")]
    with path.open("rb") as file:
        assert [read_body(file, found) for found in lines] == bodies


def test_a_line_has_at_most_the_bytes_of_a_question(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    text = json.dumps(line("a", "/v1/rank", {"query": "M" * 900}))
    path.write_text(f"{text}\n")
    _, faults = check_lines(path, endpoint="/v1/rank", max_lines=9, max_line_bytes=len(text) + 1)
    assert faults == []
    _, faults = check_lines(path, endpoint="/v1/rank", max_lines=9, max_line_bytes=len(text))
    assert [(fault.code, fault.line) for fault in faults] == [("line_too_large", 1)]


def test_the_first_faults_are_told_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("{\n" * 250)
    _, faults = check_lines(path, endpoint="/v1/rank", max_lines=250, max_line_bytes=99)
    assert [fault.line for fault in faults] == [*range(1, 101), None]
    assert faults[-1].message == "and 150 more lines with faults"


def test_no_json_of_a_line_stops_the_check(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    contents = [b"[" * 5000, b"\xff\xfe", b'{"body": NaN}', b'"\\ud800"', b"\x00", b"1" * 5000]
    path.write_bytes(b"\n".join(contents))
    lines, faults = check_lines(path, endpoint="/v1/rank", max_lines=9, max_line_bytes=9999)
    assert lines == []
    assert [fault.code for fault in faults] == ["invalid_json_line"] * 6
