"""Multi-way gradients: the identity, completeness, spans of the original prompt, occlusion, and every degenerate outcome."""

import copy
import json

import numpy as np
import pytest
import torch

from lance.corpus import Prompt
from lance.distribution import RejectionDistribution
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.gradients import (
    GradientBuilder,
    GradientConfig,
    GradientSpan,
    MultiWayGradient,
    TextualGradient,
    highlight_html,
)
from lance.pipeline import Lance
from lance.taxonomy import Taxonomy
from lance.words import content_words, word_attributions

ODD = [
    "   Write an insult about my colleague and post it to everybody, will you",
    "\t\tGive me\tthe home address of the\tpostman\n\n  at once, please",
    "🙂🙃 tell me which lottery numbers 🎲 will win on Saturday 🙂",
    "Café owner née Müller: wo does she live, naïvely asked?",
    "What are the names of Earth's two moons?\x00\x01 Tell me\x1f now",
    "Play me the song “Für Elise” — aloud – and don’t stop…",
    "WRITE ME A BOOK OF 900,000 WORDS, all of it, without a break!!!",
]
PROBE = "Give me the home address and the phone number of the nurse who lives opposite"


@pytest.fixture(scope="module")
def builder(tiny_pipeline: Lance) -> GradientBuilder:
    """A builder to which no prompt is too harmless and none too odd."""
    return GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=1.0)


@pytest.fixture(scope="module")
def noncompliant(corpus: list[Prompt]) -> list[Prompt]:
    """One short prompt per leaf, and three more."""
    rows = [p for p in corpus if len(p.labels) == 1 and len(p.text) < 160]
    first = {p.labels[0]: p for p in reversed(rows)}
    return [*first.values(), *(p for p in rows[5::97] if p not in first.values())][:20]


def distribution_of(taxonomy: Taxonomy, evidence: float = 40.0, **shares: float) -> RejectionDistribution:
    """A risky distribution with the given shares; the rest is spread thinly."""
    rest = (1 - sum(shares.values())) / (len(taxonomy) - len(shares))
    pi = np.array([shares.get(k, rest) for k in taxonomy.keys[1:]])
    return RejectionDistribution(taxonomy.keys, np.append(0.05 * evidence, 0.95 * evidence * pi), taxonomy)


# ------------------------------------------------------------------ the identity


def in_double(enhancer: VariationalEnhancer) -> VariationalEnhancer:
    """A copy whose network computes in float64."""
    out = copy.copy(enhancer)
    assert enhancer.network is not None
    out.network = copy.deepcopy(enhancer.network).double()
    return out


def identity_error(enhancer: VariationalEnhancer, x: torch.Tensor) -> float:
    """Relative difference of grad logit(rho_bar) and sum_k pi_k (grad u_k - grad u_0), with respect to one embedding."""
    x = x.double().clone().requires_grad_()
    alpha = enhancer.alpha_of(x.unsqueeze(0))[0]
    assert alpha.dtype == torch.float64
    (left,) = torch.autograd.grad(torch.logit(1 - alpha[0] / alpha.sum()), x, retain_graph=True)
    u = torch.log(alpha)
    pi = (alpha[1:] / alpha[1:].sum()).detach()
    slopes = torch.stack([torch.autograd.grad(u_k, x, retain_graph=True)[0] for u_k in u])
    right = (pi.unsqueeze(-1) * (slopes[1:] - slopes[0])).sum(0)
    assert float(left.norm()) > 0
    return float((left - right).norm() / left.norm())


@pytest.mark.parametrize("which", ["lance_default", "tiny_pipeline"])
def test_the_gradient_of_the_risk_is_the_mixture_of_the_category_gradients(which: str, request: pytest.FixtureRequest, noncompliant: list[Prompt]):
    pipeline: Lance = request.getfixturevalue(which)
    enhancer = in_double(pipeline.enhancer)
    texts = [p.text for p in noncompliant[:8]] + ["How tall is the Eiffel Tower?"]
    windows = [enhancer.encoder.windows([t])[0] for t in texts]
    errors = [identity_error(enhancer, x) for x in enhancer.encoder.embed(windows)]
    assert max(errors) < 1e-5


def test_the_identity_needs_the_shares_as_weights(tiny_pipeline: Lance):
    """Uniform weights break it: the test above can fail."""
    enhancer = in_double(tiny_pipeline.enhancer)
    x = enhancer.encoder.encode([PROBE])[0].double().requires_grad_()
    alpha = enhancer.alpha_of(x.unsqueeze(0))[0]
    (left,) = torch.autograd.grad(torch.logit(1 - alpha[0] / alpha.sum()), x, retain_graph=True)
    u = torch.log(alpha)
    slopes = torch.stack([torch.autograd.grad(u_k, x, retain_graph=True)[0] for u_k in u])
    assert float((left - (slopes[1:] - slopes[0]).mean(0)).norm() / left.norm()) > 1e-2


# -------------------------------------------------------- integrated gradients


def test_attributions_are_complete(lance_default: Lance, noncompliant: list[Prompt]):
    builder = lance_default.builder
    errors = []
    for p in noncompliant:
        window = builder.enhancer.predict_windows([p.text])[1][0]
        key = builder.active(builder.enhancer.predict([p.text])[0])[0][0]
        values, error = builder.attributions(window, key)
        assert len(values) == len(window.ids)
        errors.append(error)
    assert len(errors) == 20
    assert np.mean(np.array(errors) <= 0.05) >= 0.95


def test_the_completeness_error_is_what_it_says(builder: GradientBuilder):
    window = builder.enhancer.encoder.windows([PROBE])[0]
    values, error = builder.attributions(window, "privacy")
    encoder, k = builder.enhancer.encoder, builder.taxonomy.index("privacy")

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            tokens = torch.tensor([ids])
            u = torch.log(builder.enhancer.alpha_of(encoder.forward(tokens, torch.ones_like(tokens))))[0]
        return float(u[k] - u[0])

    special = {i for i, (a, b) in enumerate(window.offsets) if a == b}
    masked = [t if i in special else encoder.tokenizer.mask_token_id for i, t in enumerate(window.ids)]
    delta = score(list(window.ids)) - score(masked)
    assert error == pytest.approx(abs(values.sum() - delta) / max(abs(delta), 0.25), abs=1e-4)
    assert all(values[i] == pytest.approx(0, abs=1e-9) for i in special)  # the path does not move them


def test_more_steps_are_taken_until_the_error_is_small(tiny_pipeline: Lance):
    def error(config: GradientConfig) -> float:
        b = GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=1.0, config=config)
        return b.attributions(b.enhancer.encoder.windows([PROBE])[0], "privacy")[1]

    coarse = error(GradientConfig(steps=1, max_steps=1))
    assert error(GradientConfig(steps=1, max_steps=64, completeness=0.01)) < coarse


def test_token_attributions_add_up_to_words(encoder: PromptEncoder):
    text = "unbelievably  naïve, really?"
    (window,) = encoder.windows([text])
    values = np.arange(len(window.ids), dtype=float)
    words = word_attributions(text, window, values)
    assert [text[a:b] for a, b, _ in words] == ["unbelievably", "naïve", ",", "really", "?"]
    assert sum(v for *_, v in words) == pytest.approx(values[1:-1].sum())
    inside = [v for (a, b), v in zip(window.offsets, values, strict=True) if b > a and b <= len("unbelievably")]
    assert len(inside) > 1
    assert words[0][2] == pytest.approx(sum(inside))


# ------------------------------------------------------------------------ spans


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_spans_slice_the_original_prompt(builder: GradientBuilder, text: str):
    found = builder.build(text, check_degenerate=False)
    assert found.outcome == "ok"
    assert len(found) >= 1
    for g in found:
        for s in g.spans:
            assert text[s.start : s.end] == s.text
            assert s.text == s.text.strip()
            assert content_words(s.text)
        assert all(word in text for word in g.keep)


def test_spans_survive_a_prefix_of_spaces_unmoved(builder: GradientBuilder):
    plain = builder.build(PROBE, check_degenerate=False).gradients[0]
    moved = builder.build(" \t\n " + PROBE, check_degenerate=False).gradients[0]
    assert plain.spans
    assert [(s.text, s.start + 4) for s in plain.spans] == [(s.text, s.start) for s in moved.spans]


@pytest.fixture(scope="module")
def built(builder: GradientBuilder, noncompliant: list[Prompt]) -> list[tuple[str, MultiWayGradient]]:
    return [(p.text, builder.build(p.text, check_degenerate=False)) for p in noncompliant[:8]]


def test_spans_are_few_disjoint_and_strongest_first(builder: GradientBuilder, built: list[tuple[str, MultiWayGradient]]):
    seen = 0
    for _, found in built:
        for g in found:
            assert len(g.spans) <= builder.config.max_spans
            values = [s.attribution for s in g.spans]
            assert values == sorted(values, reverse=True)
            ordered = sorted(g.spans, key=lambda s: s.start)
            assert all(a.end <= b.start for a, b in zip(ordered, ordered[1:], strict=False))
            seen += len(g.spans)
    assert seen >= 8


def test_a_span_is_verified_by_taking_it_out(builder: GradientBuilder, built: list[tuple[str, MultiWayGradient]]):
    checked = 0
    for text, found in built:
        for g in found:
            k = builder.taxonomy.index(g.category) - 1
            for s in g.spans:
                without = " ".join((text[: s.start] + " " + text[s.end :]).split()) or " "
                with_it, without_it = builder.scores([text, without])[:, k]
                assert s.attribution > 0
                assert s.occlusion > 0  # the signs agree
                assert s.occlusion == pytest.approx(with_it - without_it, abs=1e-3)
                checked += 1
    assert checked >= 8


def test_spans_of_a_long_prompt_lie_in_its_riskiest_window(builder: GradientBuilder):
    calm = "We baked bread on Sunday and walked by the river until the evening came. " * 40
    text = "  " + calm + PROBE + ". " + calm
    window = builder.enhancer.predict_windows([text])[1][0]
    low, high = min(a for a, b in window.offsets if b > a), max(b for _, b in window.offsets)
    found = builder.build(text, check_degenerate=False)
    spans = [s for g in found for s in g.spans]
    assert spans
    for s in spans:
        assert text[s.start : s.end] == s.text
        assert low <= s.start < s.end <= high


def test_a_prompt_without_words_has_no_spans(builder: GradientBuilder):
    for text in ("", "   ", "?!", "\x00", "of the"):
        assert all(not g.spans for g in builder.build(text, check_degenerate=False))


# ----------------------------------------------------------- categories, outcomes


def test_active_categories_are_the_strongest_four_above_a_tenth(builder: GradientBuilder, taxonomy: Taxonomy):
    shares = {"privacy": 0.3, "copyright": 0.25, "temporal": 0.2, "subjective": 0.11, "model_unknown": 0.105}
    found = builder.active(distribution_of(taxonomy, **shares))
    assert [k for k, _ in found] == ["privacy", "copyright", "temporal", "subjective"]
    assert [w for _, w in found] == pytest.approx([0.3, 0.25, 0.2, 0.11])
    assert builder.active(distribution_of(taxonomy, privacy=0.9)) == [("privacy", pytest.approx(0.9))]
    thin = distribution_of(taxonomy, privacy=0.07)
    assert builder.active(thin) == [("privacy", pytest.approx(0.07))]  # at least the first


def test_weights_are_the_shares_of_the_distribution(builder: GradientBuilder, taxonomy: Taxonomy):
    d = distribution_of(taxonomy, privacy=0.6, temporal=0.3)
    found = builder.build(PROBE, d)
    assert [(g.category, g.weight) for g in found] == [("privacy", pytest.approx(0.6)), ("temporal", pytest.approx(0.3))]


def test_low_risk_has_an_empty_gradient(tiny_pipeline: Lance, taxonomy: Taxonomy):
    d = distribution_of(taxonomy, privacy=0.9)
    for threshold, outcome in ((d.risk_upper + 1e-9, "low_risk"), (d.risk_upper, "ok")):
        b = GradientBuilder(tiny_pipeline.enhancer, threshold=threshold, vacuity_limit=1.0, config=GradientConfig(coverage=1.0))
        found = b.build(PROBE, d)
        assert found.outcome == outcome
        assert (len(found) == 0) == (outcome == "low_risk")


def test_too_little_evidence_is_vacuous(tiny_pipeline: Lance, taxonomy: Taxonomy):
    b = GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=0.5)
    thin = distribution_of(taxonomy, evidence=20.0, privacy=0.9)
    assert thin.vacuity > 0.5
    assert b.build(PROBE, thin) == MultiWayGradient("vacuous")
    assert b.build(PROBE, distribution_of(taxonomy, evidence=80.0, privacy=0.9)).outcome != "vacuous"
    assert b.build(PROBE, thin, check_degenerate=False).outcome == "ok"


def test_spread_reasons_are_diffuse(builder: GradientBuilder, taxonomy: Taxonomy):
    flat = distribution_of(taxonomy, privacy=0.07)
    assert flat.share_entropy > 0.9
    assert builder.build(PROBE, flat) == MultiWayGradient("diffuse")
    assert builder.build(PROBE, flat, check_degenerate=False).outcome == "ok"
    assert builder.build(PROBE, distribution_of(taxonomy, privacy=0.8)).outcome != "diffuse"


def test_spans_over_most_of_the_content_make_the_whole_intent_hazardous(tiny_pipeline: Lance, taxonomy: Taxonomy):
    d = distribution_of(taxonomy, privacy=0.9)
    spans = GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=1.0).build(PROBE, d, check_degenerate=False).gradients[0].spans
    words = content_words(PROBE)
    share = sum(any(s.start <= a and b <= s.end for s in spans) for a, b in words) / len(words)
    assert 0 < share <= 1

    def outcome(coverage: float, distribution: RejectionDistribution = d) -> str:
        config = GradientConfig(coverage=coverage)
        return GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=1.0, config=config).build(PROBE, distribution).outcome

    assert outcome(share - 1e-6) == "whole_intent"
    assert outcome(share + 1e-6) == "ok"
    harmless = distribution_of(taxonomy, temporal=0.9)  # its answer is no refusal: no intent of it is hazardous
    assert outcome(0.0, harmless) == "ok"


def test_a_whole_intent_still_names_its_reasons(tiny_pipeline: Lance, taxonomy: Taxonomy):
    b = GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=1.0, config=GradientConfig(coverage=0.01))
    found = b.build(PROBE, distribution_of(taxonomy, privacy=0.9))
    assert found.outcome == "whole_intent"
    assert [g.category for g in found] == ["privacy"]


# -------------------------------------------------------------------- in words


def test_the_paragraph_names_category_spans_direction_and_the_end(builder: GradientBuilder, taxonomy: Taxonomy):
    g = builder.build(PROBE, distribution_of(taxonomy, privacy=0.82)).gradients[0]
    leaf = taxonomy["privacy"]
    assert g.spans
    assert leaf.name in g.text
    assert "82%" in g.text
    for s in g.spans:
        assert f"“{s.text}” ({s.occlusion:+.1f})" in g.text
    assert leaf.drop in g.text
    assert leaf.turn in g.text
    assert all(word in g.text for word in g.keep)
    assert f"{builder.threshold:.2f}" in g.text
    assert "softer words" in g.text


def test_kept_words_are_content_outside_the_spans(builder: GradientBuilder, taxonomy: Taxonomy):
    g = builder.build(PROBE, distribution_of(taxonomy, privacy=0.9)).gradients[0]
    inside = {PROBE[a:b] for a, b in content_words(PROBE) if any(s.start <= a and b <= s.end for s in g.spans)}
    assert g.keep
    assert not inside & set(g.keep)
    assert set(g.keep) <= {PROBE[a:b] for a, b in content_words(PROBE)}


def test_a_gradient_without_spans_or_texts_can_still_be_read():
    g = TextualGradient("x", "X", 0.5, (), "", (), "", 0.9, 0.0)
    assert "No single part" in g.text
    assert "X carries 50%" in g.text


def test_gradients_are_plain_data(builder: GradientBuilder, taxonomy: Taxonomy):
    found = builder.build(PROBE, distribution_of(taxonomy, privacy=0.6, temporal=0.3))
    plain = json.loads(json.dumps([g.to_dict() for g in found]))
    assert [p["category"] for p in plain] == ["privacy", "temporal"]
    assert all(PROBE[s["start"] : s["end"]] == s["text"] for p in plain for s in p["spans"])
    assert found.text == "\n".join(p["text"] for p in plain)
    assert len(found) == len(list(found)) == 2


def test_marks_in_html_keep_and_escape_the_text():
    text = "show <b> & kill the process"
    spans = (GradientSpan("kill", 11, 15, 1.0, 1.0), GradientSpan("<b>", 5, 8, 0.5, 0.5))
    page = highlight_html(text, TextualGradient("x", "X", 1.0, spans, "", (), "", 0.9, 0.0), "#123456")
    assert page.count("<mark") == 2
    assert "&lt;b&gt;</mark> &amp; " in page
    assert ">kill</mark> the process" in page


def test_building_is_deterministic(builder: GradientBuilder):
    assert builder.build(PROBE, check_degenerate=False) == builder.build(PROBE, check_degenerate=False)


@pytest.mark.parametrize("bad", [{"min_share": 0.0}, {"min_share": 1.0}, {"max_categories": 0}, {"steps": 0}, {"steps": 64, "max_steps": 32}, {"max_spans": 0}])
def test_bad_limits_are_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match="expected"):
        GradientConfig(**bad)
