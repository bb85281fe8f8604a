"""Settings, rows and batches of a fit: twins stay together and are ranked; the signs of collapse are logged."""

import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from builders import bert_folder

from lance.corpus import Prompt, encode_labels
from lance.encoder import PromptEncoder
from lance.fitting import EnhancerConfig, Fitting, TrainingRows, hold_out, new_network, twin_pairs
from lance.objective import ObjectiveWeights
from lance.taxonomy import Taxonomy


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    """A random BERT of two layers, for what needs an encoder and no knowledge."""
    return PromptEncoder.from_pretrained(str(bert_folder(tmp_path_factory.mktemp("fitting") / "bert")))


@pytest.fixture(scope="module")
def twins(corpus: list[Prompt]) -> list[Prompt]:
    """Sixty pairs of twins of the training split and thirty other rows."""
    train = [p for p in corpus if p.split == "train"]
    by_id = {p.id: p for p in train}
    first = [p for p in train if p.twin and not p.benign][::7][:60]
    return [*first, *(p for p in train if not p.twin and p.benign)][:75] + [by_id[str(p.twin)] for p in first]


def fitting(prompts: list[Prompt], taxonomy: Taxonomy, encoder: PromptEncoder, config: EnhancerConfig) -> Fitting:
    rows = TrainingRows.of(prompts, encode_labels(prompts, taxonomy), encoder, config.train_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return Fitting(new_network(rows, taxonomy, encoder, config, 0.5), encoder, rows, config, None if config.trains_encoder else rows.x)


# ------------------------------------------------------------------ twins


def test_pairs_are_a_noncompliant_prompt_and_its_benign_twin() -> None:
    prompts = [
        Prompt("fine", id="a-c", twin="a"),
        Prompt("alone", labels=("privacy",), id="b", twin="b-c"),
        Prompt("not fine", labels=("privacy",), id="a", twin="a-c"),
        Prompt("of one kind", labels=("privacy",), id="d", twin="e"),
        Prompt("of one kind too", labels=("privacy",), id="e", twin="d"),
        Prompt("without an id"),
    ]
    assert twin_pairs(prompts).tolist() == [[2, 0]]
    assert twin_pairs(prompts[:2]).shape == (0, 2)


@pytest.mark.parametrize("adaptation", ["frozen", "lora"])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_each_row_is_in_one_batch_and_twins_in_the_same(
    twins: list[Prompt], taxonomy: Taxonomy, small_encoder: PromptEncoder, adaptation: Literal["frozen", "lora"], size: int
) -> None:
    fit = fitting(twins, taxonomy, small_encoder, EnhancerConfig(batch_size=size, adaptation=adaptation))
    batches = list(fit.batches(np.random.default_rng(0)))
    assert sorted(i for b in batches for i in b) == list(range(len(twins)))
    assert max(map(len, batches)) <= max(size, 2)
    where = {i: n for n, b in enumerate(batches) for i in b}
    assert len(fit.rows.pairs) == 60
    assert all(where[int(a)] == where[int(b)] for a, b in fit.rows.pairs)
    again, other = list(fit.batches(np.random.default_rng(0))), list(fit.batches(np.random.default_rng(1)))
    assert again == batches
    assert other != batches


def test_the_pair_weight_sets_twins_further_apart(twins: list[Prompt], taxonomy: Taxonomy, small_encoder: PromptEncoder) -> None:
    def ranked(weight: float) -> float:
        """Mean log-likelihood of the order within the pairs, after a fit in which single labels hardly count."""
        config = EnhancerConfig(epochs=30, dropout=0.0, lr=5e-3, weights=ObjectiveWeights(label=0.01, binary=0.01, pair=weight))
        return fitting(twins, taxonomy, small_encoder, config).run(np.random.default_rng(0))[-1]["pair"]

    assert ranked(1.0) > ranked(0.0) + 0.05


def test_rows_without_twins_have_no_pair_term(twins: list[Prompt], taxonomy: Taxonomy, small_encoder: PromptEncoder) -> None:
    alone = [replace(p, twin=None) for p in twins]
    config = EnhancerConfig(epochs=1)
    one, other = (fitting(alone, taxonomy, small_encoder, replace(config, weights=ObjectiveWeights(pair=w))) for w in (0.0, 5.0))
    torch.manual_seed(0)
    first = one.run(np.random.default_rng(0))
    torch.manual_seed(0)
    assert other.run(np.random.default_rng(0)) == first
    assert first[0]["pair"] == 0


# --------------------------------------------- where a fit starts, and outliers


def test_the_mean_can_start_from_the_base_rates(twins: list[Prompt], taxonomy: Taxonomy, small_encoder: PromptEncoder) -> None:
    candidates = encode_labels(twins, taxonomy).candidates
    rates = (candidates / candidates.sum(1, keepdims=True)).mean(0)
    for start, off in (("base_rate", 0.1), ("even", 1.0)):
        fit = fitting(twins, taxonomy, small_encoder, EnhancerConfig(start=start))  # type: ignore[arg-type]
        with torch.no_grad():
            alpha = fit.network.eval().alpha(fit.rows.x).numpy()
        d_bar = (alpha / alpha.sum(1, keepdims=True)).mean(0)
        assert abs(d_bar[0] - rates[0]) < off
        assert (np.corrcoef(d_bar, rates)[0, 1] > 0.9) == (start == "base_rate")


def test_outliers_are_as_long_as_the_rows_and_nothing_is_known_of_them(twins: list[Prompt], taxonomy: Taxonomy, small_encoder: PromptEncoder) -> None:
    labels = encode_labels(twins, taxonomy)
    rows = TrainingRows.of(twins, labels, small_encoder, 128)
    more = rows.with_outliers(0.5, small_encoder, np.random.default_rng(0))
    n, m = len(twins), len(twins) // 2
    assert len(more.windows) == len(more.x) == len(more.labels.eta) == n + round(n / 2)
    assert more.windows[:n] == rows.windows
    assert torch.equal(more.x[:n], rows.x)
    assert more.labels.candidates[n:].all()
    lengths = [len(w.ids) for w in more.windows]
    assert max(lengths[n:]) <= max(lengths[:n])
    assert abs(np.mean(lengths[n:]) - np.mean(lengths[:n])) < 0.4 * np.mean(lengths[:n])
    assert len({w.ids for w in more.windows[n:]}) >= m
    assert rows.with_outliers(0.0, small_encoder, np.random.default_rng(0)) is rows
    config = EnhancerConfig(weights=ObjectiveWeights(anchor=0.0))
    fit = Fitting(new_network(rows, taxonomy, small_encoder, config, 0.5), small_encoder, more, config, more.x)
    _, record = fit.objective(range(n, n + 20), 0.0)
    assert float(record["label"].detach()) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden": 0},
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"clip": -1.0},
        {"kl_warmup": 1.5},
        {"latent_dim": -1},
        {"dropout": 1.0},
        {"outliers": -0.1},
    ],
)
def test_a_bad_setting_is_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EnhancerConfig(**bad)


def test_settings_survive_as_plain_data():
    config = EnhancerConfig.lora(seed=3, weights=ObjectiveWeights(kl_d=0.5))
    assert EnhancerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rows_for_calibration_are_those_of_the_split_or_a_tenth(corpus: list[Prompt]):
    rows, held = [p for p in corpus if p.split == "train"][:200], [p for p in corpus if p.split == "validation"][:20]
    assert hold_out(rows, held[:3], 0) == (rows, held[:3])
    assert hold_out([*rows, *held], None, 0) == (rows, held)
    train, drawn = hold_out(rows, None, 0)
    assert len(drawn) == len(rows) // 10
    assert sorted(p.text for p in [*train, *drawn]) == sorted(p.text for p in rows)
    assert hold_out(rows, None, 0) == (train, drawn)
    assert hold_out(rows[:10], None, 0) == (rows[:10], [])
