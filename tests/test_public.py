"""Loaders of public data: small invented files of the same formats, the label tables, and (where LANCE_DATA is set) the real counts."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance import public
from lance.corpus import DataWarning, Prompt, encode_labels
from lance.errors import DataError
from lance.taxonomy import Taxonomy

REAL = public.data_folder(required=False)
needs_real = pytest.mark.skipif(REAL is None, reason="LANCE_DATA is not set: no public data to count")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def coconot_row(n: int, category: str, subcategory: str, **more: Any) -> dict[str, Any]:
    return {"id": f"inv_{n}", "category": category, "subcategory": subcategory, "prompt": f"An invented question, number {n}, with “quotes”?"} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the same layout as LANCE_DATA, with a few invented rows."""
    rows = [
        coconot_row(1, "Incomplete requests", "underspecified"),
        coconot_row(2, "Requests with safety concerns", "wildchats"),
        coconot_row(3, "Humanizing requests", "humanizing requests"),
        coconot_row(4, "Unsupported requests", "Style and Length Limitations"),
        coconot_row(5, "Indeterminate requests", "subjective questions", prompt="  "),
    ]
    write_jsonl(tmp_path / "coconot/eval_dev.jsonl", rows)
    write_jsonl(tmp_path / "coconot/contrast_dev.jsonl", rows[:2])
    write_jsonl(tmp_path / "coconot/pref.jsonl", [r | {"chosen": "yes", "rejected": "no"} for r in rows[:1]])
    write_jsonl(tmp_path / "coconot/train_sample.jsonl", [{k: v for k, v in r.items() if k != "id"} | {"index": 40 + i} for i, r in enumerate(rows[:2])])
    write_jsonl(
        tmp_path / "xstest/prompts_dev.jsonl",
        [
            {"id": "1", "prompt": "How do I kill a background job?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
            {"id": "2", "prompt": "An invented unsafe one", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
        ],
    )
    write_jsonl(tmp_path / "benign/instructions.jsonl", [{"prompt": "Name three rivers."}, {"prompt": "Sort these: b, a."}])
    catqa = {
        "Privacy Violation Activity": {"Doxxing": ["invented one", "invented two"]},
        "Physical Harm": {"Assault": ["invented three"]},
        "New": {"New": ["four"]},
    }
    (tmp_path / "harmful").mkdir()
    (tmp_path / "harmful/catqa_english.json").write_text(json.dumps(catqa), encoding="utf-8")
    (tmp_path / "harmful/malicious_instruct.txt").write_text("invented line one\n\ninvented line two\n", encoding="utf-8")
    write_csv(tmp_path / "harmful/advbench.csv", [{"goal": "invented, with a comma", "target": "Sure"}])
    write_csv(tmp_path / "harmful/jailbreakbench.csv", [{"": 0, "Goal": " invented goal ", "Target": "Sure", "Behavior": "x", "Category": "y", "Source": "z"}])
    write_csv(tmp_path / "harmful/strongreject.csv", [{"category": "x", "source": "y", "forbidden_prompt": "two\nlines"}])
    robot = {
        "guid": 7,
        "split": "train",
        "text": "are you made of wires",
        "label": "p",
        "source": "",
        "justification_cat": "",
        "comment": "",
        "possible_src_info": "",
    }
    write_csv(tmp_path / "r_u_a_robot/pos.train.csv", [robot])
    write_csv(tmp_path / "r_u_a_robot/neg.train.csv", [robot | {"guid": 8, "text": "nice weather"}, robot | {"guid": 9, "text": " "}])
    return tmp_path


def summary(prompts: list[Prompt]) -> list[tuple[str, tuple[str, ...]]]:
    return [(p.id, p.labels) for p in prompts]


# ------------------------------------------------------------------- the folder


def test_an_unset_variable_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANCE_DATA", raising=False)
    assert public.data_folder(required=False) is None
    for call in (public.data_folder, lambda: public.load_coconot("eval"), public.load_xstest, public.load_instructions, lambda: public.load_ldl("SJAFFE")):
        with pytest.raises(DataError, match=r"LANCE_DATA is not set; set it to a folder .*embedded corpus"):
            call()


def test_a_variable_that_names_no_folder_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LANCE_DATA", str(tmp_path / "nowhere"))
    assert public.data_folder(required=False) is None
    with pytest.raises(DataError, match=r"LANCE_DATA names '.*nowhere', which is no folder"):
        public.data_folder()


def test_the_variable_is_the_default_of_every_loader(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("LANCE_DATA", str(folder))
    assert public.data_folder() == folder
    assert public.load_coconot("eval") == public.load_coconot("eval", folder)
    assert public.load_harmful() == public.load_harmful(folder=folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval_dev\.jsonl' is missing; LANCE_DATA \(or `folder`\) must hold coconot/eval_dev\.jsonl"):
        public.load_coconot("eval", tmp_path)


# ------------------------------------------------------------------- each format


def test_coconot(folder: Path) -> None:
    assert summary(public.load_coconot("eval", folder)) == [
        ("coconot-eval-inv_1", ("underspecified",)),
        ("coconot-eval-inv_2", ("safety",)),
        ("coconot-eval-inv_3", ("humanizing",)),
        ("coconot-eval-inv_4", ("length_or_style",)),
    ], "blank prompts are left out; a subcategory without a leaf gives its category"
    assert summary(public.load_coconot("train", folder)) == [("coconot-train-40", ("underspecified",)), ("coconot-train-41", ("safety",))]
    for part in ("contrast", "pref"):
        assert all(p.benign for p in public.load_coconot(part, folder)), "contrast prompts should be answered"
    first = public.load_coconot("eval", folder)[0]
    assert (first.text, first.source, first.note) == ("An invented question, number 1, with “quotes”?", "coconot", "underspecified")
    with pytest.raises(DataError, match="'dev'.*train, pref, eval, contrast"):
        public.load_coconot("dev", folder)


def test_an_unknown_category_of_coconot_is_named(folder: Path) -> None:
    write_jsonl(folder / "coconot/eval_dev.jsonl", [coconot_row(1, "Rude requests", "shouting")])
    with pytest.raises(DataError, match="'Rude requests'.*Incomplete requests"):
        public.load_coconot("eval", folder)


def test_xstest(folder: Path) -> None:
    safe, unsafe = public.load_xstest(folder)
    assert (safe.labels, safe.note) == ((), "homonyms")
    assert (unsafe.labels, unsafe.id) == (("safety",), "xstest-2")


def test_a_row_of_xstest_without_a_known_label_is_named(folder: Path) -> None:
    write_jsonl(folder / "xstest/prompts_dev.jsonl", [{"id": "1", "prompt": "x", "label": "safe"}, {"id": "2", "prompt": "y", "label": "harmless"}])
    with pytest.raises(DataError, match="row 1 .*'harmless'"):
        public.load_xstest(folder)


def test_harmful_sets(folder: Path) -> None:
    found = public.load_harmful(folder=folder)
    assert {p.source for p in found} == set(public.HARMFUL_SETS)
    assert summary(public.load_harmful(["catqa"], folder)) == [
        ("catqa-0", ("privacy",)),
        ("catqa-1", ("privacy",)),
        ("catqa-2", ("dangerous_or_sensitive",)),
        ("catqa-3", ("safety",)),
    ]
    assert [p.text for p in public.load_harmful(["malicious_instruct"], folder)] == ["invented line one", "invented line two"]
    texts = [p.text for p in public.load_harmful(["advbench", "jailbreakbench", "strongreject"], folder)]
    assert texts == ["invented, with a comma", "invented goal", "two\nlines"]
    assert not any(p.benign for p in found)
    with pytest.raises(DataError, match="'harmbench'.*advbench"):
        public.load_harmful(["harmbench"], folder)


def test_robot_and_instructions(folder: Path) -> None:
    assert summary(public.load_robot("pos", folder)) == [("robot-7", ("personal_inquiry",))]
    assert summary(public.load_robot("neg", folder)) == [("robot-8", ())], "blank rows are left out"
    with pytest.raises(DataError, match=r"'amb'.*ambiguous"):
        public.load_robot("amb", folder)
    assert [(p.text, p.benign) for p in public.load_instructions(folder)] == [("Name three rivers.", True), ("Sort these: b, a.", True)]


def test_label_distributions(tmp_path: Path) -> None:
    from scipy.io import savemat

    (tmp_path / "ldl").mkdir()
    truth = np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])
    savemat(tmp_path / "ldl/SJAFFE.mat", {"features": np.arange(12).reshape(3, 4), "labels": truth})
    x, d = public.load_ldl("SJAFFE", tmp_path)
    assert x.dtype == d.dtype == np.float64
    assert x.shape == (3, 4)
    np.testing.assert_array_equal(d, truth)
    with pytest.raises(DataError, match="'Yeast'.*SJAFFE"):
        public.load_ldl("Yeast", tmp_path)
    with pytest.raises(DataError, match=r"Movie\.mat.*missing"):
        public.load_ldl("Movie", tmp_path)


def test_a_bad_line_in_a_public_file_is_reported_and_the_rest_kept(folder: Path) -> None:
    with (folder / "coconot/eval_dev.jsonl").open("ab") as f:
        f.write(b'{"prompt": "caf\xe9"}\n')
    with pytest.warns(DataWarning, match=r"eval_dev\.jsonl, line 6: left out"):
        assert len(public.load_coconot("eval", folder)) == 4


@pytest.mark.parametrize(
    ("file", "content", "load"),
    [
        pytest.param("xstest/prompts_dev.jsonl", b'{"id": 1, "text": "x"}\n', public.load_xstest, id="xstest without its columns"),
        pytest.param("benign/instructions.jsonl", b'{"instruction": "x"}\n', public.load_instructions, id="instructions without the prompt"),
        pytest.param("harmful/advbench.csv", b"Goal,Target\nx,y\n", lambda f: public.load_harmful(["advbench"], f), id="advbench with other columns"),
        pytest.param("harmful/advbench.csv", b"goal,target\ncaf\xe9,y\n", lambda f: public.load_harmful(["advbench"], f), id="advbench not UTF-8"),
        pytest.param("harmful/catqa_english.json", b"[1, 2", lambda f: public.load_harmful(["catqa"], f), id="catqa not JSON"),
        pytest.param("harmful/catqa_english.json", b"[1, 2]", lambda f: public.load_harmful(["catqa"], f), id="catqa without categories"),
        pytest.param("r_u_a_robot/pos.train.csv", b"guid,utterance\n1,x\n", lambda f: public.load_robot("pos", f), id="robot with other columns"),
    ],
)
def test_a_file_of_another_format_is_named(folder: Path, file: str, content: bytes, load: Any) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(Path(file).name)):
        load(folder)


# ------------------------------------------------------------------- from the hub (here: a copy of it on disk)


@pytest.fixture
def hub_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set folder with the configurations and splits of `allenai/coconot`, which `datasets` loads as it would the original."""
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "coconot-copy"
    rows = [{"id": str(i), "category": "Incomplete requests", "subcategory": "underspecified", "prompt": f"invented {i}"} for i in range(11_400)]
    write_jsonl(repo / "original/train.jsonl", rows)
    write_jsonl(repo / "original/test.jsonl", rows[:3])
    write_jsonl(repo / "contrast/test.jsonl", rows[:2])
    files = {"original": {"train": "original/train.jsonl", "test": "original/test.jsonl"}, "contrast": {"test": "contrast/test.jsonl"}}
    configs = [{"config_name": name, "data_files": [{"split": s, "path": p} for s, p in of.items()]} for name, of in files.items()]
    (repo / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    return str(repo)


def test_coconot_from_the_hub_leaves_out_the_leaked_row(hub_copy: str) -> None:
    train = public.load_coconot("train", hub=hub_copy)
    assert {str(i) for i in range(11_400)} - {p.id.removeprefix("coconot-train-") for p in train} == {str(public.COCONOT_TRAIN_LEAK)} == {"11397"}
    assert len(public.load_coconot("eval", hub=hub_copy)) == 3, "only the train split has the leak"
    assert [p.benign for p in public.load_coconot("contrast", hub=hub_copy)] == [True, True]


def test_xstest_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "calm", "type": "homonyms", "label": "safe"}, {"prompt": "not calm", "type": "contrast_homonyms", "label": "unsafe"}]
    write_jsonl(tmp_path / "xstest-copy/test.jsonl", rows)
    assert summary(public.load_xstest(hub=str(tmp_path / "xstest-copy"))) == [("xstest-0", ()), ("xstest-1", ("safety",))]


def test_what_cannot_be_had_from_the_hub_is_an_error_with_advice(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    with pytest.raises(DataError, match=r"cannot load '.*no-such-copy' \(original, train\).*check the connection, or give a local folder"):
        public.load_coconot("train", hub=str(tmp_path / "no-such-copy"))


# ------------------------------------------------------------------- label tables


def test_tables_lead_to_keys_of_the_taxonomy(taxonomy: Taxonomy) -> None:
    assert set(public.COCONOT_CATEGORIES.values()) == set(taxonomy.category_keys[1:])
    assert set(public.COCONOT_LEAVES.values()) == set(taxonomy.keys[1:]) - {"model_unknown"}, "every leaf of CoCoNot, and no other, is reached"
    for label in public.CATQA_LEAVES.values():
        assert taxonomy.leaves_of(label)


@pytest.mark.parametrize(
    ("category", "subcategory", "label"),
    [
        ("Incomplete requests", "false presuppositions", "false_presupposition"),
        ("Unsupported requests", "temporal limitations", "temporal"),
        ("Requests with safety concerns", "False Information ", "misinformation"),
        ("Requests with safety concerns", "misinformation", "misinformation"),
        ("Requests with safety concerns", "wildchats", "safety"),
        ("Humanizing requests", "offer advice, opinion or recommendations", "advice_or_opinion"),
        ("Humanizing requests", "humanizing requests", "humanizing"),
        ("Indeterminate requests", "", "indeterminate"),
    ],
)
def test_labels_of_coconot(taxonomy: Taxonomy, category: str, subcategory: str, label: str) -> None:
    assert public.coconot_label(category, subcategory) == label
    assert set(taxonomy.leaves_of(label)) <= set(taxonomy.leaves_of(public.COCONOT_CATEGORIES[category])), "a leaf lies in its own category"


# ------------------------------------------------------------------- the real files


@needs_real
@pytest.mark.parametrize(
    ("load", "rows", "benign"),
    [
        pytest.param(lambda: public.load_coconot("train"), 1999, 0, id="coconot train"),
        pytest.param(lambda: public.load_coconot("pref"), 927, 927, id="coconot pref"),
        pytest.param(lambda: public.load_coconot("eval"), 496, 0, id="coconot eval"),
        pytest.param(lambda: public.load_coconot("contrast"), 188, 188, id="coconot contrast"),
        pytest.param(public.load_xstest, 248, 143, id="xstest"),
        pytest.param(public.load_instructions, 6264, 6264, id="instructions"),
        pytest.param(lambda: public.load_harmful(["advbench"]), 520, 0, id="advbench"),
        pytest.param(lambda: public.load_harmful(["catqa"]), 550, 0, id="catqa"),
        pytest.param(lambda: public.load_harmful(["jailbreakbench"]), 100, 0, id="jailbreakbench"),
        pytest.param(lambda: public.load_harmful(["malicious_instruct"]), 100, 0, id="malicious_instruct"),
        pytest.param(lambda: public.load_harmful(["strongreject"]), 313, 0, id="strongreject"),
        pytest.param(lambda: public.load_robot("pos"), 1904, 0, id="robot, positive"),
        pytest.param(lambda: public.load_robot("neg"), 2380, 2380, id="robot, negative"),
    ],
)
def test_counts_and_labels_of_the_real_files(taxonomy: Taxonomy, load: Any, rows: int, benign: int) -> None:
    prompts = load()
    assert len(prompts) == rows
    assert sum(p.benign for p in prompts) == benign
    assert len({p.id for p in prompts}) == rows
    encode_labels(prompts, taxonomy)


@needs_real
def test_subcategories_of_the_real_files_find_their_leaves() -> None:
    coarse = Counter(p.note for p in public.load_coconot("train") + public.load_coconot("eval") if p.labels[0] in public.COCONOT_CATEGORIES.values())
    assert coarse == {"humanizing requests": 304, "wildchats": 88 + 35}, "only these two have no leaf of their own"


@needs_real
@pytest.mark.parametrize(("name", "classes"), [("Movie", 5), ("SBU_3DFE", 6), ("SJAFFE", 6), ("Yeast_alpha", 18), ("Yeast_cold", 4), ("Yeast_spoem", 2)])
def test_real_label_distributions_sum_to_one(name: str, classes: int) -> None:
    x, d = public.load_ldl(name)
    assert len(x) == len(d) > 100
    assert d.shape[1] == classes
    assert np.isfinite(x).all() and (d >= 0).all()
    np.testing.assert_allclose(d.sum(1), 1, atol=1e-6)
