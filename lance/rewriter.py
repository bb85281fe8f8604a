"""The embedded rewriter: it reads a prompt, the directions of its gradient and an exemplar, and writes a refined prompt.

Retrieve and edit (Hashimoto, Guu, Oren and Liang, NeurIPS 2018): what a small model cannot know, a rewrite of a similar prompt shows it; what it must keep, it
copies. The encoder stays frozen, so that its token states are computed once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from lance.encoder import PromptEncoder
from lance.errors import ModelError
from lance.int8 import packed, unpacked
from lance.modelfiles import read_model_config, write_model_config
from lance.seq2seq import KeysValues, RewriterNetwork
from lance.spelling import cased, joined


@dataclass(frozen=True)
class RewriteRequest:
    """What the rewriter reads: a prompt, the spans to neutralise as [start, end) in characters, the directions as (weight, sentence), and the rewrite of a
    similar prompt, or nothing."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    directions: tuple[tuple[float, str], ...] = ()
    exemplar: str = ""


def direction(name: str, drop: str, turn: str) -> str:
    """How the rewriter is told of one direction of a gradient: its category, what to drop, and where to turn."""
    return f"{name}: drop {drop or 'what the category names'}; {turn or 'ask for what can be answered'}"


@dataclass(frozen=True)
class RewriterConfig:
    """Size and training of the rewriter. Lengths are in tokens; what is longer is cut. `lr` is AdamW's."""

    mixing_layers: int = 1
    layers: int = 4
    prompt_tokens: int = 96
    exemplar_tokens: int = 48
    max_tokens: int = 64
    dropout: float = 0.1
    epochs: int = 5
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mixing_layers", "layers", "prompt_tokens", "exemplar_tokens", "max_tokens", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)!r}")
        if not self.lr > 0 or not 0 <= self.dropout < 1:
            raise ValueError("expected lr > 0 and dropout in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Read:
    """A batch of requests as tensors: the arguments of `RewriterNetwork.read`, the tokens at the places of the memory (-1: none), and which places are seen."""

    directions: Float[Tensor, "b g d"]
    weights: Float[Tensor, "b g"]
    prompt: Float[Tensor, "b s d"]
    marks: Float[Tensor, "b s"]
    exemplar: Float[Tensor, "b e d"]
    seen: Bool[Tensor, "b m"]
    ids: Int[Tensor, "b m"]


@dataclass(frozen=True)
class Tokens:
    """A text as the frozen encoder sees it: ids, offsets, states (t, D) in half precision."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    states: Tensor


class Rewriter:
    """Writes refined prompts.

    Parameters
    ----------
    encoder : PromptEncoder
        The frozen encoder; one of the BERT kind, whose layers the decoder starts from.
    config : RewriterConfig, optional
    """

    def __init__(self, encoder: PromptEncoder, config: RewriterConfig | None = None) -> None:
        self.encoder, self.config = encoder, config or RewriterConfig()
        self.network: RewriterNetwork | None = None
        self.history: list[dict[str, float]] = []
        tok = encoder.tokenizer
        self.start, self.end = tok.cls_token_id, tok.sep_token_id
        if self.start is None or self.end is None or not hasattr(encoder.model, "embeddings"):
            raise ModelError(f"the rewriter starts from an encoder of the BERT kind, with [CLS] and [SEP]; {encoder.name!r} is none")

    # ---------------------------------------------------------------- reading

    @torch.inference_mode()
    def tokens(self, texts: Sequence[str], limit: int) -> list[Tokens]:
        """Token states of texts under the frozen encoder, special tokens included, cut to a number of tokens."""
        enc = self.encoder.tokenizer([t or " " for t in texts], truncation=True, max_length=limit, return_offsets_mapping=True)
        out: list[Tokens | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(enc["input_ids"][i]))
        pad, model = self.encoder.tokenizer.pad_token_id or 0, self.encoder.model
        for at in range(0, len(order), 64):
            rows = order[at : at + 64]
            ids, mask = padded([enc["input_ids"][i] for i in rows], pad)
            hidden = model(input_ids=ids.to(self.encoder.device), attention_mask=mask.long().to(self.encoder.device)).last_hidden_state.cpu()
            for row, i in enumerate(rows):
                n = len(enc["input_ids"][i])
                out[i] = Tokens(list(enc["input_ids"][i]), list(map(tuple, enc["offset_mapping"][i])), hidden[row, :n].half())
        return [t for t in out if t is not None]

    def collate(self, requests: Sequence[RewriteRequest], prompts: Sequence[Tokens], exemplars: Sequence[Tokens], sentences: dict[str, Tensor]) -> Read:
        """Requests as one batch; `sentences` has the embedding of each direction."""
        b, dim, special = len(requests), self.encoder.dim, set(self.encoder.tokenizer.all_special_ids)
        g = max(1, max(len(r.directions) for r in requests))
        s, e = max(len(t.ids) for t in prompts), max(len(t.ids) for t in exemplars)
        directions, weights = torch.zeros(b, g, dim), torch.zeros(b, g)
        marks, seen = torch.zeros(b, s), torch.zeros(b, g + s + e, dtype=torch.bool)
        prompt, exemplar, ids = torch.zeros(b, s, dim), torch.zeros(b, e, dim), torch.full((b, g + s + e), -1)
        for i, (r, p, x) in enumerate(zip(requests, prompts, exemplars, strict=True)):
            for j, (weight, sentence) in enumerate(r.directions):
                directions[i, j], weights[i, j], seen[i, j] = sentences[sentence], weight, True
            n = len(p.ids)
            prompt[i, :n], seen[i, g : g + n] = p.states.float(), True
            marks[i, :n] = torch.tensor([float(any(a < hi and lo < b_ for lo, hi in r.spans)) if b_ > a else 0.0 for a, b_ in p.offsets])
            ids[i, g : g + n] = torch.tensor([-1 if t in special else t for t in p.ids])
            if r.exemplar:
                n = len(x.ids)
                exemplar[i, :n], seen[i, g + s : g + s + n] = x.states.float(), True
                ids[i, g + s : g + s + n] = torch.tensor([-1 if t in special else t for t in x.ids])
        device = self.encoder.device
        return Read(*(t.to(device) for t in (directions, weights, prompt, marks, exemplar, seen, ids)))

    def sentences(self, requests: Sequence[RewriteRequest]) -> dict[str, Tensor]:
        texts = list(dict.fromkeys(text for r in requests for _, text in r.directions))
        return dict(zip(texts, self.encoder.encode(texts), strict=True))

    def new_network(self, vocabulary: Sequence[int]) -> RewriterNetwork:
        """A network whose layers start from those of the encoder, evenly spaced."""
        model: Any = self.encoder.model  # of the BERT kind
        c, layers = self.config, list(model.encoder.layer)
        net = RewriterNetwork(
            model.embeddings.word_embeddings.weight.detach(),
            torch.tensor(sorted(vocabulary), dtype=torch.int32),
            heads=int(model.config.num_attention_heads),
            inner=int(model.config.intermediate_size),
            mixing_layers=c.mixing_layers,
            layers=c.layers,
            max_tokens=c.max_tokens,
            dropout=c.dropout,
        )
        with torch.no_grad():
            for layer, i in zip(net.mixers, np.linspace(0, len(layers) - 1, c.mixing_layers).round().astype(int).tolist(), strict=True):
                layer.start_from(layers[-1 - i])
            for layer, i in zip(net.writers, np.linspace(0, len(layers) - 1, c.layers).round().astype(int).tolist(), strict=True):
                layer.start_from(layers[i])
            places = model.embeddings.position_embeddings.weight + model.embeddings.token_type_embeddings.weight[0]
            net.positions.weight.copy_(places[: c.max_tokens + 1])
            net.norm.load_state_dict(model.embeddings.LayerNorm.state_dict())
            net.direction.weight.copy_(torch.eye(self.encoder.dim))
            net.pointer.weight.copy_(torch.eye(self.encoder.dim))
        return net.to(self.encoder.device)

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of what is to be written, its end included."""
        limit = self.config.max_tokens
        return [[*ids[: limit - 1], self.end] for ids in self.encoder.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def likelihood(self, net: RewriterNetwork, read: Read, targets: list[list[int]]) -> tuple[Tensor, int]:
        """Sum of ln p over the tokens of the targets, and how many there are."""
        ids, mask = padded(targets, -1)
        ids, mask = ids.to(read.ids.device), mask.to(read.ids.device)
        before = torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, :-1].clamp_min(0)], dim=1)
        memory = net.read(read.directions, read.weights, read.prompt, read.marks, read.exemplar, read.seen)
        words, places = net.mixture(net.write(before, memory, read.seen), memory, read.ids >= 0)
        return (net.log_likelihood(words, places, ids.clamp_min(0), read.ids) * mask).sum(), int(mask.sum())

    @torch.inference_mode()
    def loss(self, pairs: Sequence[tuple[RewriteRequest, str]]) -> float:
        """Mean negative log-likelihood of the targets, in nats a token."""
        net, targets = self._fitted(), self.targets([t for _, t in pairs])
        training = net.training
        net.eval()
        total = count = 0.0
        for at in range(0, len(pairs), 32):
            likelihood, tokens = self.likelihood(net, self._read([r for r, _ in pairs[at : at + 32]]), targets[at : at + 32])
            total, count = total + float(likelihood), count + tokens
        net.train(training)
        return -total / count

    # ---------------------------------------------------------------- writing

    def _fitted(self) -> RewriterNetwork:
        if self.network is None:
            raise ModelError("this rewriter is not fitted; call fit, or Rewriter.from_pretrained(folder)")
        return self.network

    def _read(self, requests: Sequence[RewriteRequest]) -> Read:
        c = self.config
        texts, shown = list(dict.fromkeys(r.text for r in requests)), list(dict.fromkeys(r.exemplar for r in requests))
        states = dict(zip(texts, self.tokens(texts, c.prompt_tokens), strict=True))
        examples = dict(zip(shown, self.tokens(shown, c.exemplar_tokens), strict=True))
        return self.collate(requests, [states[r.text] for r in requests], [examples[r.exemplar] for r in requests], self.sentences(requests))

    @torch.inference_mode()
    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[str]:
        """One refined prompt for each request, the likeliest token at each step; no three tokens in a row come twice."""
        if not requests:
            return []
        net, read = self._fitted(), self._read(requests)
        memory = net.read(read.directions, read.weights, read.prompt, read.marks, read.exemplar, read.seen)
        others = net.others(memory)
        kept: list[KeysValues | None] = [None] * len(net.writers)
        b = len(requests)
        written: list[list[int]] = [[] for _ in range(b)]
        ids, done = torch.full((b, 1), self.start, device=memory.device), [False] * b
        for at in range(self.config.max_tokens):
            x = net.step(ids, at, kept, others, read.seen)
            words, places = net.mixture(x, memory, read.ids >= 0)
            p = net.probabilities(words[:, 0], places[:, 0], read.ids)
            for i, out in enumerate(written):
                p[i, list(_banned(out))] = 0
            chosen = p.argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                if token == self.end:
                    done[i] = True
                if not done[i]:
                    written[i].append(token)
            if all(done):
                break
            ids = chosen.unsqueeze(1)
        decode = self.encoder.tokenizer.decode
        return [cased(joined(str(decode(out, skip_special_tokens=True))), r.text, r.exemplar) for out, r in zip(written, requests, strict=True)]

    # ----------------------------------------------------------------- saving

    @torch.no_grad()
    def round(self) -> None:
        """Round to what is stored, so that what is measured is what will be loaded."""
        for p in self._fitted().parameters():
            p.copy_(unpacked(*packed(p)) if p.ndim > 1 else p.half())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: matrices in one byte a number, the rest in half precision."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = {"vocabulary": self._fitted().vocabulary.cpu()}
        for name, p in self._fitted().named_parameters():
            if p.ndim > 1:
                state[name], state[f"{name}.scale"] = packed(p)
            else:
                state[name] = p.detach().half().cpu()
        save_file(state, folder / "model.safetensors")
        enc = self.encoder
        meta = {"encoder": {"name": enc.name, "revision": enc.revision}, "config": self.config.to_dict(), "history": self.history}
        write_model_config(folder, meta, ["model.safetensors"])

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder: PromptEncoder) -> "Rewriter":
        """Load what `save_pretrained` wrote; `encoder` is the frozen one that it was trained on.

        Raises
        ------
        ModelError
            When the folder or a file is missing or wrong, or the encoder is another.
        """
        folder = Path(folder)
        meta = read_model_config(folder)
        if meta["encoder"]["name"] != encoder.name:
            raise ModelError(f"the rewriter in {str(folder)!r} reads the encoder {meta['encoder']['name']!r}, not {encoder.name!r}; train one for it")
        try:
            out = cls(encoder, RewriterConfig(**meta["config"]))
            stored = load_file(folder / "model.safetensors")
            net = out.new_network(stored["vocabulary"].tolist())
            for name, p in net.named_parameters():
                value = unpacked(stored[name], stored[f"{name}.scale"]) if p.ndim > 1 else stored[name].float()
                if value.shape != p.shape:
                    raise ModelError(f"the weights in {str(folder)!r} do not fit its config.json: {name} is {tuple(value.shape)}, not {tuple(p.shape)}")
                p.data.copy_(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the rewriter in {str(folder)!r} is incomplete or of another version ({error}); train it again") from error
        out.network, out.history = net.eval().requires_grad_(False), list(meta.get("history", []))
        return out


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[pad] * (width - len(r))] for r in rows])
    return ids, torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows])


def _banned(written: Sequence[int]) -> set[int]:
    """Tokens that would end a run of three that is there already, or be the same for the third time."""
    out = {c for a, b, c in zip(written, written[1:], written[2:], strict=False) if tuple(written[-2:]) == (a, b)}
    if len(written) >= 2 and written[-1] == written[-2]:
        out.add(written[-1])
    return out
