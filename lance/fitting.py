"""Fitting a variational label enhancer: its settings, the rows and their batches, and the ascent of the objective."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lance.corpus import Labels, Prompt
from lance.encoder import PromptEncoder, Window, training_autocast
from lance.network import Ascent, EnhancerNetwork
from lance.objective import ObjectiveWeights, anchor_term, dirichlet_prior, evidence_bound, label_term, pair_term
from lance.taxonomy import Taxonomy


@dataclass(frozen=True)
class EnhancerConfig:
    """Everything that decides how an enhancer is trained.

    `layers` counts the hidden layers of q(d | x); `hidden` is their width and that of the decoder. `adaptation` says what of the encoder is trained along:
    nothing ("frozen"), a LoRA adapter of rank `lora_rank` ("lora"), or all linear layers ("full"), at the rate `encoder_lr`. Twins always share a batch, so
    that `weights.pair` can rank them. `train_tokens` cuts long prompts, in training only. `kl_warmup` is the share of the steps over which the KL weights
    rise from 0. Learning rates are AdamW's.

    An encoder that was trained rests for `head_epochs` more, in which the network alone is trained (last-layer retraining: Kirichenko, Izmailov and Wilson,
    ICLR 2023). In these, `outliers` is the share of further rows that are random word pieces and of which nothing is known: only the label-free terms have a
    say on them, so that where there is no reason for evidence there is little (outlier exposure: Hendrycks, Mazeika and Dietterich, ICLR 2019).

    For ablations: `anchors` "permuted" ties each leaf to the anchor of the next one, "none" lets the directions b start at random, as long as the anchors
    are, with nothing to hold them; `prior` "flat" is Dir(1, ..., 1); with `start` "base_rate" the mean of q(d | x) starts from the rates of the labels.
    """

    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    layers: int = 1
    hidden: int = 256
    latent_dim: int = 10
    dropout: float = 0.5
    epochs: int = 30
    batch_size: int = 128
    lr: float = 2e-3
    adaptation: Literal["frozen", "lora", "full"] = "frozen"
    lora_rank: int = 16
    encoder_lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 5.0
    kl_warmup: float = 0.25
    train_tokens: int = 128
    head_epochs: int = 2
    outliers: float = 0.04
    anchors: Literal["taxonomy", "permuted", "none"] = "taxonomy"
    prior: Literal["base_rate", "flat"] = "base_rate"
    start: Literal["even", "base_rate"] = "even"
    seeds_per_anchor: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "epochs", "batch_size", "train_tokens", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)!r}")
        for name in ("lr", "encoder_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, found {getattr(self, name)!r}")
        choices = {
            "adaptation": ("frozen", "lora", "full"),
            "anchors": ("taxonomy", "permuted", "none"),
            "prior": ("base_rate", "flat"),
            "start": ("even", "base_rate"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, found {getattr(self, name)!r}")
        if not (0 <= self.kl_warmup <= 1 and 0 <= self.outliers <= 1 and 0 <= self.dropout < 1) or min(self.latent_dim, self.head_epochs) < 0:
            raise ValueError("expected kl_warmup and outliers in [0, 1], dropout in [0, 1), latent_dim >= 0 and head_epochs >= 0")

    @classmethod
    def lora(cls, **changes: Any) -> "EnhancerConfig":
        """A LoRA adapter trained along: fewer epochs, smaller batches, a posterior that reads the embedding linearly."""
        given: dict[str, Any] = {
            "adaptation": "lora",
            "layers": 0,
            "hidden": 128,
            "dropout": 0.1,
            "epochs": 2,
            "batch_size": 32,
            "lr": 1e-3,
            "encoder_lr": 2e-3,
        } | changes
        return cls(**given)

    @classmethod
    def full(cls, **changes: Any) -> "EnhancerConfig":
        """The settings of the shipped weights: as `lora`, with full fine-tuning of the encoder's linear layers."""
        return cls.lora(**({"adaptation": "full", "encoder_lr": 1e-4} | changes))

    @property
    def trains_encoder(self) -> bool:
        return self.adaptation != "frozen"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EnhancerConfig":
        return cls(**{**data, "weights": ObjectiveWeights(**data.get("weights", {}))})


@dataclass(frozen=True)
class TrainingRows:
    """What the optimiser sees: the first window of each prompt, its frozen embedding x (n, D), its label; rows of each pair of twins (noncompliant, benign)."""

    windows: list[Window]
    x: Tensor
    labels: Labels
    pairs: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[Prompt], labels: Labels, encoder: PromptEncoder, tokens: int) -> "TrainingRows":
        windows = first_windows(encoder, [p.text for p in prompts], tokens)
        return cls(windows, encoder.embed(windows), labels, twin_pairs(prompts))

    def with_outliers(self, share: float, encoder: PromptEncoder, rng: np.random.Generator) -> "TrainingRows":
        """These rows and random word pieces, as long as they are, `share` times as many; each coordinate is a candidate there, so the label term is 0."""
        n = round(share * len(self.windows))
        if n == 0:
            return self
        pieces = np.array(sorted(i for piece, i in encoder.tokenizer.get_vocab().items() if not (piece.startswith("[") and piece.endswith("]"))))
        lengths = [max(1, len(self.windows[i].ids) - 2) for i in rng.integers(len(self.windows), size=n)]
        texts = [encoder.tokenizer.decode(rng.choice(pieces, length), skip_special_tokens=True) for length in lengths]
        windows = first_windows(encoder, texts, max(len(w.ids) for w in self.windows))
        everything = np.ones((n, self.labels.candidates.shape[1]), dtype=bool)
        labels = Labels(np.r_[self.labels.candidates, everything], np.r_[self.labels.eta, np.zeros(n)], np.r_[self.labels.known, np.ones(n, dtype=bool)])
        return TrainingRows([*self.windows, *windows], torch.cat([self.x, encoder.embed(windows)]), labels, self.pairs)


def twin_pairs(prompts: Sequence[Prompt]) -> np.ndarray:
    """Indices (p, 2) of the noncompliant and the benign half of each pair of twins among the prompts."""
    index = {p.id: i for i, p in enumerate(prompts) if p.id}
    found = [(i, index[p.twin]) for i, p in enumerate(prompts) if p.twin in index and not p.benign and prompts[index[p.twin]].benign]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def new_network(rows: TrainingRows, taxonomy: Taxonomy, encoder: PromptEncoder, config: EnhancerConfig, base_rate: float) -> EnhancerNetwork:
    """A network whose scales, prior and directions b start from the rows: b_k = e_k, the anchors."""
    net = EnhancerNetwork(encoder.dim, len(taxonomy), layers=config.layers, hidden=config.hidden, latent_dim=config.latent_dim, dropout=config.dropout)
    scaled = net.scaled(rows.x)
    net.centre.copy_(scaled.mean(0))
    net.spread.copy_(scaled.std(0).clamp_min(1e-3))
    if config.prior == "base_rate":
        net.prior.copy_(dirichlet_prior(len(taxonomy), base_rate))
    anchors = _anchors(rows, taxonomy, encoder, net, config.seeds_per_anchor)
    if config.anchors == "permuted":
        anchors = anchors.roll(-1, dims=0)
    elif config.anchors == "none":
        anchors = anchors.norm(dim=-1).mean() * torch.nn.functional.normalize(torch.randn_like(anchors), dim=-1)
    net.anchors.copy_(anchors)
    with torch.no_grad():
        net.directions.copy_(net.anchors)
        if config.start == "base_rate":
            rates = (rows.labels.candidates / rows.labels.candidates.sum(1, keepdims=True)).mean(0)
            net.alpha_head.bias.copy_(torch.from_numpy(np.log(len(rates) * np.maximum(rates, 1e-3))))
    return net.to(encoder.device)


def _anchors(rows: TrainingRows, taxonomy: Taxonomy, encoder: PromptEncoder, net: EnhancerNetwork, most: int) -> Tensor:
    """e_k: mean embedding of the leaf's description and of its own seed prompts (where leaves are known), minus the benign mean."""
    candidates, x = rows.labels.candidates, rows.x
    described = encoder.encode([leaf.anchor for leaf in taxonomy.leaves])
    benign = net.scaled(x[torch.from_numpy(candidates[:, 0])]).mean(0)
    single = candidates.sum(1) == 1
    out = []
    for k in range(1, len(taxonomy) + 1):
        seeds = np.flatnonzero(single & candidates[:, k])[:most]
        out.append(net.scaled(torch.cat([described[k - 1 : k], x[torch.from_numpy(seeds)]])).mean(0) - benign)
    return torch.stack(out)


class Fitting:
    """One ascent of the objective, by AdamW with a warm-up and a linear decay.

    q(d | x) reads `inputs`, the embeddings (n, D) of the rows; without them it reads those of `encoder`, of which what is trainable is trained along.
    """

    def __init__(self, network: EnhancerNetwork, encoder: PromptEncoder, rows: TrainingRows, config: EnhancerConfig, inputs: Tensor | None = None) -> None:
        self.network, self.encoder, self.rows, self.config, self.inputs = network, encoder, rows, config, inputs
        self.device = encoder.device
        self.benign_twin = {int(a): int(b) for a, b in rows.pairs}
        w = config.weights
        self.candidates = torch.from_numpy(rows.labels.candidates)
        self.eta = torch.from_numpy(rows.labels.eta)
        self.weight = torch.where(torch.from_numpy(rows.labels.known), w.label, w.binary).double()

    def run(self, rng: np.random.Generator, progress: Callable[[dict[str, float]], None] | None = None, *, first_epoch: int = 1) -> list[dict[str, float]]:
        """Ascend for the epochs configured; one record an epoch: the means of the terms over the rows, and signs of collapse."""
        cfg, net = self.config, self.network
        groups: list[dict[str, Any]] = [{"params": list(net.parameters()), "lr": cfg.lr}]
        joint = self.inputs is None
        if joint:
            groups.append({"params": [p for p in self.encoder.model.parameters() if p.requires_grad], "lr": cfg.encoder_lr})
        batches = [list(self.batches(rng)) for _ in range(cfg.epochs)]
        steps = sum(map(len, batches))
        ascent = Ascent(groups, steps, weight_decay=cfg.weight_decay, clip=cfg.clip)
        history: list[dict[str, float]] = []
        step = 0
        for epoch in range(cfg.epochs):
            net.train()
            self.encoder.model.train(joint)
            sums: dict[str, float] = {}
            for index in batches[epoch]:
                ramp = min(1.0, (step + 1) / (cfg.kl_warmup * steps)) if cfg.kl_warmup else 1.0
                objective, record = self.objective(index, ramp)
                ascent.step(objective)
                step += 1
                for key, value in record.items():
                    sums[key] = sums.get(key, 0.0) + float(value.detach()) * len(index)
            net.eval()
            self.encoder.model.eval()
            history.append({"epoch": float(first_epoch + epoch), **{k: v / len(self.rows.x) for k, v in sums.items()}, **self.collapse()})
            if progress:
                progress(history[-1])
        if joint:
            self.encoder.model.requires_grad_(False)
        return history

    def objective(self, index: Sequence[int], ramp: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a batch, a scalar, and its terms; `ramp` in [0, 1] scales the KL weights."""
        w, net, rows = self.config.weights, self.network, torch.as_tensor(index)
        alpha = net.alpha(self.posterior_input(index))
        terms = net.terms(alpha, net.scaled(self.rows.x[rows].to(self.device)))
        label = label_term(alpha, self.candidates[rows].to(self.device), self.eta[rows].to(self.device))
        means = {"label": label.mean(), "concentration": alpha.sum(-1).mean()} | {k: v.mean() for k, v in terms.items()}
        objective = evidence_bound(self.weight[rows].to(self.device) * label, terms, w, ramp)
        if self.config.anchors != "none":
            objective = objective - w.anchor * anchor_term(net.directions, net.anchors)
        noncompliant, benign = self._pairs_in(index)
        means["pair"] = pair_term(alpha[noncompliant], alpha[benign]).sum() / len(index)
        objective = objective + w.pair * means["pair"]
        return objective, {"objective": objective} | means

    def _pairs_in(self, index: Sequence[int]) -> tuple[list[int], list[int]]:
        """Positions in a batch of the halves of the twins that are both in it."""
        at = {row: position for position, row in enumerate(index)}
        found = [(at[a], at[self.benign_twin[a]]) for a in index if self.benign_twin.get(a) in at]
        return [a for a, _ in found], [b for _, b in found]

    def batches(self, rng: np.random.Generator) -> Iterator[list[int]]:
        """Shuffled batches in which twins stay together; where the encoder is trained, of similar length, which saves padding."""
        size, windows = self.config.batch_size, self.rows.windows
        paired = {int(i) for i in self.rows.pairs.ravel()}
        units = [[int(a), int(b)] for a, b in self.rows.pairs] + [[i] for i in range(len(windows)) if i not in paired]
        order = [units[i] for i in rng.permutation(len(units))]
        if self.inputs is None:
            chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            order = [u for chunk in chunks for u in sorted(chunk, key=lambda u: max(len(windows[i].ids) for i in u))]
        found: list[list[int]] = [[]]
        for unit in order:
            if found[-1] and len(found[-1]) + len(unit) > size:
                found.append([])
            found[-1] += unit
        for i in rng.permutation(len(found)):
            yield found[i]

    def posterior_input(self, index: Sequence[int]) -> Tensor:
        """The embeddings that q(d | x) reads for these rows, (b, D)."""
        if self.inputs is not None:
            return self.inputs[torch.as_tensor(index)].to(self.device)
        with training_autocast(self.device):
            embedding = self.encoder.forward(*self.encoder.collate([self.rows.windows[i] for i in index]))
        return embedding.float()

    @torch.no_grad()
    def collapse(self, most: int = 512) -> dict[str, float]:
        """Signs of collapse on the first rows: units of z that move, distance of b from the anchors, spread of the posterior means."""
        net, x = self.network, self.rows.x
        n = min(most, len(x))
        target = net.scaled(x[:n].to(self.device))
        alpha = torch.cat([net.alpha(self.posterior_input(range(i, min(i + 128, n)))) for i in range(0, n, 128)])
        d_bar = alpha / alpha.sum(-1, keepdim=True)
        mu, _ = net.posterior_z(target, d_bar)
        return {
            "active_units": float((mu.var(0) > 0.01).sum()) if net.latent_dim else 0.0,
            "anchor_distance": float((net.directions - net.anchors).norm(dim=-1).mean()),
            "mean_spread": float(d_bar.std(0).mean()),
        }


def first_windows(encoder: PromptEncoder, texts: Sequence[str], tokens: int) -> list[Window]:
    """The beginning of each prompt, cut to a number of tokens; its last token, a special one, stays."""
    seen: dict[int, Window] = {}
    for w in encoder.windows(texts):
        cut = len(w.ids) > tokens
        seen.setdefault(w.owner, Window(w.owner, (*w.ids[: tokens - 1], w.ids[-1]), (*w.offsets[: tokens - 1], w.offsets[-1])) if cut else w)
    return [seen[i] for i in range(len(texts))]


def hold_out(prompts: Sequence[Prompt], validation: Sequence[Prompt] | None, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    if validation is not None:
        return list(prompts), list(validation)
    held = [p for p in prompts if p.split == "validation"]
    if held:
        return [p for p in prompts if p.split != "validation"], held
    if len(prompts) < 20:
        return list(prompts), []
    order = np.random.default_rng(seed).permutation(len(prompts))
    cut = len(prompts) // 10
    return [prompts[i] for i in order[cut:]], [prompts[i] for i in order[:cut]]
