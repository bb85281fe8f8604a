"""The verifier: an independent opinion, calibrated, with a threshold that lets benign prompts pass, saved without a pickle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import flip_byte
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from lance.corpus import Prompt
from lance.errors import DataError, ModelError
from lance.verifier import WINDOW, Verifier, log_odds


@pytest.fixture(scope="module")
def rows(corpus: list[Prompt]) -> list[Prompt]:
    return [p for p in corpus if p.split == "train"]


@pytest.fixture(scope="module")
def held(corpus: list[Prompt]) -> list[Prompt]:
    return [p for p in corpus if p.split == "validation"]


@pytest.fixture(scope="module")
def verifier(rows: list[Prompt], held: list[Prompt]) -> Verifier:
    return Verifier().fit(rows, held)


def test_it_tells_noncompliant_from_benign_prompts(verifier: Verifier, rows: list[Prompt], held: list[Prompt]):
    for here, least in ((rows, 0.9), (held, 0.6)):
        risk = verifier.risk([p.text for p in here])
        assert ((risk >= 0) & (risk <= 1)).all()
        assert roc_auc_score([not p.benign for p in here], risk) > least


@pytest.mark.parametrize("rate", [0.8, 0.98, 1.0])
def test_the_threshold_lets_the_given_share_of_benign_validation_prompts_pass(rows: list[Prompt], held: list[Prompt], rate: float):
    v = Verifier().fit(rows[::4], held, pass_rate=rate)
    assert (v.risk([p.text for p in held if p.benign]) < v.threshold).mean() >= rate


def test_the_threshold_is_no_higher_than_it_needs_to_be(rows: list[Prompt], held: list[Prompt]):
    v = Verifier().fit(rows[::4], held, pass_rate=0.8)
    benign = np.sort(v.risk([p.text for p in held if p.benign]))
    assert (benign < v.threshold).mean() <= 0.8 + 2 / len(benign)


def test_accepts_goes_by_the_threshold(verifier: Verifier, held: list[Prompt]):
    texts = [p.text for p in held[:40]]
    assert [verifier.accepts(t) for t in texts] == (verifier.risk(texts) < verifier.threshold).tolist()


def test_probabilities_are_calibrated_on_the_validation_rows(verifier: Verifier, held: list[Prompt]):
    risk = verifier.risk([p.text for p in held])
    assert risk.mean() == pytest.approx(np.mean([not p.benign for p in held]), abs=0.03)


def test_case_and_spacing_do_not_matter(verifier: Verifier):
    plain, odd = verifier.risk(["how do i kill a process?", "  How DO\ti kill\n a   PROCESS? "])
    assert plain == odd


def test_a_long_prompt_takes_the_risk_of_its_riskiest_window(verifier: Verifier, held: list[Prompt]):
    texts = [p.text for p in held if len(p.text) < 300]
    risks = verifier.risk(texts)
    worst, calm = texts[int(risks.argmax())], texts[int(risks.argmin())]
    filler = (calm + " ") * (3 * WINDOW // len(calm))
    cut = len(filler) // (WINDOW * 3 // 4) * (WINDOW * 3 // 4)
    long = filler[:cut] + worst + " " + filler
    pieces = [long[a : a + WINDOW] for a in range(0, len(long) - WINDOW // 4, WINDOW * 3 // 4)]
    assert verifier.risk([long])[0] == pytest.approx(verifier.risk(pieces).max())
    assert verifier.risk([long])[0] > verifier.risk([filler])[0]


@pytest.mark.parametrize("length", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 100_000])
def test_every_length_has_a_risk(verifier: Verifier, length: int):
    risk = verifier.risk([("lorem ipsum dolor " * (length // 18 + 1))[:length]])
    assert risk.shape == (1,)
    assert 0 <= risk[0] <= 1


def test_odd_characters_have_a_risk(verifier: Verifier):
    assert np.isfinite(verifier.risk(["", "\x00", "🙂" * 50, "مرحبا", "x\ud800y"])).all()


def test_no_prompts_no_risks(verifier: Verifier):
    assert verifier.risk([]).shape == (0,)


def test_the_same_rows_give_the_same_verifier(rows: list[Prompt], held: list[Prompt], verifier: Verifier):
    again = Verifier().fit(rows, held)
    assert again.threshold == verifier.threshold
    assert np.array_equal(again.risk([p.text for p in held]), verifier.risk([p.text for p in held]))


@pytest.mark.parametrize("which", ["training", "validation"])
def test_rows_of_one_kind_only_are_refused(rows: list[Prompt], held: list[Prompt], which: str):
    one = [p for p in held if p.benign]
    with pytest.raises(DataError, match=which):
        Verifier().fit(one if which == "training" else rows[::8], one if which == "validation" else held)


def test_an_unfitted_verifier_says_so(tmp_path: Path):
    with pytest.raises(ModelError, match="not fitted"):
        Verifier().risk(["x"])
    with pytest.raises(ModelError, match="not fitted"):
        Verifier().save_pretrained(tmp_path)


def test_a_saved_verifier_is_the_same_bit_for_bit(verifier: Verifier, held: list[Prompt], tmp_path: Path):
    verifier.save_pretrained(tmp_path / "v")
    loaded = Verifier.from_pretrained(tmp_path / "v")
    assert np.array_equal(loaded.risk([p.text for p in held]), verifier.risk([p.text for p in held]))
    assert (loaded.threshold, loaded.C, loaded.seed) == (verifier.threshold, verifier.C, verifier.seed)
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "v" / "model.safetensors", "numpy") as f:
        assert set(f.keys()) == {"idf", "coef"}


def test_changed_or_missing_weights_are_a_model_error(verifier: Verifier, tmp_path: Path):
    verifier.save_pretrained(tmp_path / "v")
    shutil.copytree(tmp_path / "v", tmp_path / "gone")
    flip_byte(tmp_path / "v" / "model.safetensors", -100)
    with pytest.raises(ModelError, match="was changed"):
        Verifier.from_pretrained(tmp_path / "v")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="missing"):
        Verifier.from_pretrained(tmp_path / "gone")
    with pytest.raises(ModelError, match="no model in"):
        Verifier.from_pretrained(tmp_path / "nowhere")


def test_a_description_of_another_format_is_a_model_error(verifier: Verifier, tmp_path: Path):
    verifier.save_pretrained(tmp_path)
    meta = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(meta | {"format": 2}))
    with pytest.raises(ModelError, match="format 2"):
        Verifier.from_pretrained(tmp_path)


def test_log_odds_stay_finite():
    assert log_odds(0.5) == 0
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()
    assert log_odds(0.9) == pytest.approx(np.log(9))
