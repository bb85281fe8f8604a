"""Lance: from a prompt to its rejection distribution, its gradients, a refined prompt and an answer."""

import html
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lance import prompts as prompt_texts
from lance import replies
from lance.chat import ChatModel, load_chat
from lance.corpus import load_corpus
from lance.distribution import RejectionDistribution
from lance.enhancer import VariationalEnhancer
from lance.errors import ModelError
from lance.fluency import CharLM
from lance.gradients import GradientBuilder, GradientConfig, MultiWayGradient, highlight_html
from lance.int8 import packed, unpacked
from lance.modelfiles import read_model_config, write_model_config
from lance.proposers import ChatProposer, ExemplarProposer, Proposer, ReframeProposer
from lance.refiner import Refinement, Refiner, RefinerConfig
from lance.taxonomy import Taxonomy
from lance.verifier import Verifier

FLUENCY_TEXTS = 1200  # enough for a character model, which is built anew in each process


@dataclass(frozen=True)
class Analysis:
    """A prompt, its rejection distribution, and its multi-way gradient."""

    prompt: str
    distribution: RejectionDistribution
    gradient: MultiWayGradient

    @property
    def gradients(self) -> tuple[Any, ...]:
        """One TextualGradient per active category, strongest first; empty for a prompt that passes."""
        return self.gradient.gradients

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            **self.distribution.to_dict(),
            "gradient_outcome": self.gradient.outcome,
            "gradients": [g.to_dict() for g in self.gradients],
        }

    def _repr_html_(self) -> str:
        rows = [f"<p>{html.escape(self.prompt)}</p>", self.distribution._repr_html_()]
        for g in self.gradients:
            colour = self.distribution.taxonomy[g.category].colour
            rows.append(f"<p><b>{html.escape(g.name)}</b> {g.weight:.2f}: {highlight_html(self.prompt, g, colour)}</p>")
        return "".join(rows)


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about.

    `kind` is `answered` (by a chat model), `ready` (nothing to answer with: the prompt to send), `clarify`, `declined` or `abstained`.
    """

    text: str
    kind: str
    refinement: Refinement

    def to_dict(self) -> dict[str, Any]:
        return {**self.refinement.to_dict(), "answer": self.text, "kind": self.kind}


class Lance:
    """The whole way, with everything it needs. Build it with `from_pretrained` or `lance.training.train`.

    Examples
    --------
    >>> lance = Lance.from_pretrained()                          # embedded models: offline, CPU   # doctest: +SKIP
    >>> lance.analyse("What are the names of Earth's two moons?").distribution                    # doctest: +SKIP
    RejectionDistribution(false_presupposition 0.91, ...; risk 0.97 [0.92, 1.00])
    """

    def __init__(
        self,
        enhancer: VariationalEnhancer,
        verifier: Verifier,
        *,
        threshold: float,
        vacuity_limit: float = 0.5,
        exemplars: Sequence[tuple[str, str]] | None = None,
        exemplar_vectors: np.ndarray | None = None,
        chat: ChatModel | None = None,
        gradient_config: GradientConfig | None = None,
        refiner_config: RefinerConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.enhancer, self.verifier, self.chat, self.seed = enhancer, verifier, chat, seed
        self.threshold, self.vacuity_limit = threshold, vacuity_limit
        pairs = list(exemplars) if exemplars is not None else ExemplarProposer.pairs_of(load_corpus("train"))
        self.builder = GradientBuilder(enhancer, threshold=threshold, vacuity_limit=vacuity_limit, config=gradient_config)
        self.exemplars = ExemplarProposer(enhancer.base, pairs, exemplar_vectors)
        proposers: list[Proposer] = [ReframeProposer(enhancer.taxonomy), self.exemplars]
        if chat is not None:
            proposers.insert(0, ChatProposer(chat, seed=seed))
        fluent = list(dict.fromkeys(target for _, target in pairs))
        fluency = CharLM(fluent[:: 1 + len(fluent) // FLUENCY_TEXTS]) if pairs else None
        self.refiner = Refiner(enhancer, self.builder, proposers, verifier, encoder=enhancer.base, threshold=threshold, fluency=fluency, config=refiner_config)

    @property
    def taxonomy(self) -> Taxonomy:
        return self.enhancer.taxonomy

    def __repr__(self) -> str:
        chat = self.chat.name if self.chat else None
        return f"Lance({self.taxonomy!r}, encoder={self.enhancer.base.name!r}, threshold={self.threshold:.3f}, chat={chat!r})"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        chat: str | ChatModel | None = None,
        model: str | None = None,
        adapter: str | Path | None = None,
        device: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "Lance":
        """Load the shipped weights, or those of a folder written by `save_pretrained` or `lance train`.

        Parameters
        ----------
        folder : path, optional
        chat : str or ChatModel, optional
            A hub id or folder of a causal model (with an optional PEFT `adapter`), or the URL of an OpenAI-compatible server together with `model`.
        device : str, optional
            `cpu` (default) or a CUDA device.
        options
            `gradient_config`, `refiner_config`.

        Raises
        ------
        ModelError
            When the folder is missing or incomplete, or a weight file was changed.
        ChatError
            When the chat model cannot be loaded.
        """
        folder = Path(folder) if folder is not None else Path(str(importlib.resources.files("lance") / "pretrained" / "default"))
        meta = read_model_config(folder)
        if meta.get("kind") != "lance":
            raise ModelError(f"{str(folder)!r} holds a {meta.get('kind', 'different kind of')} model, not a pipeline; give the folder that `lance train` wrote")
        if missing := {"threshold", "vacuity_limit"} - meta.keys():
            raise ModelError(f"{str(folder / 'config.json')!r} lacks {', '.join(sorted(missing))}; restore it or train again")
        enhancer = VariationalEnhancer.from_pretrained(folder / "enhancer", device=device)
        pairs = [tuple(p) for p in json.loads((folder / "exemplars.json").read_text(encoding="utf-8"))]
        stored = load_file(folder / "exemplars.safetensors")
        texts = len({text for pair in pairs for text in pair})
        if set(stored) != {"vectors", "scale"} or stored["vectors"].shape != (texts, enhancer.base.dim) or stored["scale"].shape != (texts, 1):
            raise ModelError(f"the vectors in {str(folder / 'exemplars.safetensors')!r} are not one for each text of exemplars.json; train again")
        return cls(
            enhancer,
            Verifier.from_pretrained(folder / "verifier"),
            threshold=meta["threshold"],
            vacuity_limit=meta["vacuity_limit"],
            exemplars=pairs,  # type: ignore[arg-type]
            exemplar_vectors=unpacked(stored["vectors"], stored["scale"]).numpy(),
            chat=load_chat(chat, model=model, adapter=adapter, device=device),
            seed=seed,
            **options,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write enhancer, verifier, exemplars and thresholds; safetensors and JSON only."""
        folder = Path(folder)
        self.enhancer.save_pretrained(folder / "enhancer")
        self.verifier.save_pretrained(folder / "verifier")
        vectors, scale = packed(torch.from_numpy(self.exemplars.vectors))
        save_file({"vectors": vectors, "scale": scale}, folder / "exemplars.safetensors")
        (folder / "exemplars.json").write_text(json.dumps(self.exemplars.pairs, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        meta = {"kind": "lance", "threshold": self.threshold, "vacuity_limit": self.vacuity_limit}
        write_model_config(folder, meta, ["exemplars.safetensors", "exemplars.json", "enhancer/config.json", "verifier/config.json"])

    @overload
    def analyse(self, prompts: str) -> Analysis: ...  # type: ignore[overload-overlap]
    @overload
    def analyse(self, prompts: Sequence[str]) -> list[Analysis]: ...
    def analyse(self, prompts: str | Sequence[str]) -> Analysis | list[Analysis]:
        """The rejection distribution and the multi-way gradient of one prompt or of each in a list."""
        texts = _texts(prompts)
        found = [Analysis(t, d, self.builder.build(t, d)) for t, d in zip(texts, self.enhancer.predict(texts), strict=True)]
        return found[0] if isinstance(prompts, str) else found

    def score(self, prompts: Sequence[str], batch_size: int | None = None) -> list[RejectionDistribution]:
        """Distributions alone, without gradients: what `lance score` writes. Costs one forward pass of the encoder."""
        return self.enhancer.predict(_texts(prompts), batch_size)

    @overload
    def refine(self, prompts: str) -> Refinement: ...  # type: ignore[overload-overlap]
    @overload
    def refine(self, prompts: Sequence[str]) -> list[Refinement]: ...
    def refine(self, prompts: str | Sequence[str]) -> Refinement | list[Refinement]:
        """The prompt to forward (or none), every step, and why the refiner stopped; for one prompt or each in a list."""
        found = self.refiner.refine(_texts(prompts))
        return found[0] if isinstance(prompts, str) else found

    @overload
    def respond(self, prompts: str) -> Reply: ...  # type: ignore[overload-overlap]
    @overload
    def respond(self, prompts: Sequence[str]) -> list[Reply]: ...
    def respond(self, prompts: str | Sequence[str]) -> Reply | list[Reply]:
        """An answer to one prompt or to each in a list.

        What passes or was refined goes to the chat model; without one, the reply is the prompt, ready to send. What is declined or to be clarified gets a
        constructive reply composed from the distribution.
        """
        found = [self._reply(r) for r in self.refiner.refine(_texts(prompts))]
        return found[0] if isinstance(prompts, str) else found

    def _reply(self, refinement: Refinement) -> Reply:
        if refinement.refined is not None:
            if self.chat is None:
                return Reply(replies.READY.format(prompt=refinement.refined), "ready", refinement)
            messages = [{"role": "system", "content": prompt_texts.ANSWER_SYSTEM}, {"role": "user", "content": refinement.refined}]
            return Reply(self.chat.reply(messages, seed=self.seed), "answered", refinement)
        if refinement.outcome == "abstained":
            return Reply(replies.ABSTAINED[refinement.reason], "abstained", refinement)
        return Reply(replies.constructive_reply(refinement.before, refinement.prompt), refinement.outcome, refinement)


def ask_record(reply: Reply) -> dict[str, Any]:
    """The object that `lance ask --json` prints; a stable contract for scripts."""
    r = reply.refinement
    d = r.before.to_dict()
    return {
        "prompt": r.prompt,
        "distribution": d["distribution"],
        "categories": d["categories"],
        "risk": d["risk"],
        "risk_upper": d["risk_upper"],
        "vacuity": d["vacuity"],
        "gradients": [g.to_dict() for g in r.gradient.gradients],
        "refined": r.refined,
        "outcome": r.outcome,
        "reason": r.reason,
        "steps": [s.to_dict() for s in r.steps],
        "risk_after": r.after.risk,
        "verifier_risk_after": r.to_dict()["verifier_risk_after"],
        "similarity": r.similarity,
        "answer": reply.text,
    }


def score_record(d: RejectionDistribution) -> dict[str, Any]:
    """The columns that `lance score` adds; a stable contract for scripts."""
    categories = d.by("category")
    return {
        "risk": d.risk,
        "risk_upper": d.risk_upper,
        "vacuity": d.vacuity,
        "top": d.top,
        "top_category": categories.top,
        "distribution": d.mean,
        "categories": categories.mean,
    }


def _texts(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {i} is {text!r}, a {type(text).__name__}; give a string or a list of strings")
    return texts
