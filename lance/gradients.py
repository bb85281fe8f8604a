"""Multi-way textual gradients: which spans drive which rejection category, verified, and said in words.

With u_k = ln alpha_k(x), the identity grad logit(rho_bar) = sum_k pi_k (grad u_k - grad u_0) is exact: the enhanced distribution is the set of mixing weights
of K category gradients. Each active category is explained on its own by integrated gradients of s_k = u_k - u_0 (Sundararajan, Taly and Yan, 2017), and
its spans are checked by occlusion. Textual gradients: ProTeGi (Pryzant et al., 2023), TextGrad (Yuksekgonul et al., 2024).
"""

import html
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lance.distribution import RejectionDistribution
from lance.encoder import Window
from lance.enhancer import VariationalEnhancer
from lance.taxonomy import Category, Taxonomy
from lance.words import content_words, extent, without, word_attributions


@dataclass(frozen=True)
class GradientConfig:
    """Limits of the gradient builder; the values are those of the book, chapter 5."""

    min_share: float = 0.1
    max_categories: int = 4
    steps: int = 16
    max_steps: int = 128
    completeness: float = 0.05
    max_spans: int = 3
    coverage: float = 0.6
    diffuse: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.min_share < 1 and self.max_categories >= 1 and 1 <= self.steps <= self.max_steps and self.max_spans >= 1):
            raise ValueError("expected 0 < min_share < 1, max_categories >= 1, 1 <= steps <= max_steps, max_spans >= 1")


@dataclass(frozen=True)
class GradientSpan:
    """A piece of the prompt, [start, end) in characters, that drives a category.

    `attribution` is its share of s_k by integrated gradients; `occlusion` is s_k(x) - s_k(x without the span), both within the riskiest window
    of the prompt and in nats of log odds.
    """

    text: str
    start: int
    end: int
    attribution: float
    occlusion: float


@dataclass(frozen=True)
class TextualGradient:
    """One direction of the gradient, for one category: as data, and as a paragraph that a refinement model can follow.

    `weight` is pi_k; `drop`, `keep` and `turn` are the direction; `stop` is the risk (U95) below which nothing more needs to change.
    `completeness_error` is that of the integrated gradients, relative to s_k(x) - s_k(baseline).
    """

    category: str
    name: str
    weight: float
    spans: tuple[GradientSpan, ...]
    drop: str
    keep: tuple[str, ...]
    turn: str
    stop: float
    completeness_error: float

    @property
    def text(self) -> str:
        """The gradient in words."""
        marked = ", ".join(f"“{s.text}” ({s.occlusion:+.1f})" for s in self.spans)
        where = f"It rests on {marked}. " if self.spans else "No single part of the prompt carries it. "
        keep = f" Keep {', '.join(f'“{w}”' for w in self.keep)}." if self.keep else ""
        return (
            f"{self.name} carries {self.weight:.0%} of the reasons against answering. {where}"
            f"Drop {self.drop or 'what the category names'};{keep or ' keep the topic.'} Then {self.turn or 'ask for what can be answered'}. "
            f"Stop when the upper risk is below {self.stop:.2f}; never hide the same wish in softer words."
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "weight": self.weight,
            "spans": [asdict(s) for s in self.spans],
            "text": self.text,
            "completeness_error": self.completeness_error,
        }


@dataclass(frozen=True)
class MultiWayGradient:
    """What the builder found for one prompt.

    `outcome` is `ok`, or a degenerate case by name: `low_risk` (nothing to change), `diffuse` (reasons too spread to point anywhere: ask), `vacuous`
    (too little evidence: ask), `whole_intent` (the spans cover most of the content: the intent itself is hazardous: decline).
    """

    outcome: str
    gradients: tuple[TextualGradient, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(g.text for g in self.gradients)

    def __iter__(self) -> Any:
        return iter(self.gradients)

    def __len__(self) -> int:
        return len(self.gradients)


class GradientBuilder:
    """Builds the multi-way gradient of a prompt.

    Parameters
    ----------
    enhancer : VariationalEnhancer
    threshold : float
        t: a prompt whose U95 lies below it has an empty gradient.
    vacuity_limit : float
        Above it there is too little evidence to point anywhere.
    """

    def __init__(self, enhancer: VariationalEnhancer, *, threshold: float, vacuity_limit: float = 0.5, config: GradientConfig | None = None) -> None:
        self.enhancer = enhancer
        self.threshold = threshold
        self.vacuity_limit = vacuity_limit
        self.config = config or GradientConfig()

    @property
    def taxonomy(self) -> Taxonomy:
        return self.enhancer.taxonomy

    def build(self, text: str, distribution: RejectionDistribution | None = None, *, check_degenerate: bool = True) -> MultiWayGradient:
        """The gradient of one prompt; every degenerate case has a named outcome."""
        alpha, windows = self.enhancer.predict_windows([text])
        distribution = distribution or RejectionDistribution(self.taxonomy.keys, alpha[0], self.taxonomy)
        if distribution.risk_upper < self.threshold:
            return MultiWayGradient("low_risk")
        if check_degenerate and distribution.vacuity > self.vacuity_limit:
            return MultiWayGradient("vacuous")
        if check_degenerate and distribution.share_entropy > self.config.diffuse:
            return MultiWayGradient("diffuse")
        active = self.active(distribution)
        gradients = tuple(self._explain(text, windows[0], key, weight) for key, weight in active)
        content = content_words(text)
        hazard = [s for g in gradients if self.taxonomy[g.category].response == "refuse_with_reason" for s in g.spans]
        covered = [w for w in content if any(s.start <= w[0] and w[1] <= s.end for s in hazard)]
        whole = check_degenerate and len(content) > 0 and len(covered) / len(content) > self.config.coverage
        return MultiWayGradient("whole_intent" if whole else "ok", gradients)

    def active(self, distribution: RejectionDistribution) -> list[tuple[str, float]]:
        """Categories with pi_k >= min_share, at most max_categories, by pi_k; at least the first."""
        ranked = sorted(distribution.shares.items(), key=lambda kv: -kv[1])
        chosen = [kv for kv in ranked if kv[1] >= self.config.min_share][: self.config.max_categories]
        return chosen or ranked[:1]

    def scores(self, texts: list[str]) -> Float[np.ndarray, "n k"]:
        """s_k = u_k - u_0 of each prompt, in nats."""
        log = np.log(self.enhancer.predict_alpha(texts))
        return np.asarray(log[:, 1:] - log[:, :1])

    def attributions(self, window: Window, key: str) -> tuple[Float[np.ndarray, " t"], float]:
        """Integrated gradients of s_k for each token of a window, and the relative completeness error.

        The path leads from the window with every ordinary token masked to the window itself. The number of steps doubles until the attributions sum to
        s_k(x) - s_k(baseline) within the tolerance, relative to that difference or to 0.25 nats, whichever is larger.
        """
        from captum.attr import LayerIntegratedGradients

        encoder, k = self.enhancer.encoder, self.taxonomy.index(key)
        ids, mask = encoder.collate([window])
        special = torch.tensor([[start == end for start, end in window.offsets]], device=ids.device)
        blank = encoder.tokenizer.mask_token_id or encoder.tokenizer.pad_token_id or 0
        baseline = torch.where(special, ids, torch.full_like(ids, blank))

        def score(tokens: Int[Tensor, "b t"], attention: Int[Tensor, "b t"]) -> Float[Tensor, " b"]:
            u = torch.log(self.enhancer.alpha_of(encoder.forward(tokens, attention).float()))
            return u[:, k] - u[:, 0]

        explainer = LayerIntegratedGradients(score, encoder.model.get_input_embeddings())  # type: ignore[operator]
        steps = self.config.steps
        with torch.no_grad():
            delta = float(score(ids, mask) - score(baseline, mask))
        with torch.enable_grad():
            while True:
                parts = explainer.attribute(ids, baselines=baseline, additional_forward_args=(mask,), n_steps=steps, internal_batch_size=32)
                values = parts.sum(-1)[0].detach().cpu().double().numpy()
                error = abs(values.sum() - delta) / max(abs(delta), 0.25)
                if error <= self.config.completeness or steps * 2 > self.config.max_steps:
                    return values, float(error)
                steps *= 2

    def _explain(self, text: str, window: Window, key: str, weight: float) -> TextualGradient:
        values, error = self.attributions(window, key)
        spans = self._spans(text, word_attributions(text, window, values))
        kept: list[GradientSpan] = []
        if spans:
            k = self.taxonomy.index(key) - 1
            low, high = extent(window)
            piece = text[low:high]
            s = self.scores([piece, *(without(piece, start - low, end - low) for start, end, _ in spans)])[:, k]
            for (start, end, value), score in zip(spans, s[1:], strict=True):
                occlusion = float(s[0] - score)
                if value > 0 and occlusion > 0:
                    kept.append(GradientSpan(text[start:end], start, end, value, occlusion))
        marked = [(s.start, s.end) for s in kept]
        keep = [text[a:b] for a, b in content_words(text) if not any(start <= a and b <= end for start, end in marked)]
        leaf: Category = self.taxonomy[key]
        return TextualGradient(key, leaf.name, weight, tuple(kept), leaf.drop, tuple(dict.fromkeys(keep))[:8], leaf.turn, self.threshold, error)

    def _spans(self, text: str, words: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
        """Neighbouring words with a strong attribution, merged; the strongest spans until they hold most of the positive mass."""
        positive = [w for _, _, w in words if w > 0]
        if not positive:
            return []
        floor = 0.3 * max(positive)
        runs: list[list[tuple[int, int, float]]] = []
        previous = -2
        for i, word in enumerate(words):
            if word[2] >= floor:
                runs.append([word]) if i != previous + 1 else runs[-1].append(word)
                previous = i
        spans = [(run[0][0], run[-1][1], sum(w for _, _, w in run)) for run in runs]
        spans = [s for s in spans if content_words(text[s[0] : s[1]])]
        spans.sort(key=lambda s: -s[2])
        out: list[tuple[int, int, float]] = []
        for span in spans[: self.config.max_spans]:
            if sum(s[2] for s in out) > 0.7 * sum(positive):
                break
            out.append(span)
        return out


def highlight_html(text: str, gradient: TextualGradient, colour: str) -> str:
    """The prompt with the spans of one gradient marked in a colour, for a notebook."""
    out, position = [], 0
    for s in sorted(gradient.spans, key=lambda s: s.start):
        out += [html.escape(text[position : s.start]), f'<mark style="background:{colour}55">{html.escape(text[s.start : s.end])}</mark>']
        position = s.end
    return "".join([*out, html.escape(text[position:])])
