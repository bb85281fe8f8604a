"""Where rewrites come from. A proposer suggests; the refiner's gate decides.

Anything with a `name` and `propose(text, gradient, n)` is a proposer: exemplars of the corpus, the taxonomy's reframings, the embedded rewriter, any chat
model.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from lance import prompts
from lance.chat import ChatModel
from lance.corpus import Prompt
from lance.encoder import PromptEncoder
from lance.errors import ChatError
from lance.gradients import MultiWayGradient
from lance.int8 import packed, unpacked
from lance.rewriter import Rewriter, RewriteRequest, direction
from lance.taxonomy import Taxonomy
from lance.words import content_words

DETERMINED = re.compile(r"\b(?:an?|the|my|your|his|her|its|our|their|this|that|some)\s+(?:own\s+)?([^\W\d_]{3,})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A proposed rewrite and the proposer it came from."""

    text: str
    proposer: str


@runtime_checkable
class Proposer(Protocol):
    """Suggests rewrites of a prompt that follow its multi-way gradient."""

    name: str

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]: ...


class ReframeProposer:
    """Turns the whole prompt by the `reframe` patterns of its active categories.

    Categories whose goal itself is the hazard have no patterns: their prompts are never passed on inside another.
    """

    name = "reframe"

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]:
        leaves = [self.taxonomy[g.category] for g in gradient]
        if any(leaf.response == "refuse_with_reason" and g.weight >= 0.3 for leaf, g in zip(leaves, gradient, strict=True)):
            return []
        patterns = [p for leaf in leaves for p in leaf.reframe]
        fresh = [p for p in patterns if not all(part.strip() in text for part in p.split("{prompt}"))]
        return [Candidate(p.replace("{prompt}", text.strip()), self.name) for p in fresh][:n]


class ExemplarProposer:
    """The nearest rewrites and contrast prompts of a corpus, as they are and adapted to the words of the prompt.

    Parameters
    ----------
    encoder : PromptEncoder
        The frozen encoder.
    pairs : sequence of (source, target)
        A prompt of the corpus and what it became; a benign exemplar stands for itself.
    vectors : float array (m, D), optional
        Embeddings of the m distinct texts of the pairs, in the order in which they first occur, if they are at hand.
    """

    name = "exemplar"

    def __init__(self, encoder: PromptEncoder, pairs: Sequence[tuple[str, str]], vectors: np.ndarray | None = None) -> None:
        self.encoder = encoder
        self.pairs = list(pairs)
        texts = {text: i for i, text in enumerate(dict.fromkeys(t for pair in self.pairs for t in pair))}
        self.sides = np.array([[texts[t] for t in pair] for pair in self.pairs], dtype=np.int64).reshape(-1, 2).T  # rows of `vectors`: of sources, of targets
        if vectors is None:
            vectors = encoder.encode(list(texts)).numpy()
        if vectors.shape != (len(texts), encoder.dim):
            raise ValueError(f"expected vectors of shape {(len(texts), encoder.dim)}, one for each distinct text of the exemplars, found {vectors.shape}")
        self.vectors = unpacked(*packed(torch.from_numpy(vectors))).numpy()  # as they are stored, so that saving changes nothing

    @staticmethod
    def pairs_of(corpus: Sequence[Prompt]) -> list[tuple[str, str]]:
        """Exemplars of a corpus: each noncompliant prompt with its rewrites, each contrast prompt with itself."""
        out = [(p.text, r) for p in corpus for r in p.refined]
        return out + [(p.text, p.text) for p in corpus if p.benign and p.twin]

    def nearest(self, text: str, n: int = 8) -> list[tuple[str, str]]:
        """The pairs whose source and target are most similar to a prompt, best first."""
        if not self.pairs:
            return []
        x = self.encoder.encode([text])[0].numpy()
        source_cosine, target_cosine = (self.vectors @ x)[self.sides]
        return [self.pairs[i] for i in np.argsort(-(0.5 * source_cosine + target_cosine), kind="stable")[:n]]

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]:
        out: list[Candidate] = []
        for source, target in self.nearest(text, n):
            adapted = self.adapt(text, source, target)
            if adapted:
                out.append(Candidate(adapted, "adapted exemplar"))
            out.append(Candidate(target, self.name))
        return list(dict.fromkeys(out))

    def adapt(self, text: str, source: str, target: str) -> str | None:
        """The target with the things that it shares with its source exchanged for the closest things of the prompt; None when there are none.

        Only words that follow an article or possessive are exchanged, for others that do: nouns, as a rule, so that the grammar holds.
        """
        own, theirs, named = _words(text), _words(source), _objects(target)
        free = [w for w in _objects(text) if w not in theirs]
        kept = [w for w in theirs if w not in own and w in named]
        if not free or not kept:
            return None
        vectors = self.encoder.encode([*kept, *free]).numpy()
        similarity = vectors[: len(kept)] @ vectors[len(kept) :].T
        out, used = target, set()
        for i in np.argsort(-similarity.max(1)):
            j = int(similarity[i].argmax())
            if similarity[i, j] < 0.6 or j in used:
                continue
            used.add(j)
            out = re.sub(rf"\b{re.escape(kept[i])}\b", lambda m, w=free[j]: w.capitalize() if m.group()[0].isupper() else w, out, flags=re.IGNORECASE)  # type: ignore[misc]
        return out if used else None


class RewriteProposer:
    """Rewrites by the embedded sequence-to-sequence model: one for each of the nearest exemplars, and one without any."""

    name = "rewriter"

    def __init__(self, rewriter: Rewriter, exemplars: ExemplarProposer) -> None:
        self.rewriter, self.exemplars = rewriter, exemplars

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 8) -> list[Candidate]:
        spans = tuple((s.start, s.end) for g in gradient for s in g.spans)
        directions = tuple((g.weight, direction(g.name, g.drop, g.turn)) for g in gradient)
        shown = dict.fromkeys([*(target for _, target in self.exemplars.nearest(text, n - 1)), ""])
        written = self.rewriter.rewrite([RewriteRequest(text, spans, directions, exemplar) for exemplar in shown])
        return [Candidate(t, self.name) for t in dict.fromkeys(written) if t]


class ChatProposer:
    """Asks a chat model for rewrites that follow the gradient; one retry when the reply is not the list that was asked for."""

    name = "chat"

    def __init__(self, chat: ChatModel, *, temperature: float = 0.7, seed: int = 0) -> None:
        self.chat, self.temperature, self.seed = chat, temperature, seed

    def propose(self, text: str, gradient: MultiWayGradient, n: int = 4) -> list[Candidate]:
        """Raises ChatError when the model cannot be reached; malformed replies after the retry give no candidate."""
        messages = [
            {"role": "system", "content": prompts.REFINE_SYSTEM.format(n=min(n, 4))},
            {"role": "user", "content": prompts.REFINE_USER.format(prompt=text, gradient=gradient.text)},
        ]
        for attempt in range(2):
            reply = self.chat.reply(messages, temperature=self.temperature, seed=self.seed + attempt)
            try:
                return [Candidate(t, self.name) for t in parse_rewrites(reply)][:n]
            except ChatError:
                messages = [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": prompts.REFINE_RETRY}]
        return []


def parse_rewrites(reply: str) -> list[str]:
    """The rewrites in a model's reply: a JSON list of non-empty strings, alone or in a fenced block.

    Raises
    ------
    ChatError
        When the reply is anything else.
    """
    body = reply.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", body, re.DOTALL)
    try:
        data = json.loads(fenced.group(1) if fenced else body)
    except ValueError as error:
        raise ChatError(f"expected a JSON list of strings, found {reply[:80]!r}") from error
    if not isinstance(data, list) or not data or not all(isinstance(t, str) and t.strip() for t in data):
        raise ChatError(f"expected a JSON list of non-empty strings, found {reply[:80]!r}")
    return [t.strip() for t in data]


def _objects(text: str) -> list[str]:
    """Words of three letters or more that follow an article, a possessive or another determiner, folded."""
    return list(dict.fromkeys(m.group(1).lower() for m in DETERMINED.finditer(text)))


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(text[a:b].lower() for a, b in content_words(text)))
