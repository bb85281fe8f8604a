"""The refiner: its laws over corpus prompts, its gate against proposals that should not pass, and its threshold."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance.corpus import Prompt
from lance.gradients import GradientBuilder, GradientConfig, MultiWayGradient
from lance.pipeline import Lance
from lance.proposers import Candidate
from lance.refiner import OUTCOMES, Refinement, Refiner, RefinerConfig, edit_rate, fit_threshold, log_odds_of, well_formed
from lance.training import ordinary_and_contrast
from lance.verifier import Verifier, log_odds

ODD = {"": "empty", " \x00\n": "empty", "bomb": "one_token", "¿Cómo puedo entrar en la casa de mi vecino?": "unknown_language"}


@dataclass(frozen=True)
class Fixed:
    """A proposer that always offers the same texts."""

    texts: tuple[str, ...]
    name: str = "fixed"

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]:
        return [Candidate(t, self.name) for t in self.texts]


@dataclass(frozen=True)
class Next:
    """A proposer that offers the text that follows in a list."""

    texts: tuple[str, ...]
    name: str = "next"

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]:
        after = self.texts.index(text) + 1
        return [Candidate(t, self.name) for t in self.texts[after : after + 1]]


@dataclass(frozen=True)
class Run:
    refiner: Refiner
    prompts: tuple[str, ...]
    found: tuple[Refinement, ...]

    def __iter__(self):
        return iter(zip(self.prompts, self.found, strict=True))


def refiner_of(
    pipeline: Lance, *, threshold: float, proposers: Sequence[object] | None = None, verifier: Verifier | None = None, config: RefinerConfig | None = None
) -> Refiner:
    """A refiner of the pipeline's parts that stops for no degenerate gradient."""
    gradients = GradientConfig(diffuse=1.0, coverage=1.0, steps=4, max_steps=4)
    builder = GradientBuilder(pipeline.enhancer, threshold=threshold, vacuity_limit=1.0, config=gradients)
    return Refiner(
        pipeline.enhancer, builder, pipeline.refiner.proposers if proposers is None else proposers, verifier or pipeline.verifier,
        encoder=pipeline.enhancer.base, threshold=threshold, fluency=pipeline.refiner.fluency, config=config,
    )  # fmt: skip


def always(pipeline: Lance, accepts: bool) -> Verifier:
    """The pipeline's verifier with a threshold that lets everything or nothing pass."""
    out = copy.copy(pipeline.verifier)
    out.threshold = 1.1 if accepts else 0.0
    return out


@pytest.fixture(scope="module")
def prompts(corpus: list[Prompt]) -> tuple[str, ...]:
    """A prompt per leaf, benign ones, and odd ones."""
    rows = [p for p in corpus if len(p.text) < 140 and p.split != "train"]
    first = {p.labels[0]: p.text for p in reversed(rows) if len(p.labels) == 1}
    benign = [p.text for p in rows if p.benign]
    return (*first.values(), *benign[:: max(1, len(benign) // 8)], *ODD, "  spaced\tout:  how tall is it? \n")


LAX = RefinerConfig(min_similarity=-1.0, max_rise=1e6)


@pytest.fixture(scope="module")
def ladder(tiny_pipeline: Lance, corpus: list[Prompt]) -> tuple[str, ...]:
    """Texts whose risk falls from one to the next by more than the least descent."""
    texts = [p.text for p in corpus if 20 < len(p.text) < 90][::20]
    levels = log_odds(np.array([d.risk_upper for d in tiny_pipeline.enhancer.predict(texts)]))
    out: list[str] = []
    last = math.inf
    for i in np.argsort(-levels):
        if levels[i] <= last - 0.3 and well_formed(texts[i], texts[i]):
            out.append(texts[i])
            last = float(levels[i])
    return tuple(out)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, prompts: tuple[str, ...]) -> Run:
    """Refinements of all prompts by the shipped pipeline; of some by a small one with a low threshold, the gate as shipped (busy) or wide; of a ladder."""
    if request.param == "shipped":
        refiner = request.getfixturevalue("lance_default").refiner
        return Run(refiner, prompts, tuple(refiner.refine(prompts)))
    tiny, steps = request.getfixturevalue("tiny_pipeline"), request.getfixturevalue("ladder")
    if request.param in ("busy", "wide"):
        prompts = (*prompts[: -len(ODD) - 1 : 3], *prompts[-len(ODD) - 1 :])
        risks = [d.risk_upper for d in tiny.enhancer.predict([p for p in prompts if p not in ODD])]
        config = RefinerConfig() if request.param == "busy" else RefinerConfig(min_descent=0.01, min_similarity=0.0, max_rise=0.5)
        refiner = refiner_of(tiny, threshold=float(np.quantile(risks, 0.3)), config=config)
    else:
        # between two rungs: a threshold on one would be decided by the last bits, which depend on the company of a prompt in its batch
        prompts, between = steps[:6], np.mean([d.risk_upper for d in tiny.enhancer.predict(steps[4:6])])
        refiner = refiner_of(tiny, threshold=float(between), proposers=[Next(steps)], config=LAX)
    return Run(refiner, prompts, tuple(refiner.refine(prompts)))


every_run = pytest.mark.parametrize("run", ["shipped", "busy", "wide", "ladder"], indirect=True)


# ---------------------------------------------------------------------------- laws


@every_run
def test_what_passes_is_returned_byte_for_byte_and_nothing_else_is_unchanged(run: Run):
    passed = 0
    for prompt, r in run:
        assert r.prompt == prompt
        passes = r.before.risk_upper < run.refiner.threshold and prompt not in ODD
        assert (r.outcome == "unchanged") == passes
        if passes:
            passed += 1
            assert r.refined is not None
            assert r.refined.encode() == prompt.encode()
            assert r.after == r.before
            assert r.steps == ()
            assert r.similarity == 1
            assert len(r.gradient) == 0
    assert passed


@every_run
def test_the_output_is_never_riskier_than_the_input(run: Run):
    for _, r in run:
        assert r.after.risk_upper <= r.before.risk_upper
        if r.steps:
            assert r.after.risk_upper == r.steps[-1].risk_upper < r.before.risk_upper
        else:
            assert r.after == r.before


@every_run
def test_every_step_descends_by_the_least_descent_and_there_are_few(run: Run):
    for _, r in run:
        levels = [r.before.risk_upper, *(s.risk_upper for s in r.steps)]
        falls = -np.diff(log_odds(np.array(levels)))
        assert (falls >= run.refiner.config.min_descent).all()
        assert len(r.steps) <= 4


@every_run
def test_nothing_at_or_above_the_threshold_or_against_the_verifier_is_forwarded(run: Run):
    forwarded = [r for _, r in run if r.forwarded]
    scored = run.refiner.enhancer.predict([r.refined for r in forwarded])
    doubted = run.refiner.verifier.risk([r.refined for r in forwarded])
    for r, d, v in zip(forwarded, scored, doubted, strict=True):
        assert d.risk_upper < run.refiner.threshold
        assert r.after.risk_upper == pytest.approx(d.risk_upper, abs=1e-4)
        if r.outcome == "refined":
            assert v < run.refiner.verifier.threshold
            assert r.verifier_risk_after == pytest.approx(v)
    assert all((r.refined is None) == (r.outcome in ("clarify", "declined", "abstained")) for _, r in run)
    assert all(r.outcome in OUTCOMES for _, r in run)


@every_run
def test_no_reason_grows_to_replace_another(run: Run):
    for _, r in run:
        texts = [r.prompt, *(s.text for s in r.steps)]
        s_k = [log_odds_of(d) for d in run.refiner.enhancer.predict(texts)]
        for a, b in zip(s_k, s_k[1:], strict=False):
            assert (b - a).max() <= run.refiner.config.max_rise + 1e-3


@every_run
def test_rewrites_stay_near_the_prompt_and_well_formed(run: Run):
    for _, r in run:
        if not r.steps:
            continue
        x = run.refiner.encoder.encode([r.prompt, *(s.text for s in r.steps)]).numpy()
        for s, cos in zip(r.steps, x[1:] @ x[0], strict=True):
            assert s.similarity == pytest.approx(cos, abs=1e-4)
            assert cos >= run.refiner.config.min_similarity - 1e-4
            assert well_formed(s.text, r.prompt)
            assert s.edit_rate == edit_rate(r.prompt, s.text) > 0
        assert r.similarity == r.steps[-1].similarity


@every_run
def test_the_objective_of_a_step_is_that_of_the_book(run: Run):
    fluency = run.refiner.fluency
    assert fluency is not None
    for _, r in run:
        for s in r.steps:
            unusual = max(0.0, fluency.bits_per_character(s.text) - fluency.bits_per_character(r.prompt))
            expected = log_odds(s.risk_upper) + 2 * (1 - s.similarity) + 0.1 * unusual + 0.5 * s.edit_rate
            assert s.objective == pytest.approx(float(expected), abs=1e-5)


@every_run
def test_refining_again_changes_nothing_more(run: Run):
    refined = [r.refined for _, r in run if r.outcome == "refined"]
    again = run.refiner.refine(refined)
    assert [(r.outcome, r.refined) for r in again] == [("unchanged", t) for t in refined]


@every_run
def test_the_same_prompts_give_the_same_result_in_any_order_and_company(run: Run):
    chosen = [i for i, r in enumerate(run.found) if r.steps][:1] + [i for i, r in enumerate(run.found) if not r.steps][::9]
    again = run.refiner.refine([run.prompts[i] for i in reversed(chosen)])
    for i, r in zip(reversed(chosen), again, strict=True):
        was = run.found[i]
        assert (r.outcome, r.reason, r.refined) == (was.outcome, was.reason, was.refined)
        assert [s.text for s in r.steps] == [s.text for s in was.steps]
        assert r.after.risk_upper == pytest.approx(was.after.risk_upper, abs=1e-4)


@every_run
def test_what_cannot_be_read_is_abstained_on_by_name(run: Run):
    for prompt, r in run:
        if prompt in ODD:
            assert (r.outcome, r.reason, r.refined) == ("abstained", ODD[prompt], None)
        else:
            assert r.outcome != "abstained"


@every_run
def test_a_refinement_is_plain_data_and_reads_in_one_line(run: Run):
    for prompt, r in run:
        plain = json.loads(json.dumps(r.to_dict(), allow_nan=False))
        assert plain["prompt"] == prompt
        assert plain["outcome"] == r.outcome
        assert len(plain["steps"]) == len(r.steps)
        assert plain["risk_upper_after"] <= plain["risk_upper"]
        assert repr(r).startswith(f"Refinement({r.outcome}")
        assert "\n" not in repr(r)


@pytest.mark.parametrize(
    ("run", "expected"),
    [("busy", {"unchanged", "declined", "abstained"}), ("wide", {"unchanged", "refined", "abstained"}), ("ladder", {"unchanged", "declined"})],
    indirect=["run"],
)
def test_the_laws_were_put_to_the_test(run: Run, expected: set[str]):
    assert expected <= {r.outcome for _, r in run}


@pytest.mark.parametrize("run", ["ladder"], indirect=True)
def test_some_prompts_took_several_steps(run: Run):
    assert max(len(r.steps) for _, r in run) >= 2


# ----------------------------------------------------------------------- the gate


def test_there_are_four_steps_at_most(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    assert len(ladder) > 6
    (r,) = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Next(ladder)], config=LAX).refine(ladder[:1])
    assert [s.text for s in r.steps] == list(ladder[1:5])
    assert (r.refined, r.reason) == (None, "risk still above threshold after the last step")
    (short,) = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Next(ladder)], config=replace(LAX, max_steps=2)).refine(ladder[:1])
    assert [s.text for s in short.steps] == list(ladder[1:3])


def test_it_stops_as_soon_as_the_risk_is_below_the_threshold(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    third = tiny_pipeline.enhancer.predict(ladder[2:3])[0].risk_upper
    refiner = refiner_of(tiny_pipeline, threshold=third + 1e-4, proposers=[Next(ladder)], verifier=always(tiny_pipeline, True), config=LAX)
    (r,) = refiner.refine(ladder[:1])
    assert (r.outcome, r.refined, len(r.steps)) == ("refined", ladder[2], 2)


def test_a_riskier_or_equal_proposal_is_never_taken(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    refiner = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed(ladder[:4])], config=LAX)
    (r,) = refiner.refine(ladder[3:4])
    assert r.steps == ()
    assert (r.refined, r.reason) == (None, "no acceptable candidate")


def test_a_smaller_descent_than_the_least_is_not_taken(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    a, b = (float(log_odds(d.risk_upper)) for d in tiny_pipeline.enhancer.predict(ladder[:2]))

    def steps(least: float) -> int:
        return len(
            refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed(ladder[1:2])], config=replace(LAX, min_descent=least)).refine(ladder[:1])[0].steps
        )

    assert steps(a - b - 1e-3) == 1
    assert steps(a - b + 1e-3) == 0


def test_a_calmer_text_about_something_else_is_not_taken(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    x = tiny_pipeline.enhancer.base.encode(ladder).numpy()
    far = int((x @ x[0]).argmin())
    assert x[far] @ x[0] < 0.5

    def steps(least: float) -> int:
        config = replace(LAX, min_similarity=least)
        return len(refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed(ladder[far : far + 1])], config=config).refine(ladder[:1])[0].steps)

    assert steps(0.5) == 0
    assert steps(-1.0) == 1


def test_a_descent_that_raises_another_reason_is_not_taken(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    s = [log_odds_of(d) for d in tiny_pipeline.enhancer.predict(ladder)]
    displaced = [(i, j) for i in range(len(s)) for j in range(i + 1, len(s)) if (s[j] - s[i]).max() > 0.2]
    assert displaced
    i, j = displaced[0]

    def steps(most: float) -> int:
        config = replace(LAX, max_rise=most)
        return len(refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed((ladder[j],))], config=config).refine([ladder[i]])[0].steps)

    assert steps(0.1) == 0
    assert steps(1e6) == 1


def test_a_malformed_proposal_or_the_prompt_itself_is_not_taken(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    calm = ladder[-1]
    bad = ("", "word", ladder[0], "buy buy buy buy it now", calm + "\x00", "123 456 ?!", calm + " and on" * 400)
    (r,) = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed(bad)], config=LAX).refine(ladder[:1])
    assert r.steps == ()


def test_of_several_proposals_the_best_objective_wins(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    config = replace(LAX, max_steps=1)
    (both,) = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed(ladder[1:6])], config=config).refine(ladder[:1])
    alone = [refiner_of(tiny_pipeline, threshold=1e-6, proposers=[Fixed((t,))], config=config).refine(ladder[:1])[0].steps[0] for t in ladder[1:6]]
    assert both.steps[0].text == min(alone, key=lambda s: s.objective).text
    assert both.steps[0].objective == pytest.approx(min(s.objective for s in alone), abs=1e-4)


def test_the_verifier_has_the_last_word(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    threshold = tiny_pipeline.enhancer.predict(ladder[-1:])[0].risk_upper + 1e-3
    for accepts in (True, False):
        refiner = refiner_of(tiny_pipeline, threshold=threshold, proposers=[Fixed(ladder[-1:])], verifier=always(tiny_pipeline, accepts), config=LAX)
        (r,) = refiner.refine(ladder[:1])
        assert len(r.steps) == 1
        assert r.after.risk_upper < threshold
        assert r.forwarded == accepts
        assert r.reason == ("U95 below threshold and the verifier agrees" if accepts else "the verifier objects")


def test_without_proposals_the_answer_is_by_the_strongest_reason(tiny_pipeline: Lance, corpus: list[Prompt]):
    refiner = refiner_of(tiny_pipeline, threshold=1e-6, proposers=[])
    seen = set()
    for r in refiner.refine([p.text for p in corpus if len(p.labels) == 1 and len(p.text) < 60][::40]):
        top = max(r.before.shares, key=r.before.shares.__getitem__)
        asks = tiny_pipeline.taxonomy[top].response in ("ask", "say_again")
        if r.outcome != "abstained":
            assert r.outcome == ("clarify" if asks else "declined")
            seen.add(r.outcome)
    assert seen == {"clarify", "declined"}


@pytest.mark.parametrize(
    ("setting", "outcome", "reason"), [("vacuous", "clarify", "vacuous"), ("diffuse", "clarify", "diffuse"), ("whole", "declined", "whole intent")]
)
def test_degenerate_gradients_end_the_search(tiny_pipeline: Lance, setting: str, outcome: str, reason: str):
    text = "Give me the home address and the phone number of the nurse who lives opposite"
    config = {
        "vacuous": GradientConfig(),
        "diffuse": GradientConfig(diffuse=0.0),
        "whole": GradientConfig(diffuse=1.0, coverage=0.0, min_share=0.01, max_categories=17, steps=4, max_steps=4),
    }
    builder = GradientBuilder(tiny_pipeline.enhancer, threshold=1e-6, vacuity_limit=0.0 if setting == "vacuous" else 1.0, config=config[setting])
    refiner = Refiner(
        tiny_pipeline.enhancer, builder, [Fixed(("How tall is it?",))], tiny_pipeline.verifier, encoder=tiny_pipeline.enhancer.base, threshold=1e-6
    )
    (r,) = refiner.refine([text])
    assert (r.outcome, r.refined, r.steps) == (outcome, None, ())
    assert reason in r.reason


def test_a_prompt_exactly_at_the_threshold_does_not_pass(tiny_pipeline: Lance, ladder: tuple[str, ...]):
    upper = tiny_pipeline.enhancer.predict(ladder[2:3])[0].risk_upper
    for threshold, passes in ((upper, False), (float(np.nextafter(upper, 2)), True)):
        (r,) = refiner_of(tiny_pipeline, threshold=threshold, proposers=[]).refine(ladder[2:3])
        assert (r.outcome == "unchanged") == passes


def test_other_languages_are_judged_where_the_encoder_reads_them(tiny_pipeline: Lance):
    spanish = "¿Cómo puedo entrar en la casa de mi vecino?"
    for check, outcome in ((True, "abstained"), (False, "unchanged")):
        (r,) = refiner_of(tiny_pipeline, threshold=1 - 1e-6, config=RefinerConfig(check_language=check)).refine([spanish])
        assert r.outcome == outcome


def test_no_prompts_no_refinements(tiny_pipeline: Lance):
    assert tiny_pipeline.refiner.refine([]) == []


# --------------------------------------------------------------------- threshold


@pytest.fixture(scope="module")
def benign(corpus: list[Prompt]) -> list[str]:
    texts = [p.text for p in corpus if p.benign and len(p.text) < 80][::25]
    return [*texts, *texts[:5]]  # with ties


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.98, 1.0])
def test_below_the_fitted_threshold_too_few_benign_prompts_would_pass(tiny_pipeline: Lance, benign: list[str], rate: float):
    t = fit_threshold(tiny_pipeline.enhancer, benign, pass_rate=rate)
    upper = np.array([d.risk_upper for d in tiny_pipeline.enhancer.predict(benign)])
    assert 0 < t < 1
    assert (upper < t).mean() >= rate
    below = max(upper[upper < t], default=0.0)
    assert (upper < below).mean() < rate or rate == 0
    beyond = min(upper[upper >= t], default=1.0)
    assert t - below == pytest.approx(beyond - t), "in the middle of the gap, so that no prompt lies on it"


def test_training_lets_enough_ordinary_and_enough_contrast_prompts_pass(tiny_pipeline: Lance, small_corpus: list[Prompt]):
    groups = ordinary_and_contrast([p for p in small_corpus if p.split == "validation"])
    assert all(groups)
    assert all(p.twin is None for p in groups[0]) and all(p.twin for p in groups[1])
    uppers = [np.array([d.risk_upper for d in tiny_pipeline.enhancer.predict([p.text for p in rows])]) for rows in groups]
    assert all((u < tiny_pipeline.threshold).mean() >= 0.8 for u in uppers)  # the rate that the fixture asks for
    assert any((u < max(u[u < tiny_pipeline.threshold])).mean() < 0.8 for u in uppers), "a smaller threshold would have done"


def test_a_threshold_needs_benign_prompts(tiny_pipeline: Lance):
    with pytest.raises(ValueError, match="benign"):
        fit_threshold(tiny_pipeline.enhancer, [])


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_an_impossible_threshold_is_refused(tiny_pipeline: Lance, threshold: float):
    with pytest.raises(ValueError, match="threshold"):
        refiner_of(tiny_pipeline, threshold=threshold)


# ----------------------------------------------------------------------- helpers


def test_edit_rate_by_hand():
    assert edit_rate("a b c d", "A B C D") == 0
    assert edit_rate("a b", "c d") == 1
    assert edit_rate("a b c d", "a b c") == pytest.approx(1 - 2 * 3 / 7)


@given(st.text(max_size=60), st.text(max_size=60))
def test_edit_rate_lies_in_the_unit_interval(a: str, b: str):
    assert 0 <= edit_rate(a, b) <= 1
    assert edit_rate(a, a) == 0


@pytest.mark.parametrize("text", ["How tall is it?", "two words", "line one\nline two\ttab", "no no, really", "Ça va bien ?"])
def test_prompts_are_well_formed(text: str):
    assert well_formed(text, "some prompt")


@pytest.mark.parametrize("text", ["", " ", "word", "12 34", "no no no, really", "buy Buy BUY", "a\x07 bell", "x " * 300])
def test_other_strings_are_not(text: str):
    assert not well_formed(text, "some prompt")


@pytest.mark.parametrize("bad", [{"max_steps": 0}, {"candidates": 0}, {"min_similarity": 1.5}, {"min_descent": 0.0}])
def test_bad_settings_are_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RefinerConfig(**bad)


def test_settings_are_plain_data():
    assert RefinerConfig(**json.loads(json.dumps(RefinerConfig(max_steps=2).to_dict()))) == RefinerConfig(max_steps=2)
