"""Loaders of moderation sets: small invented files of the same formats, the label tables, and a copy of the hub's layout on disk."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lance.corpus import DataWarning, encode_labels
from lance.errors import DataError
from lance.moderation import OR_BENCH_LABELS, WILDGUARD_LABELS, beavertails_key, load_beavertails, load_or_bench, load_wildguard
from lance.taxonomy import Taxonomy


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


# ------------------------------------------------------------------- WildGuardMix


def wildguard_rows() -> list[dict[str, Any]]:
    def row(prompt: str | None, harm: str | None, kind: str, adversarial: bool = False) -> dict[str, Any]:
        return {"prompt": prompt, "adversarial": adversarial, "response": None, "prompt_harm_label": harm, "subcategory": kind}

    return [
        row("an invented harmless one", "unharmful", "benign"),
        row("an invented wish for a secret", "harmful", "private_information_individual"),
        row("an invented wish for a secret", "harmful", "private_information_individual"),
        row("pretend, and then the secret", "harmful", "others", adversarial=True),
        row("annotators did not agree", None, "others"),
        row(None, "harmful", "others"),
    ]


EXPECTED = [
    ("wildguard-test-0", (), "benign"),
    ("wildguard-test-1", ("privacy",), "private_information_individual"),
    ("wildguard-test-3", ("safety",), "adversarial, others"),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_wildguard_from_a_folder(tmp_path: Path, taxonomy: Taxonomy, kind: str) -> None:
    if kind == "jsonl":
        write_jsonl(tmp_path / "wildguard_test.jsonl", wildguard_rows())
    else:
        (tmp_path / "test").mkdir()
        pd.DataFrame(wildguard_rows()).to_parquet(tmp_path / "test/wildguard_test.parquet")
    with pytest.warns(DataWarning, match="left out 2 rows"):
        found = load_wildguard("test", tmp_path)
    assert [(p.id, p.labels, p.note) for p in found] == EXPECTED
    encode_labels(found, taxonomy)


def test_wildguard_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "wildguard-copy"
    write_jsonl(repo / "test/rows.jsonl", wildguard_rows())
    configs = [{"config_name": "wildguardtest", "data_files": [{"split": "test", "path": "test/rows.jsonl"}]}]
    (repo / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    with pytest.warns(DataWarning):
        assert [(p.id, p.labels, p.note) for p in load_wildguard("test", hub=str(repo))] == EXPECTED


def test_wildguard_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'dev'.*'train' or 'test'"):
        load_wildguard("dev", tmp_path)
    with pytest.raises(DataError, match="wildguard_train.parquet.*download"):
        load_wildguard("train", tmp_path)
    write_jsonl(tmp_path / "wildguard_test.jsonl", [{"prompt": "x", "prompt_harm_label": "evil", "subcategory": "others"}])
    with pytest.raises(DataError, match="row 0 .*'evil'"):
        load_wildguard("test", tmp_path)
    write_jsonl(tmp_path / "wildguard_test.jsonl", [{"prompt": "x", "prompt_harm_label": "harmful", "subcategory": "rudeness"}])
    with pytest.raises(DataError, match="'rudeness'.*cyberattack"):
        load_wildguard("test", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/wildguard_train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="wildguard_train.parquet.*not of the format"):
        load_wildguard("train", tmp_path)


# ------------------------------------------------------------------- OR-Bench


@pytest.fixture
def or_bench(tmp_path: Path) -> Path:
    rows = [("an invented, alarming one", "self-harm"), ("another", "deception"), (" ", "hate")]
    for name in ("or-bench-80k", "or-bench-hard-1k", "or-bench-toxic"):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([("prompt", "category"), *rows])
    return tmp_path


def test_or_bench_from_a_folder(or_bench: Path, taxonomy: Taxonomy) -> None:
    for part in ("80k", "hard"):
        assert [(p.benign, p.note) for p in load_or_bench(part, or_bench)] == [(True, "self-harm"), (True, "deception")], "blank rows are left out"
    toxic = load_or_bench("toxic", or_bench)
    assert [(p.id, p.labels) for p in toxic] == [("or-bench-toxic-0", ("dangerous_or_sensitive",)), ("or-bench-toxic-1", ("safety",))]
    encode_labels(toxic, taxonomy)
    own = load_or_bench("toxic", or_bench, taxonomy="or_bench")
    assert [p.labels for p in own] == [("self_harm",), ("deception",)]
    encode_labels(own, Taxonomy.builtin("or_bench"))


def test_or_bench_from_the_hub(or_bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(or_bench / "cache"))
    configs = [{"config_name": name, "data_files": f"{name}.csv"} for name in ("or-bench-hard-1k", "or-bench-toxic")]
    (or_bench / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    assert [p.benign for p in load_or_bench("hard", hub=str(or_bench))] == [True, True]
    assert [p.labels for p in load_or_bench("toxic", hub=str(or_bench))] == [("dangerous_or_sensitive",), ("safety",)]


def test_or_bench_names_what_is_wrong(or_bench: Path) -> None:
    with pytest.raises(DataError, match="'mild'.*80k, hard, toxic"):
        load_or_bench("mild", or_bench)
    with pytest.raises(DataError, match="'beavertails'.*noncompliance, or_bench"):
        load_or_bench("toxic", or_bench, taxonomy="beavertails")
    with pytest.raises(DataError, match="or-bench-80k.csv.*is missing"):
        load_or_bench("80k", or_bench / "nowhere")
    (or_bench / "or-bench-toxic.csv").write_text("prompt,category\nx,rudeness\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 0 of OR-Bench.*'rudeness'.*deception"):
        load_or_bench("toxic", or_bench)
    (or_bench / "or-bench-toxic.csv").write_text("text,category\nx,hate\n", encoding="utf-8")
    with pytest.raises(DataError, match="or-bench-toxic.csv.*prompt, category"):
        load_or_bench("toxic", or_bench)


# ------------------------------------------------------------------- BeaverTails


def beavertails_rows() -> list[dict[str, Any]]:
    def row(prompt: str, *harms: str) -> dict[str, Any]:
        names = ("animal_abuse", "financial_crime,property_crime,theft", "violence,aiding_and_abetting,incitement", "non_violent_unethical_behavior")
        return {"prompt": prompt, "response": "…", "category": {n: n in harms for n in names}, "is_safe": not harms}

    return [
        row("first", "violence,aiding_and_abetting,incitement"),
        row("second"),
        row("first", "animal_abuse"),
        row("first"),
        row("third", "non_violent_unethical_behavior"),
    ]


def test_beavertails_joins_the_answers_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "bt.jsonl"
    write_jsonl(path, beavertails_rows())
    assert [(p.text, p.labels) for p in load_beavertails(path)] == [
        ("first", ("animal_abuse", "violence")),
        ("second", ()),
        ("third", ("non_violent_unethical_behavior",)),
    ]
    binary = load_beavertails(path, binary=True)
    assert [p.labels for p in binary] == [("unsafe",), (), ("unsafe",)]
    encode_labels(binary + load_beavertails(path), Taxonomy.builtin("beavertails"))


def test_beavertails_of_another_format_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "bt.jsonl"
    for row in ({"prompt": "x"}, {"prompt": "x", "category": "violence"}, {"text": "x", "category": {}}):
        write_jsonl(path, [row])
        with pytest.raises(DataError, match="row 0 is not of BeaverTails' format"):
            load_beavertails(path)


def test_keys_of_beavertails_names() -> None:
    assert beavertails_key("violence,aiding_and_abetting,incitement") == "violence"
    assert beavertails_key("non-violent_unethical_behavior") == "non_violent_unethical_behavior"


# ------------------------------------------------------------------- label tables


def test_tables_lead_to_safety_leaves_or_to_all_of_them(taxonomy: Taxonomy) -> None:
    safety = set(taxonomy.leaves_of("safety"))
    for label in [*WILDGUARD_LABELS.values(), *OR_BENCH_LABELS.values()]:
        assert set(taxonomy.leaves_of(label)) <= safety
    assert {c.replace("-", "_") for c in OR_BENCH_LABELS} == set(Taxonomy.builtin("or_bench").keys[1:])
