"""The character language model: by hand, as a probability, and on words in and out of order."""

import math

import numpy as np
import pytest

from lance.corpus import Prompt
from lance.fluency import CharLM


def test_unigrams_by_hand():
    """Witten-Bell over a, b and the end: p(c) = (n_c + T p_0) / (N + T) with p_0 = 1 / (V + 1), N = T = V = 3."""
    model = CharLM(["ab"], order=1)
    seen, unseen = (1 + 3 / 4) / 6, (3 / 4) / 6
    assert model.bits_per_character("ab") == pytest.approx(-math.log2(seen))
    assert model.bits_per_character("a") == pytest.approx(-math.log2(seen))
    assert model.bits_per_character("z") == pytest.approx(-(math.log2(unseen) + math.log2(seen)) / 2)
    assert 3 * seen + unseen == pytest.approx(1)  # a probability over what was seen and one thing that was not


def test_bigrams_by_hand():
    model = CharLM(["ab"], order=2)
    uniform = 1 / 4
    unigram = (1 + 3 * uniform) / 6
    bigram = (1 + 1 * unigram) / 2  # each context was seen once, with one continuation
    assert model.bits_per_character("ab") == pytest.approx(-math.log2(bigram))


@pytest.fixture(scope="module")
def model(corpus: list[Prompt]) -> CharLM:
    return CharLM(p.text for p in corpus if p.split == "train")


def test_sentences_read_better_than_word_salad_and_that_better_than_noise(model: CharLM, corpus: list[Prompt]):
    rng = np.random.default_rng(0)
    texts = [p.text for p in corpus if p.split == "test" and len(p.text.split()) > 8][:30]
    salad = [" ".join("".join(rng.permutation(list(w))) for w in t.split()) for t in texts]
    noise = ["".join(rng.choice(list("qxzjvkwpy0189#%"), len(t))) for t in texts]
    bits = [np.array([model.bits_per_character(t) for t in kind]) for kind in (texts, salad, noise)]
    assert (bits[0] < bits[1]).mean() > 0.9
    assert (bits[1] < bits[2]).mean() > 0.9


def test_what_it_has_read_surprises_it_less(model: CharLM, corpus: list[Prompt]):
    read = np.mean([model.bits_per_character(p.text) for p in corpus if p.split == "train"][:50])
    unread = np.mean([model.bits_per_character(p.text) for p in corpus if p.split == "test"][:50])
    assert 0 < read < unread


def test_case_and_spacing_do_not_matter(model: CharLM):
    assert model.bits_per_character("What  is\nTHIS?") == model.bits_per_character("what is this?")


@pytest.mark.parametrize("text", ["", " ", "🙂", "日本語", "a" * 5000])
def test_any_text_has_finite_bits(model: CharLM, text: str):
    bits = model.bits_per_character(text)
    assert math.isfinite(bits)
    assert bits > 0


def test_without_texts_everything_is_equally_unusual():
    model = CharLM([])
    assert model.bits_per_character("anything") == pytest.approx(math.log2(3))
