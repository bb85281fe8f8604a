"""The refiner: propose, gate, keep the best. It descends on R(x) = logit U95(rho(x)) and never forwards what the gate or the verifier rejects."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lance.distribution import RejectionDistribution
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.fluency import CharLM
from lance.gradients import GradientBuilder, MultiWayGradient
from lance.proposers import Candidate, Proposer
from lance.readability import unreadable
from lance.verifier import Verifier, log_odds

OUTCOMES = ("unchanged", "refined", "clarify", "declined", "abstained")


@dataclass(frozen=True)
class RefinerConfig:
    """Gate and weights of the refiner, as in method section 3 of the book.

    J(x') = R(x') + similarity_weight (1 - cos(x0, x')) + fluency_weight dPPL + edit_weight edit_rate; a step is accepted only if R falls by `min_descent`,
    no s_k rises by more than `max_rise`, cos(x0, x') >= `min_similarity`, and the candidate is well-formed.
    """

    max_steps: int = 4
    candidates: int = 8
    similarity_weight: float = 2.0
    fluency_weight: float = 0.1
    edit_weight: float = 0.5
    min_descent: float = 0.25
    max_rise: float = 0.1
    min_similarity: float = 0.5
    check_language: bool = True

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.candidates < 1 or not -1 <= self.min_similarity <= 1 or self.min_descent <= 0:
            raise ValueError("expected max_steps >= 1, candidates >= 1, min_similarity in [-1, 1] and min_descent > 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One accepted step: the new text and its measures, with `objective` J and the gradient that it followed."""

    text: str
    proposer: str
    risk: float
    risk_upper: float
    similarity: float
    edit_rate: float
    objective: float
    gradient: MultiWayGradient

    def to_dict(self) -> dict[str, Any]:
        d = {k: getattr(self, k) for k in ("text", "proposer", "risk", "risk_upper", "similarity", "edit_rate", "objective")}
        return d | {"gradient": self.gradient.text}


@dataclass(frozen=True)
class Refinement:
    """What became of a prompt.

    `refined` is the prompt to forward, or None when nothing may be forwarded (clarify, declined, abstained). `reason` says why the refiner stopped. `after`
    is the distribution of the best text reached, forwarded or not; it equals `before` when no step was accepted.
    """

    prompt: str
    outcome: str
    reason: str
    refined: str | None
    before: RejectionDistribution
    after: RejectionDistribution
    gradient: MultiWayGradient
    steps: tuple[Step, ...] = ()
    similarity: float = 1.0
    verifier_risk_before: float = float("nan")
    verifier_risk_after: float = float("nan")

    @property
    def forwarded(self) -> bool:
        return self.refined is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the layout of `lance refine`."""
        return {
            "prompt": self.prompt,
            "refined": self.refined,
            "outcome": self.outcome,
            "reason": self.reason,
            "steps": [s.to_dict() for s in self.steps],
            "risk": self.before.risk,
            "risk_upper": self.before.risk_upper,
            "risk_after": self.after.risk,
            "risk_upper_after": self.after.risk_upper,
            "verifier_risk_before": _number(self.verifier_risk_before),
            "verifier_risk_after": _number(self.verifier_risk_after),
            "similarity": self.similarity,
        }

    def __repr__(self) -> str:
        return (
            f"Refinement({self.outcome}: {self.prompt!r} -> {self.refined!r}, U95 {self.before.risk_upper:.2f} -> {self.after.risk_upper:.2f}, {self.reason})"
        )


class Refiner:
    """Refines prompts along their multi-way gradients.

    Parameters
    ----------
    enhancer : VariationalEnhancer
        The scorer that is optimised.
    builder : GradientBuilder
    proposers : sequence of Proposer
    verifier : Verifier
        Agrees or objects at the end; it is not optimised.
    encoder : PromptEncoder
        The frozen encoder, for the similarity between prompt and rewrite.
    threshold : float
        t: a prompt with U95 < t passes, and so does a rewrite.
    """

    def __init__(
        self,
        enhancer: VariationalEnhancer,
        builder: GradientBuilder,
        proposers: Sequence[Proposer],
        verifier: Verifier,
        *,
        encoder: PromptEncoder,
        threshold: float,
        fluency: CharLM | None = None,
        config: RefinerConfig | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold t must lie in (0, 1), found {threshold!r}")
        self.enhancer, self.builder, self.proposers, self.verifier = enhancer, builder, list(proposers), verifier
        self.encoder, self.threshold, self.fluency = encoder, threshold, fluency
        self.config = config or RefinerConfig()

    def refine(self, prompts: Sequence[str]) -> list[Refinement]:
        """Refine each prompt; those that pass are returned byte for byte, and cost one batched forward pass."""
        before = self.enhancer.predict(prompts)
        risks = self.verifier.risk(prompts)
        return [self._refine(p, d, float(v)) for p, d, v in zip(prompts, before, risks, strict=True)]

    def _refine(self, text: str, before: RejectionDistribution, verifier_before: float) -> Refinement:
        def done(outcome: str, reason: str, **changes: Any) -> Refinement:
            known: dict[str, Any] = {"refined": None, "after": before, "gradient": MultiWayGradient("low_risk"), "verifier_risk_after": verifier_before}
            return Refinement(text, outcome, reason, before=before, verifier_risk_before=verifier_before, **(known | changes))

        why = unreadable(text, self.encoder)
        if why and (why != "unknown_language" or self.config.check_language):
            return done("abstained", why)
        if before.risk_upper < self.threshold:
            return done("unchanged", "U95 below threshold", refined=text)
        gradient = self.builder.build(text, before)
        if gradient.outcome in ("diffuse", "vacuous"):
            return done("clarify", f"{gradient.outcome} gradient", gradient=gradient)
        if gradient.outcome == "whole_intent":
            return done("declined", "the whole intent is hazardous", gradient=gradient)
        return self._descend(text, before, verifier_before, gradient)

    def _descend(self, text: str, before: RejectionDistribution, verifier_before: float, gradient: MultiWayGradient) -> Refinement:
        cfg = self.config
        origin = self.encoder.encode([text])[0].numpy()
        best, after, similarity = text, before, 1.0
        current = gradient
        steps: list[Step] = []
        reason = "no acceptable candidate"
        for _ in range(cfg.max_steps):
            step, distribution = self._best_step(text, origin, best, after, current)
            if step is None or distribution is None:
                break
            steps.append(step)
            best, after, similarity = step.text, distribution, step.similarity
            if after.risk_upper < self.threshold:
                break
            current = self.builder.build(best, after, check_degenerate=False)
        else:
            reason = "risk still above threshold after the last step"
        verifier_after = float(self.verifier.risk([best])[0])
        if after.risk_upper < self.threshold:
            if verifier_after < self.verifier.threshold:
                outcome, reason, refined = "refined", "U95 below threshold and the verifier agrees", best
            else:
                outcome, reason, refined = self._decline(before), "the verifier objects", None
        else:
            outcome, refined = self._decline(before), None
        return Refinement(text, outcome, reason, refined, before, after, gradient, tuple(steps), similarity, verifier_before, verifier_after)

    def _decline(self, distribution: RejectionDistribution) -> str:
        """Where the answer to the strongest reason is a question, the refiner asks; otherwise it declines."""
        top = max(distribution.shares, key=distribution.shares.__getitem__)
        return "clarify" if self.enhancer.taxonomy[top].response in ("ask", "say_again") else "declined"

    def _best_step(
        self, text: str, origin: np.ndarray, best: str, current: RejectionDistribution, gradient: MultiWayGradient
    ) -> tuple[Step | None, RejectionDistribution | None]:
        cfg = self.config
        found = [c for p in self.proposers for c in p.propose(best, gradient, cfg.candidates)]
        candidates = [c for c in {c.text: c for c in reversed(found)}.values() if c.text not in (text, best) and well_formed(c.text, text)]
        if not candidates:
            return None, None
        texts = [c.text for c in candidates]
        distributions = self.enhancer.predict(texts)
        similarity = self.encoder.encode(texts).numpy() @ origin
        s_now = log_odds_of(current)
        ranked: list[tuple[float, int, Step]] = []
        for i, (c, d, cos) in enumerate(zip(candidates, distributions, similarity.tolist(), strict=True)):
            descent = _score(current) - _score(d)
            rise = float((log_odds_of(d) - s_now).max())
            if descent < cfg.min_descent or rise > cfg.max_rise or cos < cfg.min_similarity:
                continue
            edits = edit_rate(text, c.text)
            j = _score(d) + cfg.similarity_weight * (1 - cos) + cfg.fluency_weight * self._unusual(text, c) + cfg.edit_weight * edits
            ranked.append((j, i, Step(c.text, c.proposer, d.risk, d.risk_upper, cos, edits, j, gradient)))
        if not ranked:
            return None, None
        _, i, step = min(ranked, key=lambda r: r[:2])
        return step, distributions[i]

    def _unusual(self, text: str, candidate: Candidate) -> float:
        """dPPL: how much more unusual the candidate reads than the prompt, in bits a character (0 without a language model)."""
        if self.fluency is None:
            return 0.0
        return max(0.0, self.fluency.bits_per_character(candidate.text[:2000]) - self.fluency.bits_per_character(text[:2000]))


def fit_threshold(enhancer: VariationalEnhancer, benign: Sequence[str], *, pass_rate: float = 0.98) -> float:
    """t: the smallest threshold with which at least `pass_rate` of the benign prompts have U95 < t, or rather the middle of the gap above it.

    In the middle, since at its lower end the last bits of one prompt's U95, which depend on the batch, would decide for that prompt.

    Raises
    ------
    ValueError
        When there are no benign prompts.
    """
    if not benign:
        raise ValueError("the threshold needs benign validation prompts; found none")
    upper = np.sort([d.risk_upper for d in enhancer.predict(benign)])
    last = float(upper[min(len(upper) - 1, math.ceil(pass_rate * len(upper)) - 1)])
    beyond = upper[upper > last + 1e-9]
    return float(np.clip((last + float(beyond[0] if len(beyond) else 1.0)) / 2, 1e-6, 1 - 1e-6))


def log_odds_of(distribution: RejectionDistribution) -> np.ndarray:
    """s_k = u_k - u_0 for every leaf, in nats; (K,)."""
    u = np.log(distribution.alpha)
    return np.asarray(u[1:] - u[0])


def edit_rate(a: str, b: str) -> float:
    """1 - similarity of the word sequences (Ratcliff-Obershelp), in [0, 1]."""
    return 1 - difflib.SequenceMatcher(None, a.lower().split(), b.lower().split(), autojunk=False).ratio()


def well_formed(candidate: str, prompt: str) -> bool:
    """Whether a candidate could be a prompt at all: some words, not overlong, no word three times in a row, no control characters."""
    words = candidate.split()
    if len(words) < 2 or len(candidate) > 3 * len(prompt) + 400 or not any(c.isalpha() for c in candidate):
        return False
    if any(ord(c) < 32 and c not in "\n\t" for c in candidate):
        return False
    return not re.search(r"\b(\w+)(?:\W+\1\b){2}", candidate, re.IGNORECASE)


def _score(distribution: RejectionDistribution) -> float:
    return float(log_odds(distribution.risk_upper))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
