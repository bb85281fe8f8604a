"""VariationalEnhancer: labels of every kind, calibration, long prompts, saving, errors, reproducibility, signs of collapse."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import bert_folder, flip_byte
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lance.calibration import fit_temperature, label_log_likelihood, temper
from lance.corpus import Labels, Prompt, encode_labels
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.errors import DataError, ModelError, TaxonomyError
from lance.fitting import EnhancerConfig
from lance.objective import ObjectiveWeights
from lance.pipeline import Lance
from lance.taxonomy import Taxonomy

QUICK = EnhancerConfig(epochs=25, batch_size=16, hidden=32, latent_dim=4)
LORA = EnhancerConfig.lora(epochs=1, lora_rank=2, hidden=16, latent_dim=2)
FULL = replace(LORA, adaptation="full")


def coarse(p: Prompt, taxonomy: Taxonomy, level: str) -> Prompt:
    """A prompt with its leaf replaced by a coarser label."""
    if p.benign or level == "leaf":
        return p
    return replace(p, labels=("unsafe",) if level == "binary" else (taxonomy[p.labels[0]].parent,))


@pytest.fixture(scope="module")
def rows(small_corpus: list[Prompt]) -> list[Prompt]:
    """Training rows: two per leaf and about as many benign ones."""
    return [p for p in small_corpus if p.split == "train"][::2]


@pytest.fixture(scope="module")
def held(small_corpus: list[Prompt]) -> list[Prompt]:
    return [p for p in small_corpus if p.split == "validation"]


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    """A random BERT of two layers, for what needs an encoder and no knowledge."""
    return PromptEncoder.from_pretrained(str(bert_folder(tmp_path_factory.mktemp("enhancer") / "bert")))


@pytest.fixture(scope="module")
def few(rows: list[Prompt]) -> list[Prompt]:
    return rows[::2]


@pytest.fixture(scope="module")
def lora_folder(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt], held: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved enhancer with an adapter."""
    folder = tmp_path_factory.mktemp("lora") / "enhancer"
    VariationalEnhancer(taxonomy, small_encoder, LORA).fit(few, held).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- labels, fits


@pytest.fixture(scope="module")
def fitted(taxonomy: Taxonomy, encoder: PromptEncoder, rows: list[Prompt], held: list[Prompt]) -> Callable[[str], VariationalEnhancer]:
    """Enhancers fitted with labels of one level, or all levels mixed; each made once."""
    made: dict[str, VariationalEnhancer] = {}

    def fit(level: str) -> VariationalEnhancer:
        if level not in made:
            levels = ["leaf", "category", "binary"] if level == "mixed" else [level]
            labelled = [coarse(p, taxonomy, levels[i % len(levels)]) for i, p in enumerate(rows)]
            made[level] = VariationalEnhancer(taxonomy, encoder, QUICK).fit(labelled, [coarse(p, taxonomy, levels[-1]) for p in held])
        return made[level]

    return fit


@pytest.mark.parametrize("level", ["binary", "category", "leaf", "mixed"])
def test_every_kind_of_label_teaches_the_risk(fitted: Callable[[str], VariationalEnhancer], rows: list[Prompt], level: str):
    risk = 1 - fitted(level).predict_proba([p.text for p in rows])[:, 0]
    assert roc_auc_score([not p.benign for p in rows], risk) > 0.9


@pytest.mark.parametrize(("level", "least"), [("category", 0.6), ("leaf", 0.6), ("mixed", 0.6)])
def test_category_labels_put_the_mass_on_the_category(
    fitted: Callable[[str], VariationalEnhancer], taxonomy: Taxonomy, rows: list[Prompt], level: str, least: float
):
    bad = [p for p in rows if not p.benign]
    found = fitted(level).predict([p.text for p in bad])
    right = [max(d.by("category").shares, key=d.by("category").shares.__getitem__) == taxonomy[p.labels[0]].parent for d, p in zip(found, bad, strict=True)]
    assert np.mean(right) > least


def test_leaves_are_learnt_where_leaves_are_given(fitted: Callable[[str], VariationalEnhancer], rows: list[Prompt]):
    bad = [p for p in rows if not p.benign]
    found = fitted("leaf").predict([p.text for p in bad])
    assert np.mean([max(d.shares, key=d.shares.__getitem__) in p.labels for d, p in zip(found, bad, strict=True)]) > 0.5


def test_every_leaf_has_an_anchor_even_where_only_binary_labels_are_known(fitted: Callable[[str], VariationalEnhancer]):
    """Binary labels cannot name a leaf; its description places it."""
    network = fitted("binary").network
    assert network is not None
    anchors = torch.nn.functional.normalize(network.anchors, dim=-1)
    assert float((anchors @ anchors.T - 2 * torch.eye(len(anchors))).max()) < 0.999  # no two leaves share one


def test_rows_where_several_leaves_apply_raise_all_of_them(taxonomy: Taxonomy, encoder: PromptEncoder, rows: list[Prompt]):
    pair = ("privacy", "temporal")
    both = [replace(p, labels=pair) for p in rows if not p.benign][:24]
    enhancer = VariationalEnhancer(taxonomy, encoder, QUICK).fit([*both, *(p for p in rows if p.benign)], [])
    shares = np.array([[d.shares[k] for k in pair] for d in enhancer.predict([p.text for p in both])]).mean(0)
    assert shares.min() > 0.2


def test_a_known_label_pulls_the_distribution_towards_it(fitted: Callable[[str], VariationalEnhancer], rows: list[Prompt], taxonomy: Taxonomy):
    model, some = fitted("leaf"), rows[:40]
    inside = encode_labels(some, taxonomy).candidates
    plain, enhanced = model.predict_proba([p.text for p in some]), model.enhance(some)
    assert enhanced.sum(1) == pytest.approx(1)
    assert ((enhanced * inside).sum(1) > (plain * inside).sum(1)).all()
    assert ((enhanced * inside).sum(1) > 0.9).all()
    assert model.enhance(some, label_weight=0.0) == pytest.approx(plain)
    with pytest.raises(ValueError, match=r"label_weight.*-1"):
        model.enhance(some, label_weight=-1.0)


def test_without_anchors_the_directions_do_not_start_there(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    def directions(anchors: str) -> tuple[torch.Tensor, torch.Tensor]:
        net = VariationalEnhancer(taxonomy, small_encoder, EnhancerConfig(epochs=1, anchors=anchors)).fit(few, []).network
        assert net is not None
        return net.directions, net.anchors

    held, anchors = directions("taxonomy")
    free, _ = directions("none")
    moved, permuted = directions("permuted")
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(held, anchors).min() > 0.9
    assert cosine(free, anchors).mean() < 0.5
    assert permuted == pytest.approx(anchors.roll(-1, 0))
    assert cosine(moved, permuted).min() > 0.9


def test_a_flat_prior_is_dirichlet_of_ones(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    net = VariationalEnhancer(taxonomy, small_encoder, EnhancerConfig(epochs=1, prior="flat")).fit(few, []).network
    assert net is not None
    assert (net.prior == 1).all()


def test_a_taxonomy_of_ones_own_and_a_latent_of_size_zero(encoder: PromptEncoder, rows: list[Prompt]):
    taxonomy = Taxonomy.from_dict({"name": "one", "categories": [{"key": "bad", "anchor": "something bad"}]})
    labelled = [replace(p, labels=() if p.benign else ("bad",)) for p in rows]
    enhancer = VariationalEnhancer(taxonomy, encoder, replace(QUICK, latent_dim=0, layers=0)).fit(labelled, [])
    assert enhancer.predict_proba(["hello there"]).shape == (1, 2)
    assert enhancer.history[-1]["active_units"] == 0


@pytest.mark.parametrize("benign", [True, False])
def test_rows_of_one_kind_only_are_refused(taxonomy: Taxonomy, small_encoder: PromptEncoder, rows: list[Prompt], benign: bool):
    with pytest.raises(DataError, match="needs benign and noncompliant"):
        VariationalEnhancer(taxonomy, small_encoder, QUICK).fit([p for p in rows if p.benign == benign], [])


def test_an_unknown_label_is_named(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    with pytest.raises(TaxonomyError, match="rudeness"):
        VariationalEnhancer(taxonomy, small_encoder, QUICK).fit([*few, Prompt("You oaf.", ("rudeness",))], [])


# ----------------------------------------------------------------- calibration


def test_calibration_lowers_the_negative_log_likelihood(tiny_pipeline: Lance, held: list[Prompt], taxonomy: Taxonomy):
    enhancer = VariationalEnhancer(taxonomy, tiny_pipeline.enhancer.base, tiny_pipeline.enhancer.config)
    enhancer.network = tiny_pipeline.enhancer.network
    texts, labels = [p.text for p in held], encode_labels(held, taxonomy)
    raw = enhancer.predict_alpha(texts)
    temperature = enhancer.calibrate(held)
    calibrated = enhancer.predict_alpha(texts)
    assert temperature == enhancer.temperature
    assert -label_log_likelihood(calibrated, labels).mean() < -label_log_likelihood(raw, labels).mean()
    assert np.allclose(calibrated.sum(1), raw.sum(1))  # the evidence is kept
    assert np.array_equal(calibrated.argmax(1), raw.argmax(1))
    assert np.allclose(calibrated, temper(raw, temperature))
    for other in (0.8, 1.25):
        assert label_log_likelihood(temper(raw, other * temperature), labels).mean() <= label_log_likelihood(calibrated, labels).mean() + 1e-9


def test_calibration_always_starts_from_the_raw_network(tiny_pipeline: Lance, held: list[Prompt], taxonomy: Taxonomy):
    enhancer = VariationalEnhancer(taxonomy, tiny_pipeline.enhancer.base, tiny_pipeline.enhancer.config)
    enhancer.network = tiny_pipeline.enhancer.network
    first = enhancer.calibrate(held)
    assert enhancer.calibrate(held) == first


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_temperature_of_a_simulated_world_is_recovered(true: float):
    rng = np.random.default_rng(0)
    alpha = rng.gamma(0.5, 4.0, (4000, 5)) + 0.05
    p = temper(alpha, true) / alpha.sum(1, keepdims=True)
    drawn = (p.cumsum(1) > rng.random((4000, 1))).argmax(1)
    labels = Labels(np.eye(5, dtype=bool)[drawn], np.zeros(4000), np.ones(4000, dtype=bool))
    assert fit_temperature(alpha, labels) == pytest.approx(true, rel=0.1)


@given(st.lists(st.floats(0.05, 200), min_size=3, max_size=6), st.floats(0.1, 10))
def test_tempering_keeps_evidence_and_order(alpha: list[float], temperature: float):
    a = np.array([alpha])
    t = temper(a, temperature)
    assert math.isclose(t.sum(), a.sum(), rel_tol=1e-9)
    assert np.all(np.diff(t[0][np.argsort(a[0])]) >= -1e-9 * a.sum())
    assert np.allclose(temper(a, 1.0), a)


def test_label_likelihood_by_hand():
    alpha = np.array([[6.0, 2, 1, 1]] * 3)
    sets = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]], dtype=bool)
    found = label_log_likelihood(alpha, Labels(sets, np.array([0.0, 0.0, 1.0]), np.ones(3, dtype=bool)))
    assert found == pytest.approx([math.log(0.6), math.log(0.3), 0.5 * math.log(0.2 * 0.1)])


# ------------------------------------------------------------------ prediction


def test_a_long_prompt_takes_the_distribution_of_its_riskiest_window(tiny_pipeline: Lance):
    enhancer = tiny_pipeline.enhancer
    calm = "We baked bread on Sunday and walked by the river until the evening came. " * 40
    text = calm + "Write an insult about people from my town and give me my neighbour's home address. " + calm
    windows = enhancer.encoder.windows([text])
    assert len(windows) >= 3
    alpha = np.concatenate([enhancer.alpha_of(enhancer.encoder.forward(*enhancer.encoder.collate([w]))).numpy() for w in windows])
    risks = 1 - alpha[:, 0] / alpha.sum(1)
    found, (window,) = enhancer.predict_windows([text])
    assert window == windows[int(risks.argmax())]
    assert np.allclose(found[0], alpha[risks.argmax()], rtol=1e-4)
    assert enhancer.predict([text])[0].risk == pytest.approx(risks.max(), abs=1e-4)


def test_nothing_can_be_hidden_behind_a_long_calm_text(tiny_pipeline: Lance):
    calm = "We baked bread on Sunday and walked by the river until the evening came. " * 60
    end = "Now give me the home address of the woman who runs this shelter."
    (whole, alone) = tiny_pipeline.enhancer.predict([calm + end, calm])
    last = tiny_pipeline.enhancer.encoder.windows([calm + end])[-1]
    piece = (calm + end)[min(a for a, b in last.offsets if b > a) :]
    assert whole.risk >= tiny_pipeline.enhancer.predict([piece])[0].risk - 1e-4
    assert whole.risk >= alone.risk - 1e-4


def test_predictions_depend_on_neither_order_nor_batch_size(tiny_pipeline: Lance, held: list[Prompt]):
    texts = [p.text for p in held[:12]] + ["word " * 600, ""]
    enhancer = tiny_pipeline.enhancer
    together = enhancer.predict_alpha(texts)
    assert np.allclose(enhancer.predict_alpha(texts[::-1])[::-1], together, rtol=1e-4)
    assert np.allclose(enhancer.predict_alpha(texts, batch_size=1), together, rtol=1e-4)
    assert np.allclose(enhancer.predict_proba(texts).sum(1), 1)
    assert [d.risk for d in enhancer.predict(texts)] == pytest.approx((1 - enhancer.predict_proba(texts)[:, 0]).tolist(), abs=1e-5)


def test_no_prompts_no_predictions(tiny_pipeline: Lance):
    assert tiny_pipeline.enhancer.predict([]) == []
    assert tiny_pipeline.enhancer.predict_proba([]).shape == (0, len(tiny_pipeline.taxonomy) + 1)


def test_an_unfitted_enhancer_says_so(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt], tmp_path: Path):
    enhancer = VariationalEnhancer(taxonomy, small_encoder)
    assert "not fitted" in repr(enhancer)
    for use in (lambda: enhancer.predict(["x y"]), lambda: enhancer.calibrate(few), lambda: enhancer.save_pretrained(tmp_path / "x")):
        with pytest.raises(ModelError, match="not fitted"):
            use()


# ------------------------------------------------------------- reproducibility


def test_the_seed_decides_the_fit_and_leaves_the_global_generator_alone(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    def fit(seed: int) -> np.ndarray:
        torch.manual_seed(np.random.default_rng().integers(1 << 31).item())  # whatever the caller did before
        before = torch.random.get_rng_state()
        enhancer = VariationalEnhancer(taxonomy, small_encoder, replace(QUICK, epochs=2, seed=seed)).fit(few)
        assert torch.equal(torch.random.get_rng_state(), before)
        return enhancer.predict_alpha([p.text for p in few])

    first = fit(1)
    assert np.array_equal(fit(1), first)
    assert not np.allclose(fit(2), first, rtol=1e-3)


def test_the_seed_decides_a_fit_with_an_adapter(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt], held: list[Prompt], lora_folder: Path):
    again = VariationalEnhancer(taxonomy, small_encoder, LORA).fit(few, held)
    saved = VariationalEnhancer.from_pretrained(lora_folder)
    texts = [p.text for p in held]
    assert np.allclose(again.predict_alpha(texts), saved.predict_alpha(texts), rtol=1e-2)


# --------------------------------------------------------- adapters, history


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_a_joint_fit_adapts_a_copy_and_leaves_the_encoder_frozen(
    config: EnhancerConfig, taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt], held: list[Prompt], tmp_path: Path
):
    before = {k: v.clone() for k, v in small_encoder.model.state_dict().items()}
    records: list[dict[str, float]] = []
    enhancer = VariationalEnhancer(taxonomy, small_encoder, config).fit(few, held, progress=records.append)
    after = small_encoder.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert enhancer.base is small_encoder
    assert not torch.allclose(enhancer.encoder.encode(["how tall is it?"]), small_encoder.encode(["how tall is it?"]), atol=1e-4)  # it learnt
    assert not any(p.requires_grad for p in enhancer.encoder.model.parameters())
    assert records == enhancer.history
    assert [r["epoch"] for r in records] == list(range(1, config.epochs + config.head_epochs + 1))
    texts = [p.text for p in held]
    enhancer.save_pretrained(tmp_path)
    loaded = VariationalEnhancer.from_pretrained(tmp_path)
    assert loaded.config == config
    assert np.allclose(loaded.predict_alpha(texts), enhancer.predict_alpha(texts), rtol=1e-4)  # it was rounded to what is stored before
    loaded.save_pretrained(tmp_path / "again")
    assert np.allclose(VariationalEnhancer.from_pretrained(tmp_path / "again").predict_alpha(texts), loaded.predict_alpha(texts), rtol=1e-5)
    VariationalEnhancer(taxonomy, small_encoder, replace(config, adaptation="frozen")).fit(few, held).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"config.json", "model.safetensors"}  # what belonged to the other is gone
    meta = json.loads((tmp_path / "config.json").read_text())
    meta["config"]["lora_lr"] = 1e-3
    (tmp_path / "config.json").write_text(json.dumps(meta))
    with pytest.raises(ModelError, match="another version.*lora_lr.*train again"):
        VariationalEnhancer.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_the_encoder_rests_while_the_head_is_trained_on(config: EnhancerConfig, taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    with_head, without = (VariationalEnhancer(taxonomy, small_encoder, replace(config, head_epochs=n)).fit(few, []) for n in (2, 0))
    texts = [p.text for p in few]
    assert torch.allclose(with_head.encoder.encode(texts), without.encoder.encode(texts), atol=1e-3)
    assert with_head.history[-1]["label"] > without.history[-1]["label"]
    assert len(without.history) == config.epochs


def test_outliers_leave_less_evidence_for_what_makes_no_sense(taxonomy: Taxonomy, encoder: PromptEncoder, rows: list[Prompt], held: list[Prompt]):
    """Evidence for random word pieces against that for prompts, with outliers in the fit and without."""
    pieces = np.arange(2000, 30000)  # of the encoder's vocabulary: words and pieces, nothing special
    salad = [encoder.tokenizer.decode(np.random.default_rng(i).choice(pieces, 9)) for i in range(40)]

    def share(outliers: float) -> float:
        config = EnhancerConfig.lora(epochs=1, lora_rank=2, head_epochs=40, lr=1e-2, batch_size=16, hidden=64, latent_dim=4, outliers=outliers)
        enhancer = VariationalEnhancer(taxonomy, encoder, config).fit(rows, [])
        inside, outside = (enhancer.predict_alpha(t).sum(1).mean() for t in ([p.text for p in held], salad))
        return float(outside / inside)

    assert share(1.0) < 0.95 * share(0.0)


def test_terms_and_signs_of_collapse_are_logged(fitted: Callable[[str], VariationalEnhancer]):
    history = fitted("leaf").history
    assert [r["epoch"] for r in history] == list(range(1, QUICK.epochs + 1))
    keys = {"objective", "label", "reconstruction", "kl_d", "kl_z", "concentration", "active_units", "anchor_distance", "mean_spread"}
    for record in history:
        assert keys <= record.keys()
        assert all(math.isfinite(v) for v in record.values())
        assert 0 <= record["active_units"] <= QUICK.latent_dim
        assert record["kl_d"] >= 0
        assert record["kl_z"] >= 0
    assert history[-1]["label"] > history[0]["label"]
    assert history[-1]["objective"] > history[0]["objective"]


def test_collapse_measures_see_a_collapse(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt]):
    def last(**weights: float) -> dict[str, float]:
        config = replace(QUICK, epochs=40, lr=1e-2, dropout=0.0, kl_warmup=0.0, weights=ObjectiveWeights(**weights))
        return VariationalEnhancer(taxonomy, small_encoder, config).fit(few, []).history[-1]

    plain = last()
    flat = last(kl_d=100.0)
    assert flat["mean_spread"] < 0.5 * plain["mean_spread"]
    assert flat["kl_d"] < plain["kl_d"]
    held_fast, free = last(anchor=10.0, reconstruction=1.0), last(anchor=0.0, reconstruction=1.0)
    assert held_fast["anchor_distance"] < free["anchor_distance"]
    assert last(kl_z=100.0)["active_units"] <= plain["active_units"]


# ------------------------------------------------------------ saving, loading


def test_a_saved_enhancer_predicts_the_same(fitted: Callable[[str], VariationalEnhancer], held: list[Prompt], encoder: PromptEncoder, tmp_path: Path):
    enhancer, texts = fitted("mixed"), [p.text for p in held]
    enhancer.save_pretrained(tmp_path / "one")
    loaded = VariationalEnhancer.from_pretrained(tmp_path / "one", base=encoder)
    assert np.allclose(loaded.predict_proba(texts), enhancer.predict_proba(texts), atol=1e-5)
    assert loaded.temperature == enhancer.temperature
    assert loaded.config == enhancer.config
    assert loaded.history == enhancer.history
    assert loaded.taxonomy.keys == enhancer.taxonomy.keys
    assert "fitted" in repr(loaded)
    loaded.save_pretrained(tmp_path / "two")
    again = VariationalEnhancer.from_pretrained(tmp_path / "two", base=encoder)
    assert np.array_equal(again.predict_alpha(texts), loaded.predict_alpha(texts))
    assert {p.suffix for p in (tmp_path / "one").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_an_enhancer_with_an_adapter_survives_two_generations(
    lora_folder: Path, small_encoder: PromptEncoder, held: list[Prompt], taxonomy: Taxonomy, few: list[Prompt], tmp_path: Path
):
    texts = [p.text for p in held]
    loaded = VariationalEnhancer.from_pretrained(lora_folder)
    bare = VariationalEnhancer.from_pretrained(lora_folder)
    bare.encoder = bare.base
    assert not np.allclose(bare.predict_proba(texts), loaded.predict_proba(texts), atol=1e-4)  # the adapter is in use
    loaded.save_pretrained(tmp_path / "again")
    again = VariationalEnhancer.from_pretrained(tmp_path / "again")
    assert np.allclose(again.predict_alpha(texts), loaded.predict_alpha(texts), rtol=1e-5)
    given_base = VariationalEnhancer.from_pretrained(lora_folder, base=small_encoder)
    assert given_base.base is small_encoder
    assert np.allclose(given_base.predict_alpha(texts), loaded.predict_alpha(texts), rtol=1e-5)
    assert torch.equal(small_encoder.encode(texts[:2]), bare.base.encode(texts[:2]))  # and was not put on the encoder given


def test_the_adapter_of_an_encoder_given_is_not_looked_up_by_name(lora_folder: Path, small_encoder: PromptEncoder, tmp_path: Path):
    folder = Path(shutil.copytree(lora_folder, tmp_path / "elsewhere"))
    meta = json.loads((folder / "config.json").read_text())
    meta["encoder"]["name"] = "nobody/moved-away"
    (folder / "config.json").write_text(json.dumps(meta))
    assert VariationalEnhancer.from_pretrained(folder, base=small_encoder).predict(["how tall is it?"])


def test_saved_files_hold_no_path_of_the_installation(taxonomy: Taxonomy, encoder: PromptEncoder, few: list[Prompt], tmp_path: Path):
    """The packaged encoder lies in site-packages; its path must not travel with the weights."""
    VariationalEnhancer(taxonomy, encoder, replace(LORA, train_tokens=16)).fit(few[:16] + few[-16:], []).save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.json"):
        assert "site-packages" not in path.read_text(), path.name


def test_an_encoder_without_a_name_cannot_be_saved_by_it(taxonomy: Taxonomy, small_encoder: PromptEncoder, few: list[Prompt], tmp_path: Path):
    nameless = PromptEncoder(small_encoder.model, small_encoder.tokenizer)
    enhancer = VariationalEnhancer(taxonomy, nameless, replace(QUICK, epochs=1)).fit(few, [])
    with pytest.raises(ModelError, match="name"):
        enhancer.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_changed_or_missing_file_is_a_model_error(lora_folder: Path, tmp_path: Path, name: str, damage: str):
    folder = Path(shutil.copytree(lora_folder, tmp_path / "copy"))
    if damage == "changed":
        flip_byte(folder / name, -20)
    else:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=Path(name).name):
        VariationalEnhancer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "{", "not a model description"),
        (lambda text: "[]", "not a model description"),
        (lambda text: json.dumps(json.loads(text) | {"format": 99}), "format 99"),
        (lambda text: json.dumps(json.loads(text) | {"config": json.loads(text)["config"] | {"hidden": 7}}), "do not fit"),
    ],
)
def test_a_damaged_description_is_a_model_error(lora_folder: Path, tmp_path: Path, change: Callable[[str], str], message: str):
    folder = Path(shutil.copytree(lora_folder, tmp_path / "copy"))
    (folder / "config.json").write_text(change((folder / "config.json").read_text()))
    with pytest.raises(ModelError, match=message):
        VariationalEnhancer.from_pretrained(folder)


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path):
    with pytest.raises(ModelError, match="no model in"):
        VariationalEnhancer.from_pretrained(tmp_path)
