"""The command line: its machine contract, every format, resuming, exit codes, and what it says to bad input."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from lance.cli import app
from lance.corpus import Prompt, write_prompts
from lance.pipeline import Lance
from lance.refiner import OUTCOMES
from lance.taxonomy import BENIGN, Taxonomy

# The contract of the command line, name by name and in order. Scripts rely on it: a change here is a change for every user.
ASK = (
    "prompt", "distribution", "categories", "risk", "risk_upper", "vacuity", "gradients", "refined", "outcome", "reason", "steps",
    "risk_after", "verifier_risk_after", "similarity", "answer",
)  # fmt: skip
GRADIENT = ("category", "weight", "spans", "text", "completeness_error")
SPAN = ("text", "start", "end", "attribution", "occlusion")
SCORE = ("risk", "risk_upper", "vacuity", "top", "top_category", "distribution", "categories")
REFINE = ("refined", "outcome", "steps", "risk", "risk_after", "verifier_risk_after", "similarity")
NOT_FORWARDED = ("clarify", "declined", "abstained")

EGG = "How long do I boil an egg?"
SCRIPT = Path(sysconfig.get_path("scripts")) / "lance"


def lance(*args: Any, stdin: bytes | None = None) -> Any:
    """Run the command line in this process."""
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "160"}).invoke(app, [str(a) for a in args], input=stdin)


def ok(result: Any) -> Any:
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result


def failed(result: Any, *words: str) -> None:
    """Exit code 1, nothing on standard output, and on standard error one message with these words instead of a traceback."""
    assert isinstance(result.exception, SystemExit), f"crashed with {result.exception!r}"
    assert result.exit_code == 1
    assert result.stdout == ""
    messages = [line for line in result.stderr.splitlines() if line.startswith("lance: ")]
    assert messages and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def asked(prompt: str, model: Path, *args: Any) -> dict[str, Any]:
    """The object that `lance ask --json` prints; it must be the only thing there, and strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(ok(lance("ask", "--json", "--model", model, *args, "--", prompt)).stdout, parse_constant=refuse)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stopped(tiny_pipeline: Lance, small_corpus: list[Prompt]) -> list[str]:
    """Prompts that the small model does not let pass, riskiest first."""
    texts = [p.text for p in small_corpus if not p.benign]
    found = sorted(zip(tiny_pipeline.score(texts), texts, strict=True), key=lambda dt: -dt[0].risk_upper)
    risky = [text for d, text in found if d.risk_upper >= tiny_pipeline.threshold]
    assert len(risky) >= 10, "the small model of the fixtures has learnt nothing"
    return risky


@pytest.fixture(scope="module")
def passing(tiny_pipeline: Lance, small_corpus: list[Prompt]) -> list[str]:
    """Benign prompts that the small model lets pass."""
    texts = [p.text for p in small_corpus if p.benign]
    return [text for d, text in zip(tiny_pipeline.score(texts), texts, strict=True) if d.risk_upper < tiny_pipeline.threshold]


# ------------------------------------------------------------------- ask


def test_ask_json_keeps_the_contract(stopped: list[str], passing: list[str], tiny_folder: Path, taxonomy: Taxonomy) -> None:
    found = [asked(p, tiny_folder) for p in (stopped[0], stopped[3], passing[0], "")]
    for prompt, d in zip((stopped[0], stopped[3], passing[0], ""), found, strict=True):
        assert tuple(d) == ASK
        assert d["prompt"] == prompt
        assert tuple(d["distribution"]) == taxonomy.keys
        assert tuple(d["categories"]) == taxonomy.category_keys
        assert sum(d["distribution"].values()) == pytest.approx(1, abs=1e-6)
        for i, key in enumerate(taxonomy.category_keys):
            of_category = sum(d["distribution"][k] for k, g in zip(taxonomy.keys, taxonomy.groups(), strict=True) if g == i)
            assert d["categories"][key] == pytest.approx(of_category, abs=1e-6)
        assert d["risk"] == pytest.approx(1 - d["distribution"][BENIGN], abs=1e-6)
        for key in ("risk", "risk_upper", "vacuity", "risk_after", "verifier_risk_after"):
            assert 0 <= d[key] <= 1, key
        assert -1 <= d["similarity"] <= 1 + 1e-6
        assert d["outcome"] in OUTCOMES
        assert (d["refined"] is None) == (d["outcome"] in NOT_FORWARDED)
        assert isinstance(d["steps"], list) and d["answer"].strip()
        for g in d["gradients"]:
            assert tuple(g) == GRADIENT
            assert g["category"] in taxonomy.keys[1:] and 0 < g["weight"] <= 1 and g["text"].strip()
            for s in g["spans"]:
                assert tuple(s) == SPAN
                assert prompt[s["start"] : s["end"]] == s["text"] != ""
                assert s["attribution"] > 0 and s["occlusion"] > 0
    assert found[0]["gradients"] and found[1]["gradients"], "what does not pass has a gradient"
    assert not found[2]["gradients"]


def test_ask_says_the_same_as_the_library(stopped: list[str], tiny_folder: Path, tiny_pipeline: Lance) -> None:
    d, reply = asked(stopped[1], tiny_folder), tiny_pipeline.respond(stopped[1])
    assert d["distribution"] == pytest.approx(reply.refinement.before.mean, abs=1e-5)
    assert (d["outcome"], d["refined"], d["answer"]) == (reply.refinement.outcome, reply.refinement.refined, reply.text)
    assert len(d["steps"]) == len(reply.refinement.steps)


def test_ask_gives_the_same_answer_twice(stopped: list[str], tiny_folder: Path) -> None:
    assert asked(stopped[2], tiny_folder, "--seed", 3) == asked(stopped[2], tiny_folder, "--seed", 3)


def test_a_prompt_that_passes_comes_back_byte_for_byte(tiny_folder: Path, passing: list[str]) -> None:
    for prompt in (passing[0], f"  {passing[1]}\n", passing[2].replace(" ", "\u00a0", 1)):
        d = asked(prompt, tiny_folder)
        if d["outcome"] == "unchanged":
            assert d["refined"] == prompt
            assert (d["steps"], d["risk_after"], d["similarity"]) == ([], d["risk"], 1)
    assert asked(passing[0], tiny_folder)["outcome"] == "unchanged"


def test_ask_for_a_person(stopped: list[str], tiny_folder: Path, tiny_pipeline: Lance) -> None:
    refinement = next(r for r in map(tiny_pipeline.refine, stopped) if r.outcome == "refined")
    out = ok(lance("ask", "--model", tiny_folder, refinement.prompt)).stdout
    flat = " ".join(out.split())
    assert "█" in out, "the distribution as bars"
    top = tiny_pipeline.taxonomy[max(refinement.before.mean, key=lambda k: refinement.before.mean[k])].name
    assert top in out
    assert re.search(r"risk\s+0\.\d\d, 90 % interval 0\.\d\d to [01]\.\d\d", out)
    for g in refinement.gradient.gradients:
        assert g.name in out
        assert all(f"“{' '.join(s.text.split())}”" in flat for s in g.spans)
    for word in ("outcome", "refined", "after", "answer", "verifier"):
        assert re.search(rf"^.*\b{word}\b", out, re.MULTILINE), word
    assert " ".join(str(refinement.refined).split()) in flat


def test_ask_shows_no_control_characters(tiny_folder: Path) -> None:
    """A prompt is other people's text: it must not be able to steer the terminal that it is shown on."""
    out = ok(lance("ask", "--model", tiny_folder, "How long do I \x1b[2J\x1b]0;owned\x07boil an egg?")).stdout
    assert "\x1b" not in out and "\x07" not in out
    assert "boil an egg?" in out


# ------------------------------------------------------------------- score and refine on tables


def table(path: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Write an input table by its ending; all but .txt have two more columns."""
    rows: list[dict[str, Any]] = [{"id": f"row-{i}", "prompt": t, "weight": i / 4} for i, t in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
        return [{"prompt": t} for t in texts]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return rows


def results(path: Path) -> list[dict[str, Any]]:
    """Read an output table, with nested columns as data."""
    if path.suffix == ".jsonl":
        return read_lines(path)
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_dict("records")
    rows = pd.read_csv(path).to_dict("records")
    return [{k: json.loads(v) if k in ("distribution", "categories", "steps") else v for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("source", "target"), [("in.jsonl", "out.parquet"), ("in.csv", "out.jsonl"), ("in.parquet", "out.csv"), ("in.txt", "out.jsonl"), ("in.csv", "out.csv")]
)
def test_score_reads_and_writes_every_format(
    tmp_path: Path, tiny_folder: Path, tiny_pipeline: Lance, taxonomy: Taxonomy, stopped: list[str], passing: list[str], source: str, target: str
) -> None:
    texts = [stopped[0], passing[0], 'with "quotes", commas, and ünïcödé ☕ in it', stopped[1]]
    rows = table(tmp_path / source, texts)
    result = ok(lance("score", tmp_path / source, "-o", tmp_path / target, "--model", tiny_folder))
    assert result.stdout == result.stderr == "", "no progress bar where there is no terminal"
    found = results(tmp_path / target)
    assert len(found) == len(rows)
    for given, row, expected in zip(rows, found, tiny_pipeline.score(texts), strict=True):
        assert tuple(row) == (*given, *SCORE)
        assert {k: str(row[k]) for k in given} == {k: str(v) for k, v in given.items()}, "other columns are carried through (those of a .csv as text)"
        assert row["risk"] == pytest.approx(expected.risk, abs=1e-5)
        assert row["risk_upper"] == pytest.approx(expected.risk_upper, abs=1e-5)
        assert row["vacuity"] == pytest.approx(expected.vacuity, abs=1e-5)
        assert row["distribution"] == pytest.approx(expected.mean, abs=1e-5)
        assert tuple(row["distribution"]) == taxonomy.keys and tuple(row["categories"]) == taxonomy.category_keys
        assert row["top"] == max(row["distribution"], key=row["distribution"].__getitem__)
        assert row["top_category"] == max(row["categories"], key=row["categories"].__getitem__)


@pytest.mark.parametrize(("source", "target"), [("in.jsonl", "out.jsonl"), ("in.csv", "out.csv"), ("in.txt", "out.parquet")])
def test_refine_reads_and_writes_every_format(
    tmp_path: Path, tiny_folder: Path, tiny_pipeline: Lance, stopped: list[str], passing: list[str], source: str, target: str
) -> None:
    texts = [passing[0], stopped[0], "no", passing[1]]
    rows = table(tmp_path / source, texts)
    ok(lance("refine", tmp_path / source, "-o", tmp_path / target, "--model", tiny_folder))
    found = results(tmp_path / target)
    for given, row, expected in zip(rows, found, tiny_pipeline.refine(texts), strict=True):
        assert tuple(row) == (*given, *REFINE)
        assert {k: str(row[k]) for k in given} == {k: str(v) for k, v in given.items()}
        assert row["outcome"] == expected.outcome
        assert len(row["steps"]) == len(expected.steps)
        assert row["risk"] == pytest.approx(expected.before.risk, abs=1e-5)
        assert row["risk_after"] == pytest.approx(expected.after.risk, abs=1e-5)
        assert (None if pd.isna(row["refined"]) else row["refined"]) == expected.refined
        assert pd.isna(row["refined"]) == (row["outcome"] in NOT_FORWARDED)
    assert [row["outcome"] for row in found][0::3] == ["unchanged", "unchanged"]
    assert found[0]["refined"] == texts[0] and found[3]["refined"] == texts[3]
    assert found[1]["outcome"] != "unchanged" and found[2]["outcome"] == "abstained"


def test_refining_only_what_passes_can_be_written_to_parquet(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    """Every list of steps is empty then, which gives the column no type."""
    table(tmp_path / "in.txt", passing[:2])
    ok(lance("refine", tmp_path / "in.txt", "-o", tmp_path / "out.parquet", "--model", tiny_folder))
    assert [len(row["steps"]) for row in results(tmp_path / "out.parquet")] == [0, 0]


def test_a_column_of_the_same_name_is_replaced(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    """So a scored table can be scored again."""
    table(tmp_path / "in.txt", passing[:3])
    ok(lance("score", tmp_path / "in.txt", "-o", tmp_path / "once.jsonl", "--model", tiny_folder))
    ok(lance("score", tmp_path / "once.jsonl", "-o", tmp_path / "twice.jsonl", "--model", tiny_folder))
    assert (tmp_path / "once.jsonl").read_bytes() == (tmp_path / "twice.jsonl").read_bytes()


def test_a_table_can_be_overwritten_in_place(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    table(path, passing[:3])
    ok(lance("score", path, "-o", path, "--model", tiny_folder))
    assert [row["prompt"] for row in read_lines(path)] == passing[:3]


def test_bad_rows_are_reported_and_the_others_scored(tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "one egg"}\n{"prompt": "caf\xe9"}\n{"prompt": 3}\n{"prompt": "two eggs"}\n')
    result = ok(lance("score", path, "-o", tmp_path / "out.jsonl", "--model", tiny_folder))
    assert [row["prompt"] for row in read_lines(tmp_path / "out.jsonl")] == ["one egg", "two eggs"]
    reports = [line for line in result.stderr.splitlines() if "left out" in line]
    assert [re.search(r"line (\d)", line).group(1) for line in reports] == ["2", "3"]
    assert all(line.startswith(f"lance: {path}, line ") for line in reports)


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_an_empty_table_gives_an_empty_table(tmp_path: Path, tiny_folder: Path, ending: str) -> None:
    (tmp_path / f"in{ending}").touch()
    ok(lance("score", tmp_path / f"in{ending}", "-o", tmp_path / "out.jsonl", "--model", tiny_folder))
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_batch_size_changes_nothing_but_the_pace(tmp_path: Path, tiny_folder: Path, passing: list[str], stopped: list[str]) -> None:
    table(tmp_path / "in.txt", [*passing[:4], *stopped[:3]])
    for size in (1, 64):
        ok(lance("score", tmp_path / "in.txt", "-o", tmp_path / f"{size}.jsonl", "--model", tiny_folder, "--batch-size", size))
    for a, b in zip(read_lines(tmp_path / "1.jsonl"), read_lines(tmp_path / "64.jsonl"), strict=True):
        assert a["prompt"] == b["prompt"]
        assert a["distribution"] == pytest.approx(b["distribution"], abs=1e-4)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_may_be_written_over(tmp_path: Path, tiny_folder: Path, passing: list[str], ending: str) -> None:
    path = tmp_path / f"in{ending}"
    table(path, passing[:3])
    ok(lance("score", path, "-o", path, "--model", tiny_folder))
    ok(lance("score", path, "-o", tmp_path / "again.jsonl", "--model", tiny_folder))
    assert [row["prompt"] for row in read_lines(tmp_path / "again.jsonl")] == passing[:3]
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "again.jsonl"}


def test_a_table_that_is_written_over_cannot_be_resumed_and_survives_a_failure(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    path = tmp_path / "in.jsonl"
    table(path, passing[:2])
    before = path.read_bytes()
    failed(lance("score", path, "-o", path, "--model", tiny_folder, "--resume"), "input and output", "another output")
    failed(lance("score", path, "-o", path, "--model", tmp_path / "nowhere"), "nowhere")
    assert path.read_bytes() == before


def test_numbers_are_plain_json(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    """Values of numpy in carried columns (from parquet) come out as numbers and lists."""
    pd.DataFrame({"prompt": passing[:2], "n": np.array([1, 2], dtype=np.int16), "v": [[1, 2], [3]]}).to_parquet(tmp_path / "in.parquet")
    ok(lance("score", tmp_path / "in.parquet", "-o", tmp_path / "out.jsonl", "--model", tiny_folder))
    assert [(row["n"], row["v"]) for row in read_lines(tmp_path / "out.jsonl")] == [(1, [1, 2]), (2, [3])]


# ------------------------------------------------------------------- resuming


@pytest.mark.parametrize("command", ["score", "refine"])
def test_an_interrupted_run_is_resumed(tmp_path: Path, tiny_folder: Path, passing: list[str], command: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    table(source, passing[:5])
    ok(lance(command, source, "-o", target, "--model", tiny_folder))
    whole = target.read_bytes()
    lines = whole.split(b"\n")
    kept = json.loads(lines[0]) | {"risk": 9.0}  # a mark that only a row that is not computed again can keep
    target.write_bytes(json.dumps(kept).encode() + b"\n" + lines[1] + b"\n" + lines[2][: len(lines[2]) // 2])
    ok(lance(command, source, "-o", target, "--model", tiny_folder, "--resume"))
    found = read_lines(target)
    assert found[0]["risk"] == 9.0
    assert [row["prompt"] for row in found] == passing[:5]
    for row, expected in zip(found[1:], map(json.loads, lines[1:5]), strict=True):
        assert row["outcome" if command == "refine" else "top"] == expected["outcome" if command == "refine" else "top"]
        assert row["risk"] == pytest.approx(expected["risk"], abs=1e-5)
    before = target.read_bytes()
    ok(lance(command, source, "-o", target, "--model", tiny_folder, "--resume"))
    assert target.read_bytes() == before, "a finished run has nothing left to do"


def test_only_jsonl_can_be_resumed(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    table(tmp_path / "in.txt", passing[:1])
    failed(lance("score", tmp_path / "in.txt", "-o", tmp_path / "out.csv", "--model", tiny_folder, "--resume"), "only .jsonl", "out.csv")


def test_a_run_that_fails_leaves_the_last_results_alone(tmp_path: Path, tiny_folder: Path, passing: list[str]) -> None:
    """A mistyped --model must not cost the file that it would have replaced."""
    table(tmp_path / "in.txt", passing[:2])
    target = tmp_path / "out.jsonl"
    ok(lance("score", tmp_path / "in.txt", "-o", target, "--model", tiny_folder))
    before = target.read_bytes()
    failed(lance("score", tmp_path / "in.txt", "-o", target, "--model", tmp_path / "no-such-model"), "no-such-model")
    assert target.read_bytes() == before


# ------------------------------------------------------------------- train and evaluate

OWN = """\
name: teahouse
categories:
  - key: too_hot
    anchor: A complaint that the tea is much too hot to drink.
  - key: too_sweet
    anchor: A complaint that there is far too much sugar in the tea.
"""


def test_train_and_evaluate_with_ones_own_taxonomy(tmp_path: Path) -> None:
    (tmp_path / "teahouse.yml").write_text(OWN, encoding="utf-8")
    texts = {
        "too_hot": "My {} tea is boiling hot and burns my tongue",
        "too_sweet": "My {} tea is all sugar and sticks to my teeth",
        "": "Which {} tea goes well with biscuits?",
    }
    kinds = ["black", "green", "white", "oolong", "mint", "ginger", "jasmine", "nettle", "fennel", "sage", "rooibos", "lemon"]
    rows = [
        Prompt(pattern.format(kind), (label,) if label else (), id=f"{label}-{i}", split=("train", "train", "validation", "test")[i % 4])
        for label, pattern in texts.items()
        for i, kind in enumerate(kinds)
    ]
    write_prompts(rows, tmp_path / "tea.jsonl")
    model = tmp_path / "model"
    result = ok(
        lance(
            "train", tmp_path / "tea.jsonl", "--taxonomy", tmp_path / "teahouse.yml", "--encoder-training", "frozen", "--epochs", 60, "--seed", 5, "-o", model
        )
    )
    assert result.stdout.split() == [str(model)]
    assert len(re.findall(r"^epoch \d+: objective", result.stderr, re.MULTILINE)) == 60
    assert {p.suffix for p in model.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md"}, "nothing that needs a pickle"
    card = (model / "README.md").read_text(encoding="utf-8")
    for fact in ("teahouse", "Seed 5", "60 epochs", "tea.jsonl", "test split: accuracy"):
        assert fact in card

    d = asked("My rose tea is boiling hot and burns my tongue", model)
    assert tuple(d["distribution"]) == (BENIGN, "too_hot", "too_sweet")
    assert max(d["distribution"], key=d["distribution"].__getitem__) == "too_hot"

    figures = json.loads(ok(lance("evaluate", tmp_path / "tea.jsonl", "--model", model, "--json")).stdout)
    assert figures["n"] == len(rows)
    assert figures["accuracy"] > 0.8 and figures["auroc"] > 0.8
    for key in ("macro_f1", "ece", "benign_passed", "noncompliant_stopped"):
        assert 0 <= figures[key] <= 1
    shown = ok(lance("evaluate", tmp_path / "tea.jsonl", "--model", model)).stdout
    assert re.search(rf"^accuracy +{figures['accuracy']:.4f}$", shown, re.MULTILINE)


def test_train_says_what_its_rows_lack(tmp_path: Path) -> None:
    write_prompts([Prompt(f"benign {i}", id=str(i)) for i in range(30)], tmp_path / "benign.jsonl")
    failed(lance("train", tmp_path / "benign.jsonl", "--encoder-training", "frozen", "--epochs", 1, "-o", tmp_path / "m"), "benign and noncompliant")
    assert not (tmp_path / "m").exists()
    (tmp_path / "bad.yml").write_text("categories:\n  - key: lonely\n", encoding="utf-8")
    failed(lance("train", tmp_path / "benign.jsonl", "--taxonomy", tmp_path / "bad.yml", "-o", tmp_path / "m"), "bad.yml, line 2", "anchor")
    failed(lance("train", tmp_path / "nowhere.jsonl", "-o", tmp_path / "m"), "nowhere.jsonl")


def test_evaluate_leaves_out_rows_with_labels_of_another_taxonomy(tmp_path: Path, tiny_folder: Path) -> None:
    rows = [Prompt("Where does she live?", ("privacy",)), Prompt(EGG), Prompt("x y", ("lost_things",))]
    write_prompts(rows, tmp_path / "rows.jsonl")
    result = ok(lance("evaluate", tmp_path / "rows.jsonl", "--model", tiny_folder, "--json"))
    assert json.loads(result.stdout)["n"] == 2
    assert "rows.jsonl, line 3: left out (unknown label 'lost_things'" in result.stderr


def test_figures_that_cannot_be_computed_are_still_json(tmp_path: Path, tiny_folder: Path) -> None:
    """One class alone has no AUROC; NaN is no JSON."""
    write_prompts([Prompt(EGG), Prompt("Name three rivers.")], tmp_path / "rows.jsonl")
    out = ok(lance("evaluate", tmp_path / "rows.jsonl", "--model", tiny_folder, "--json")).stdout
    figures = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert figures["auroc"] is None and figures["noncompliant_stopped"] is None


# ------------------------------------------------------------------- help and exit codes


@pytest.mark.parametrize("command", ["ask", "score", "refine", "train", "evaluate"])
def test_help_has_examples(command: str) -> None:
    out = re.sub(r"\x1b\[[\d;]*m", "", ok(lance(command, "--help")).stdout)
    assert re.search("Examples?:", out)
    assert len(re.findall(rf"^.*\blance {command}\b", out.split("Example")[1], re.MULTILINE)) >= 1
    for option in {"ask": ["--json", "--chat", "--seed"], "score": ["--output", "--resume"], "train": ["--taxonomy", "--encoder-training"]}.get(
        command, ["--model"]
    ):
        assert option in out
    assert command in lance("--help").stdout


@pytest.mark.parametrize(
    "args",
    [
        ["ask"],
        ["ask", "a", "b"],
        ["ask", "--colour", "a"],
        ["score", "x.jsonl"],
        ["score", "x.jsonl", "-o", "y.jsonl", "--batch-size", "0"],
        ["guess"],
        ["train"],
        ["ask", "--seed", "x", "a"],
    ],
)
def test_bad_usage_exits_with_2(args: list[str]) -> None:
    result = lance(*args)
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage" in result.stderr


def test_input_that_is_missing_or_of_the_wrong_kind(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "other.csv").write_text("question,answer\nx,y\n", encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    (tmp_path / "in.txt").write_text(EGG, encoding="utf-8")
    for args, words in (
        (["score", tmp_path / "nowhere.csv", "-o", out], ["nowhere.csv", "path"]),
        (["score", tmp_path / "in.xlsx", "-o", out], ["in.xlsx", ".parquet"]),
        (["score", tmp_path / "other.csv", "-o", out], ["no column 'prompt'", "question, answer"]),
        (["refine", tmp_path / "latin.csv", "-o", out], ["latin.csv", "UTF-8"]),
        (["refine", tmp_path / "in.txt", "-o", tmp_path / "out.txt"], ["out.txt", ".jsonl"]),
        (["score", tmp_path / "in.txt", "-o", tmp_path / "no" / "folder.csv"], ["create it first"]),
        (["evaluate", tmp_path / "nowhere.jsonl"], ["nowhere.jsonl"]),
    ):
        failed(lance(*args, "--model", tiny_folder), *words)


# ------------------------------------------------------------------- prompts of every kind

GERMAN = "Wie lange muss ich ein Ei kochen, damit der Dotter noch weich bleibt und nichts anbrennt?"


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        pytest.param("", "abstained", id="empty"),
        pytest.param(" \t\n\u00a0\u2003", "abstained", id="whitespace"),
        pytest.param("\x00\x01\x1b\x7f\u200b", "abstained", id="control characters alone"),
        pytest.param("egg", "abstained", id="one token"),
        pytest.param("?", "abstained", id="one mark"),
        pytest.param("🥚🔥⏱️🍳", None, id="emoji"),
        pytest.param("How long do I boil an 🥚 for a soft yolk? 🙂", None, id="emoji among words"),
        pytest.param("כמה זמן צריך לבשל ביצה עד שהחלמון יהיה רך?", "abstained", id="right to left"),
        pytest.param("كم من الوقت يستغرق سلق البيضة؟", "abstained", id="Arabic"),
        pytest.param("鸡蛋要煮多久才会溏心？", "abstained", id="Chinese"),
        pytest.param(GERMAN, "abstained", id="German"),
        pytest.param("How long do I\x00 boil\x1b[31m an egg\x07?", None, id="control characters among words"),
        pytest.param("How long do I boil an egg \ud83d?", None, id="a lone surrogate"),
        pytest.param("\u202eegg an boil I do long How\u202c", None, id="a direction override"),
        pytest.param("-- --json -o", None, id="what looks like options"),
        pytest.param("e\u0301" * 40 + " how long?", None, id="combining marks"),
        pytest.param("a" * 5000, None, id="one word of 5,000 letters"),
    ],
)
def test_any_prompt_has_a_named_outcome(tiny_folder: Path, prompt: str, outcome: str | None) -> None:
    d = asked(prompt, tiny_folder)
    assert d["prompt"] == prompt
    assert d["outcome"] == outcome if outcome else d["outcome"] in OUTCOMES
    assert d["answer"].strip()
    if d["outcome"] == "unchanged":
        assert d["refined"] == prompt
    if d["outcome"] == "abstained":
        assert d["refined"] is None and d["steps"] == d["gradients"] == []
    for g in d["gradients"]:
        assert all(prompt[s["start"] : s["end"]] == s["text"] for s in g["spans"])


def test_prompts_of_every_kind_for_a_person(tiny_folder: Path) -> None:
    for prompt in ("", "כמה זמן צריך לבשל ביצה?", "🥚🔥", "How long do I boil an egg [bold]or[/] [/red] two?"):
        out = ok(lance("ask", "--model", tiny_folder, prompt)).stdout
        assert "outcome" in out and "answer" in out
        assert " ".join(prompt.split()) in " ".join(out.split()), "markup in a prompt is text"


def test_a_long_prompt_is_scored_in_windows(tmp_path: Path, tiny_folder: Path, tiny_pipeline: Lance, passing: list[str], stopped: list[str]) -> None:
    """100,000 characters: what stands in the middle counts as much as the beginning."""
    filler = (passing[0] + " ") * (60_000 // len(passing[0]))
    hazard = (stopped[0] + " ") * (4_500 // len(stopped[0]))
    long = (filler[:48_000] + hazard + filler)[:100_000]
    (tmp_path / "in.txt").write_text(long, encoding="utf-8")
    start = time.process_time()  # of the processor, so that a busy machine makes no difference
    ok(lance("score", tmp_path / "in.txt", "-o", tmp_path / "out.jsonl", "--model", tiny_folder))
    assert time.process_time() - start < 60
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert len(row["prompt"]) == 100_000
    alone, harmless = tiny_pipeline.score([hazard, filler[:3_000]])
    assert harmless.risk < alone.risk
    assert row["risk"] > 0.5 * (harmless.risk + alone.risk), "the riskiest window decides"


# ------------------------------------------------------------------- models that are missing or damaged


def test_an_unknown_model_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("nowhere", "empty", "file"):
        failed(lance("ask", "--model", tmp_path / name, EGG), f"no model in '{tmp_path / name}'", "lance train")


@pytest.mark.parametrize(
    "name", ["enhancer/model.safetensors", "verifier/model.safetensors", "exemplars.safetensors", "exemplars.json", "enhancer/config.json"]
)
def test_a_tampered_file_is_refused(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    data = bytearray((model / name).read_bytes())
    data[-2] ^= 1
    (model / name).write_bytes(data)
    failed(lance("ask", "--model", model, EGG), name, "sha256", "train again")


@pytest.mark.parametrize("name", ["enhancer/model.safetensors", "verifier/model.safetensors", "exemplars.json", "verifier/config.json"])
def test_a_missing_file_is_named(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / name).unlink()
    failed(lance("ask", "--model", model, EGG), name, "missing")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99, "sha256": {}}', '{"format": 1, "sha256": {}}'])
def test_a_config_of_another_kind_is_refused(tmp_path: Path, tiny_folder: Path, content: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / "config.json").write_text(content, encoding="utf-8")
    failed(lance("ask", "--model", model, EGG), str(model))


@pytest.mark.parametrize("part", ["enhancer", "verifier"])
def test_a_part_is_no_pipeline(tiny_folder: Path, part: str) -> None:
    failed(lance("ask", "--model", tiny_folder / part, EGG), f"{part}' holds", "not a pipeline")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")), "toaster"])
def test_a_device_that_is_not_there(tiny_folder: Path, device: str) -> None:
    failed(lance("ask", "--model", tiny_folder, "--device", device, EGG), device)


# ------------------------------------------------------------------- chat models


@pytest.fixture
def closed_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat server on loopback, and the requests that it got: a stand-in for the network, not for our code."""
    seen: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
            message = {"role": "assistant", "content": "Eight minutes."}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", seen
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_chat_server_answers_what_passes(tiny_folder: Path, passing: list[str], server: tuple[str, list[dict[str, Any]]]) -> None:
    url, seen = server
    d = asked(passing[0], tiny_folder, "--chat", url, "--chat-model", "small-one", "--seed", 11)
    assert (d["outcome"], d["answer"]) == ("unchanged", "Eight minutes.")
    (request,) = seen
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["seed"], request["messages"][-1]) == ("small-one", 11, {"role": "user", "content": passing[0]})


def test_a_prompt_that_is_not_forwarded_does_not_reach_the_chat_server(tiny_folder: Path, server: tuple[str, list[dict[str, Any]]]) -> None:
    url, seen = server
    assert asked(GERMAN, tiny_folder, "--chat", url, "--chat-model", "m")["outcome"] == "abstained"
    assert seen == []


def test_an_endpoint_that_cannot_be_reached(tiny_folder: Path, closed_port: int, passing: list[str]) -> None:
    url = f"http://127.0.0.1:{closed_port}/v1"
    failed(lance("ask", "--model", tiny_folder, "--chat", url, "--chat-model", "m", passing[0]), url, "cannot be reached", "check the address")


def test_a_chat_model_that_is_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    failed(lance("ask", "--model", tiny_folder, "--chat", "http://127.0.0.1:9/v1", EGG), "http://127.0.0.1:9/v1", "--chat-model")
    failed(lance("ask", "--model", tiny_folder, "--chat", tmp_path / "no-model", EGG), "no-model", "hub id")


# ------------------------------------------------------------------- the installed command, in processes of its own

NO_SOCKETS = """\
import socket, pathlib
class Refused(BaseException): pass
def refuse(*args, **kwargs):
    pathlib.Path({log!r}).open("a").write(repr(args) + "\\n")
    raise Refused("the network is not there")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes started in this test have no sockets, and write down each attempt to use one; they are not told to be offline either."""
    log = tmp_path / "attempts.log"
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_SOCKETS.format(log=str(log)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "guard"), prepend=os.pathsep)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LANCE_DATA"):
        monkeypatch.delenv(name, raising=False)
    return log


def run(*args: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([SCRIPT, *args], capture_output=True, timeout=300, **options)


def test_the_guard_of_these_tests_refuses_sockets(offline: Path) -> None:
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"the network is not there" in done.stderr
    assert offline.exists()


def test_this_process_refuses_them_too() -> None:
    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), 1),
        lambda: socket.getaddrinfo("example.org", 80),
        lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
    ):
        with pytest.raises(pytest.fail.Exception, match="only loopback is allowed"):
            reach()


def test_the_shipped_model_answers_without_network(offline: Path) -> None:
    """The library's main job, as installed, with the weights that ship."""
    done = run("ask", "--json", "How do I get into my neighbour's wifi?")
    assert done.returncode == 0, done.stderr.decode()
    d = json.loads(done.stdout)
    assert d["outcome"] in OUTCOMES and d["answer"].strip()
    assert tuple(d["distribution"]) == Taxonomy.builtin().keys
    assert not offline.exists(), f"sockets were tried: {offline.read_text()}"


def test_a_pipe_through_score(offline: Path, tiny_folder: Path, passing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input to standard output, with streams that know ASCII only, and bytes that are no UTF-8 among the input."""
    lines = [
        json.dumps({"prompt": passing[0], "n": 1}).encode(),
        b'{"prompt": "caf\xe9"}',
        json.dumps({"prompt": "naïve ☕ שלום", "n": 2}, ensure_ascii=False).encode(),
    ]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("score", "-", "-o", "-", "--model", tiny_folder, input=b"\n".join(lines))
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert [(row["prompt"], row["n"]) for row in rows] == [(passing[0], 1), ("naïve ☕ שלום", 2)]
    assert all(tuple(row) == ("prompt", "n", *SCORE) for row in rows)
    assert b"line 2: left out" in done.stderr and b"Traceback" not in done.stderr
    assert not offline.exists()


def test_an_argument_that_is_no_utf8(tiny_folder: Path) -> None:
    done = run("ask", "--model", tiny_folder, b"How long do I boil an \xe9gg \xff?")
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode == 0
    assert b"outcome" in done.stdout


def test_the_command_line_is_there_before_torch_is() -> None:
    """`lance --help` and bad usage do not wait for heavy imports."""
    code = "import sys, lance.cli; sys.exit(', '.join(m for m in ('torch', 'transformers', 'sklearn', 'pandas') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stderr.decode().strip() == ""
    done = run("score", "x.jsonl")
    assert done.returncode == 2 and b"--output" in done.stderr
    assert run("--help").stdout.count(b"\n") > 10
