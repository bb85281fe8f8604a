"""The network of the embedded rewriter: a small decoder that reads frozen token states, writes a prompt, and may copy.

Attention and layers are those of BERT (Devlin et al., NAACL 2019), so that they start from the encoder's own; the copying output is that of the
pointer-generator (See, Liu and Manning, ACL 2017).
"""

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
UNREACHABLE = -20.0  # ln p of a token that can be neither written nor copied: it should count, and not drown the rest


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart, so that they can be kept while a text grows."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def _split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t e"]:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def memory(self, x: Float[Tensor, "b t d"]) -> KeysValues:
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(self, x: Float[Tensor, "b q d"], memory: KeysValues, mask: Bool[Tensor, "#b 1 #q t"] | None) -> Float[Tensor, "b q d"]:
        mixed = nn.functional.scaled_dot_product_attention(self._split(self.query(x)), *memory, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class Layer(nn.Module):
    """Self-attention, attention to a memory where there is one, and a feed-forward block; each with a residual and a normalisation after it."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float, *, reads: bool) -> None:
        super().__init__()
        self.own, self.own_norm = Attention(dim, heads), nn.LayerNorm(dim, eps=1e-12)
        self.other = Attention(dim, heads) if reads else None
        self.other_norm = nn.LayerNorm(dim, eps=1e-12)
        self.up, self.down, self.norm = nn.Linear(dim, inner), nn.Linear(inner, dim), nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, own: KeysValues, own_mask: Tensor | None, other: KeysValues | None = None, other_mask: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        x = self.own_norm(x + self.dropout(self.own(x, own, own_mask)))
        if self.other is not None and other is not None:
            x = self.other_norm(x + self.dropout(self.other(x, other, other_mask)))
        out: Tensor = self.norm(x + self.dropout(self.down(nn.functional.gelu(self.up(x)))))
        return out

    def start_from(self, layer: Any) -> None:
        """Take the weights of a layer of a BERT encoder."""
        own, out = layer.attention.self, layer.attention.output
        for mine, theirs in (
            (self.own.query, own.query),
            (self.own.key, own.key),
            (self.own.value, own.value),
            (self.own.out, out.dense),
            (self.own_norm, out.LayerNorm),
            (self.up, layer.intermediate.dense),
            (self.down, layer.output.dense),
            (self.norm, layer.output.LayerNorm),
        ):
            mine.load_state_dict(theirs.state_dict())
        if self.other is not None:
            self.other.load_state_dict(self.own.state_dict())


class RewriterNetwork(nn.Module):
    """Mixes what is read (directions, prompt with marked spans, exemplar), and writes.

    The word vectors are those of the frozen encoder, going in and coming out, and are no part of the state.
    """

    vectors: Tensor
    vocabulary: Tensor
    slot: Tensor

    def __init__(
        self,
        vectors: Float[Tensor, "v d"],
        vocabulary: Int[Tensor, " w"],
        *,
        heads: int,
        inner: int,
        mixing_layers: int,
        layers: int,
        max_tokens: int,
        dropout: float,
    ) -> None:
        super().__init__()
        dim = vectors.shape[1]
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("vocabulary", vocabulary)
        slot = torch.full((len(vectors),), -1)
        slot[vocabulary.long()] = torch.arange(len(vocabulary))
        self.register_buffer("slot", slot, persistent=False)
        self.segments = nn.Parameter(torch.zeros(3, dim))  # direction, prompt, exemplar
        self.mark = nn.Parameter(torch.zeros(dim))
        self.strength = nn.Parameter(torch.zeros(dim))
        self.direction = nn.Linear(dim, dim)
        self.positions = nn.Embedding(max_tokens + 1, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.mixing = nn.ModuleList(Layer(dim, heads, inner, dropout, reads=False) for _ in range(mixing_layers))
        self.layers = nn.ModuleList(Layer(dim, heads, inner, dropout, reads=True) for _ in range(layers))
        self.before_words = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=1e-12))
        self.word_bias = nn.Parameter(torch.zeros(len(vocabulary)))
        self.pointer = nn.Linear(dim, dim, bias=False)
        self.copying = nn.Linear(2 * dim, 1)
        for p in (self.segments, self.mark, self.strength, self.positions.weight):
            nn.init.normal_(p, std=0.02)

    @property
    def mixers(self) -> list[Layer]:
        return cast(list[Layer], list(self.mixing))

    @property
    def writers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def read(
        self,
        directions: Float[Tensor, "b g d"],
        weights: Float[Tensor, "b g"],
        prompt: Float[Tensor, "b s d"],
        marks: Float[Tensor, "b s"],
        exemplar: Float[Tensor, "b e d"],
        seen: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "b m d"]:
        """The memory: g directions, s tokens of the prompt and e of the exemplar, mixed; m = g + s + e. `seen` is False where there is padding."""
        parts = [
            self.direction(directions) + weights.unsqueeze(-1) * self.strength + self.segments[0],
            prompt + marks.unsqueeze(-1) * self.mark + self.segments[1],
            exemplar + self.segments[2],
        ]
        x, mask = torch.cat(parts, dim=1), seen[:, None, None, :]
        for layer in self.mixers:
            x = layer(x, layer.own.memory(x), mask)
        return x

    def embed(self, ids: Int[Tensor, "b t"], start: int = 0) -> Float[Tensor, "b t d"]:
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        x: Tensor = self.dropout(self.norm(self.vectors[ids] + self.positions(places)))
        return x

    def write(self, ids: Int[Tensor, "b t"], memory: Float[Tensor, "b m d"], seen: Bool[Tensor, "b m"]) -> Float[Tensor, "b t d"]:
        """States of all positions of a text at once, each blind to what follows."""
        t = ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()[None, None]
        x = self.embed(ids)
        for layer, other in zip(self.writers, self.others(memory), strict=True):
            x = layer(x, layer.own.memory(x), causal, other, seen[:, None, None, :])
        return x

    def others(self, memory: Float[Tensor, "b m d"]) -> list[KeysValues]:
        """Keys and values of the memory, for each layer that writes."""
        return [layer.other.memory(memory) for layer in self.writers if layer.other is not None]

    def step(
        self, ids: Int[Tensor, "b 1"], at: int, kept: list[KeysValues | None], others: list[KeysValues], seen: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b 1 d"]:
        """The state of one further position; `kept` grows by its keys and values."""
        x = self.embed(ids, at)
        for i, layer in enumerate(self.writers):
            keys, values = layer.own.memory(x)
            if (before := kept[i]) is not None:
                keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
            kept[i] = (keys, values)
            x = layer(x, (keys, values), None, others[i], seen[:, None, None, :])
        return x

    def mixture(
        self, x: Float[Tensor, "b t d"], memory: Float[Tensor, "b m d"], copyable: Bool[Tensor, "b m"]
    ) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b t m"]]:
        """ln of the probability of writing each word of the vocabulary, and of copying from each place of the memory; together they sum to 1."""
        scores = self.pointer(x) @ memory.transpose(1, 2) / math.sqrt(x.shape[-1])
        scores = scores.masked_fill(~copyable[:, None, :], -1e4)
        places = torch.log_softmax(scores, dim=-1)
        gate = self.copying(torch.cat([x, places.exp() @ memory], dim=-1))
        words = torch.log_softmax(self.before_words(x) @ self.vectors[self.vocabulary.long()].T + self.word_bias, dim=-1)
        return words + nn.functional.logsigmoid(-gate), places + nn.functional.logsigmoid(gate)

    def log_likelihood(
        self, words: Float[Tensor, "b t w"], places: Float[Tensor, "b t m"], targets: Int[Tensor, "b t"], read_ids: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b t"]:
        """ln p of each target token, written or copied; `read_ids` are the tokens at the places of the memory, -1 where there is none."""
        slot = self.slot[targets]
        written = words.gather(-1, slot.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_fill(slot < 0, UNREACHABLE)
        copied = places.masked_fill(read_ids[:, None, :] != targets[:, :, None], UNREACHABLE).logsumexp(-1)
        return torch.logaddexp(written, copied)

    def probabilities(self, words: Float[Tensor, "b w"], places: Float[Tensor, "b m"], read_ids: Int[Tensor, "b m"]) -> Float[Tensor, "b v"]:
        """Probability of each token of the encoder's vocabulary at one position."""
        out = torch.zeros(len(words), len(self.vectors), device=words.device)
        out[:, self.vocabulary.long()] = words.exp()
        return out.scatter_add_(1, read_ids.clamp_min(0), places.exp() * (read_ids >= 0))
