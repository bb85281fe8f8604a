"""Tables of prompts: every format in and out, what is carried along, bad rows, and resuming."""

import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance.corpus import DataWarning
from lance.errors import DataError
from lance.tables import CHUNK, TableWriter, count_rows, iter_table, read_table

AWKWARD = ["plain", "a, comma", 'a "quote"', "two\nlines", "ünïcödé ☕ שלום", " spaces ", "NA", "null", "12", "1.50", "=1+1", "tab\there"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# ------------------------------------------------------------------- in


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_prompts_and_other_columns_come_as_they_are(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"in{ending}"
    frame = pd.DataFrame({"note": AWKWARD[::-1], "prompt": AWKWARD})
    if ending == ".csv":
        frame.to_csv(path, index=False)
    elif ending == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    rows = read_table(str(path))
    assert [r["prompt"] for r in rows] == AWKWARD
    assert [r["note"] for r in rows] == AWKWARD[::-1]


def test_values_keep_their_type_where_the_format_has_types(tmp_path: Path) -> None:
    row = {"prompt": "x", "n": 3, "share": 0.5, "flag": True, "none": None, "list": [1, {"a": 2}]}
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_table(str(path)) == [row]
    pd.DataFrame([{"prompt": "x", "n": 3, "share": 0.5}]).to_parquet(tmp_path / "in.parquet")
    assert read_table(str(tmp_path / "in.parquet")) == [{"prompt": "x", "n": 3, "share": 0.5}]


def test_a_csv_column_is_carried_digit_for_digit(tmp_path: Path) -> None:
    """A CSV file has no types: leading zeros, trailing zeros and long numbers are part of what it holds."""
    path = tmp_path / "in.csv"
    path.write_text("id,price,code,prompt\n007,1.50,12345678901234567890123,x\n010,2.00,1e5,y\n", encoding="utf-8")
    rows = read_table(str(path))
    assert [(str(r["id"]), str(r["price"]), str(r["code"])) for r in rows] == [("007", "1.50", "12345678901234567890123"), ("010", "2.00", "1e5")]


def test_prompts_of_a_csv_that_look_like_numbers_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("prompt\n12\n007\n", encoding="utf-8")
    assert [r["prompt"] for r in read_table(str(path))] == ["12", "007"]


def test_text_files_hold_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("first\r\n\n  \nsecond, with ü\nthird\u2028still third\nfourth".encode())
    assert read_table(str(path)) == [{"prompt": t} for t in ("first", "second, with ü", "third\u2028still third", "fourth")]


def test_standard_input_is_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b'{"prompt": "one", "n": 1}\n{"prompt": "two"}\n')
    assert read_table("-") == [{"prompt": "one", "n": 1}, {"prompt": "two"}]


def test_rows_come_before_the_rest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[bytes]:
        yield b'{"note": "no prompt"}\n'
        yield b'{"prompt": "one"}\n'
        yield b'{"prompt": "two"}\n'
        raise AssertionError("read too far")

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines()))
    with pytest.warns(DataWarning, match="line 1"):
        rows = iter_table("-")
        assert [next(rows)["prompt"], next(rows)["prompt"]] == ["one", "two"]
    with pytest.raises(AssertionError, match="too far"):
        next(rows)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".txt"])
def test_a_table_longer_than_a_block_is_read_in_order(tmp_path: Path, ending: str) -> None:
    path, texts = tmp_path / f"long{ending}", [f"prompt {i}" for i in range(2 * CHUNK + 7)]
    if ending == ".txt":
        path.write_text("\n".join(texts))
    else:
        writer = TableWriter(str(path))
        writer.write({"prompt": t} for t in texts)
        writer.close()
    assert [r["prompt"] for r in iter_table(str(path))] == texts
    assert count_rows(str(path)) == (None if ending == ".csv" else len(texts))


def test_bad_rows_of_standard_input_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader cannot find the line in a temporary file that is gone."""
    standard_input(monkeypatch, b'{"prompt": "one"}\nnonsense\n{"prompt": 2}\n')
    with pytest.warns(DataWarning) as caught:
        assert read_table("-") == [{"prompt": "one"}]
    assert [str(w.message).split(": left out")[0] for w in caught] == ["standard input, line 2", "standard input, line 3"]


@pytest.mark.parametrize("ending", [".csv", ".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, ending: str) -> None:
    body = {".csv": "prompt\nfirst\nsecond\n", ".txt": "first\nsecond\n", ".jsonl": '{"prompt": "first"}\n{"prompt": "second"}\n'}[ending]
    path = tmp_path / f"windows{ending}"
    path.write_text(body, encoding="utf-8-sig")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert [r["prompt"] for r in read_table(str(path))] == ["first", "second"]


@pytest.mark.parametrize(
    ("ending", "content", "reported", "kept"),
    [
        (".jsonl", b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\n{"prompt": 3}\n{"text": "x"}\nno\n{"prompt": "two"}', [2, 3, 4, 5], ["one", "two"]),
        (".txt", b"one\ncaf\xe9\ntwo", [2], ["one", "two"]),
    ],
)
def test_bad_rows_are_reported_by_line_and_the_rest_is_kept(tmp_path: Path, ending: str, content: bytes, reported: list[int], kept: list[str]) -> None:
    path = tmp_path / f"in{ending}"
    path.write_bytes(content)
    with pytest.warns(DataWarning) as caught:
        rows = read_table(str(path))
    assert [r["prompt"] for r in rows] == kept
    assert sorted(str(w.message).split(": left out")[0] for w in caught) == [f"{path}, line {n}" for n in sorted(reported)]


def test_a_missing_prompt_in_a_table_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pd.DataFrame({"prompt": ["one", None, "three"]}).to_parquet(path)
    with pytest.warns(DataWarning, match="line 2: left out"):
        assert [r["prompt"] for r in read_table(str(path))] == ["one", "three"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_without_the_column_names_those_it_has(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"in{ending}"
    frame = pd.DataFrame({"question": ["x"], "answer": ["y"]})
    {
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".parquet": lambda: frame.to_parquet(path),
    }[ending]()
    with pytest.raises(DataError, match=r"in\.\w+' has no column 'prompt'; its columns are question, answer\. Rename"):
        read_table(str(path))


def test_inputs_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'prompts\.xlsx'; expected one of \.jsonl, \.csv, \.parquet, \.txt, or -"):
        read_table("prompts.xlsx")
    with pytest.raises(DataError, match="no file .*nowhere"):
        read_table(str(tmp_path / "nowhere.csv"))
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"prompt\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.csv' is not UTF-8.*save it as UTF-8"):
        read_table(str(latin))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 or so")
    with pytest.raises(DataError, match=r"cannot read '.*broken\.parquet' as parquet"):
        read_table(str(broken))
    with pytest.raises(DataError, match=r"empty\.csv"):
        (tmp_path / "empty.csv").touch()
        read_table(str(tmp_path / "empty.csv"))


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_an_empty_file_has_no_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"empty{ending}"
    path.touch()
    assert read_table(str(path)) == []


# ------------------------------------------------------------------- out

ROWS: list[dict[str, Any]] = [
    {"prompt": p, "risk": i / 8, "n": i, "categories": {"safety": 0.25, "benign": 0.75}, "list": [{"a": i}]} for i, p in enumerate(AWKWARD)
]


def test_jsonl_is_written_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = TableWriter(str(path))
    writer.write(ROWS[:2])
    assert read_lines(path) == ROWS[:2], "what is done is on disk before the rest is"
    writer.write(ROWS[2:])
    writer.close()
    assert read_lines(path) == ROWS


def test_csv_holds_nested_values_as_json(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    writer = TableWriter(str(path))
    writer.write(ROWS)
    writer.close()
    found = pd.read_csv(path, keep_default_na=False, dtype={"prompt": str})
    assert found["prompt"].tolist() == AWKWARD
    assert found["risk"].tolist() == [r["risk"] for r in ROWS]
    assert [json.loads(v) for v in found["categories"]] == [r["categories"] for r in ROWS]
    assert [json.loads(v) for v in found["list"]] == [r["list"] for r in ROWS]


def test_parquet_keeps_nested_values(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    writer = TableWriter(str(path))
    writer.write(ROWS)
    writer.close()
    found = pd.read_parquet(path)
    assert found["prompt"].tolist() == AWKWARD
    assert found["categories"].tolist() == [r["categories"] for r in ROWS]
    assert found["n"].tolist() == list(range(len(ROWS)))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("again", [".jsonl", ".csv", ".parquet"])
def test_an_output_can_be_read_as_input(tmp_path: Path, ending: str, again: str) -> None:
    """From any format to any other and on: the prompts stay the same, and so do numbers and texts of other columns."""
    rows = [{"prompt": p, "topic": "tea", "risk": 0.125 * i} for i, p in enumerate(AWKWARD)]
    for name in (f"one{ending}", f"two{again}"):
        writer = TableWriter(str(tmp_path / name))
        writer.write(rows)
        writer.close()
        rows = read_table(str(tmp_path / name))
    assert [r["prompt"] for r in rows] == AWKWARD
    assert {r["topic"] for r in rows} == {"tea"}
    assert [float(r["risk"]) for r in rows] == [0.125 * i for i in range(len(AWKWARD))]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_odd_texts_numbers_and_names_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    rows = [{"": i, "prompt": t, "id": 2**53 + i if i else None} for i, t in enumerate(["a lone\rreturn", "both\r\nkinds", " ", '"', "#"])]
    writer = TableWriter(str(path))
    for row in rows:
        writer.write([row])
    writer.close()
    found = read_table(str(path))
    assert [r["prompt"] for r in found] == [r["prompt"] for r in rows]
    assert [int(r[""]) for r in found] == list(range(5))
    assert [int(r["id"]) if r["id"] else None for r in found] == [r["id"] for r in rows]


def test_a_row_of_a_csv_with_too_many_fields_is_reported_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('prompt,n\n"two\nlines",1\nhello, friend,2\n\nlast,3\n', encoding="utf-8")
    with pytest.warns(DataWarning, match="line 4: left out .3 fields, expected 2; put quotes around"):
        assert read_table(str(path)) == [{"prompt": "two\nlines", "n": "1"}, {"prompt": "last", "n": "3"}]


def test_columns_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("prompt,x,x\na,1,2\n", encoding="utf-8")
    assert read_table(str(path)) == [{"prompt": "a", "x": "1", "x.1": "2"}]


def test_many_blocks_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance.tables.BLOCK", 3)
    for ending in (".csv", ".parquet"):
        path = tmp_path / f"out{ending}"
        writer = TableWriter(str(path))
        for i in range(10):
            writer.write([{"prompt": f"prompt {i}", "n": i} | ({"late": "x"} if i > 7 else {})])
        writer.close()
        found = read_table(str(path))
        assert [(r["prompt"], int(r["n"]), r["late"] or None) for r in found] == [(f"prompt {i}", i, "x" if i > 7 else None) for i in range(10)]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_rows_written_in_parts_may_differ_in_their_columns(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    writer = TableWriter(str(path))
    writer.write([{"prompt": "a, b", "n": 1, "note": None}])
    assert not path.exists(), "an old file stays as it is until all is there"
    writer.write([{"prompt": "two\nlines", "n": 2.5, "note": "late", "more": "x"}])
    writer.write([{"more": "y", "prompt": "c"}])
    writer.close()
    found = read_table(str(path))
    assert [r["prompt"] for r in found] == ["a, b", "two\nlines", "c"]
    assert [r["note"] or None for r in found] == [None, "late", None]
    assert [r["more"] or None for r in found] == [None, "x", "y"]
    assert [float(r["n"]) for r in found[:2]] == [1, 2.5]


def test_columns_of_mixed_kinds_that_parquet_cannot_hold_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": "two"}]
    target = str(tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"cannot write .*out\.parquet.*; \.jsonl holds"):
        write_all(target, mixed)
    monkeypatch.setattr("lance.tables.BLOCK", 1)
    with pytest.raises(DataError, match=r"cannot write .*out\.parquet.*; all rows are in .*out\.rescued\.jsonl"):
        write_all(target, mixed)
    assert read_lines(tmp_path / "out.rescued.jsonl") == mixed


def write_all(target: str, rows: list[dict[str, Any]]) -> None:
    writer = TableWriter(target)
    for row in rows:
        writer.write([row])
    writer.close()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_no_rows_still_make_a_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    TableWriter(str(path)).close()
    assert path.is_file()


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_lone_surrogate_does_not_break_the_output(tmp_path: Path, ending: str) -> None:
    """Half of an emoji is valid in JSON (as an escape) and in no encoding; the output must be readable all the same."""
    source, target = tmp_path / "in.jsonl", tmp_path / f"out{ending}"
    source.write_text('{"prompt": "half \\ud83d an emoji"}\n{"prompt": "plain"}\n', encoding="utf-8")
    writer = TableWriter(str(target))
    writer.write(read_table(str(source)))
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        found = [r["prompt"] for r in read_table(str(target))]
    assert found[1] == "plain"
    assert found[0].startswith("half ") and found[0].endswith(" an emoji")


def test_numpy_values_become_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    TableWriter(str(path)).write([{"prompt": "x", "n": np.int64(3), "f": np.float32(0.5), "v": np.arange(2), "when": pd.Timestamp("2024-05-01")}])
    assert read_lines(path) == [{"prompt": "x", "n": 3, "f": 0.5, "v": [0, 1], "when": "2024-05-01 00:00:00"}]


def test_missing_values_become_null(tmp_path: Path) -> None:
    """A gap in a column of numbers is NaN to pandas, and NaN is no JSON."""
    pd.DataFrame({"prompt": ["x", "y"], "share": [0.5, None], "topic": ["tea", None]}).to_parquet(tmp_path / "in.parquet")
    writer = TableWriter(str(tmp_path / "out.jsonl"))
    writer.write(read_table(str(tmp_path / "in.parquet")))
    writer.close()
    assert "NaN" not in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert [(r["share"], r["topic"]) for r in read_lines(tmp_path / "out.jsonl")] == [(0.5, "tea"), (None, None)]


def test_standard_output_is_jsonl(capsys: pytest.CaptureFixture[str]) -> None:
    writer = TableWriter("-")
    writer.write(ROWS[:2])
    writer.close()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == ROWS[:2]


def test_outputs_that_cannot_be_written_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'scores\.txt'; expected \.jsonl, \.csv or \.parquet, or -"):
        TableWriter("scores.txt")
    with pytest.raises(DataError, match="no folder .*nowhere.* create it first"):
        TableWriter(str(tmp_path / "nowhere" / "out.jsonl"))
    with pytest.raises(DataError, match=r"only \.jsonl output can be resumed.*\.csv"):
        TableWriter(str(tmp_path / "out.csv"), resume=True)


# ------------------------------------------------------------------- resuming


def test_resuming_keeps_whole_rows_and_cuts_off_a_half_written_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = TableWriter(str(path))
    writer.write(ROWS[:3])
    with path.open("ab") as f:
        f.write(json.dumps(ROWS[3]).encode()[:20])
    writer = TableWriter(str(path), resume=True)
    assert writer.done == 3
    writer.write(ROWS[3:])
    assert read_lines(path) == ROWS


def test_without_resume_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    TableWriter(str(path)).write(ROWS)
    writer = TableWriter(str(path))
    assert writer.done == 0
    writer.write(ROWS[:1])
    assert read_lines(path) == ROWS[:1]


def test_resuming_without_a_file_starts_at_the_first_row(tmp_path: Path) -> None:
    writer = TableWriter(str(tmp_path / "out.jsonl"), resume=True)
    writer.write(ROWS[:1])
    assert (writer.done, read_lines(tmp_path / "out.jsonl")) == (0, ROWS[:1])


@given(st.integers(0, 3), st.integers(0, 200))
def test_a_file_cut_at_any_byte_can_be_resumed(tmp_path_factory: pytest.TempPathFactory, rows: int, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    TableWriter(str(path)).write(ROWS[: rows + 1])
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    writer = TableWriter(str(path), resume=True)
    assert 0 <= writer.done <= rows + 1
    writer.write(ROWS[writer.done : rows + 1])
    assert path.read_bytes() == whole
