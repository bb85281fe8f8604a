"""The variational label enhancer: from a coarse label to a distribution over rejection categories, amortised on the prompt alone.

The decoder explains the *frozen* embedding x of a prompt; the posterior q(d | x) may read it through a LoRA adapter that is trained jointly. So the
adapter cannot make reconstruction easy by emptying the embedding.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lance.calibration import fit_temperature
from lance.corpus import Labels, Prompt, encode_labels
from lance.distribution import RejectionDistribution
from lance.encoder import ADAPTER_FILES, PromptEncoder, Window, training_autocast
from lance.errors import DataError, ModelError
from lance.modelfiles import read_model_config, write_model_config
from lance.network import EnhancerNetwork
from lance.objective import ObjectiveWeights, anchor_term, dirichlet_prior, label_term
from lance.taxonomy import Taxonomy


@dataclass(frozen=True)
class EnhancerConfig:
    """Everything that decides how an enhancer is trained.

    `layers` counts the hidden layers of q(d | x); `hidden` is their width and that of the decoder. `lora_rank` 0 leaves the encoder frozen.
    `train_tokens` cuts long prompts, in training only. `kl_warmup` is the share of the steps over which the KL weights rise from 0. Learning rates are AdamW's.
    """

    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    layers: int = 2
    hidden: int = 128
    latent_dim: int = 10
    dropout: float = 0.1
    epochs: int = 40
    batch_size: int = 128
    lr: float = 2e-3
    lora_rank: int = 0
    lora_lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 5.0
    kl_warmup: float = 0.25
    train_tokens: int = 128
    seeds_per_anchor: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "epochs", "batch_size", "train_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)!r}")
        for name in ("lr", "lora_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, found {getattr(self, name)!r}")
        if not 0 <= self.kl_warmup <= 1 or self.latent_dim < 0 or self.lora_rank < 0 or not 0 <= self.dropout < 1:
            raise ValueError("expected kl_warmup in [0, 1], dropout in [0, 1), latent_dim >= 0 and lora_rank >= 0")

    @classmethod
    def lora(cls, **changes: Any) -> "EnhancerConfig":
        """The settings of the shipped weights: a LoRA adapter trained jointly, fewer epochs, smaller batches."""
        given: dict[str, Any] = {"lora_rank": 16, "layers": 0, "epochs": 4, "batch_size": 32, "lr": 1e-3} | changes
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EnhancerConfig":
        return cls(**{**data, "weights": ObjectiveWeights(**data.get("weights", {}))})


class VariationalEnhancer:
    """Label enhancement for prompts.

    Parameters
    ----------
    taxonomy : Taxonomy
    encoder : PromptEncoder
        The frozen encoder; its embeddings are what the decoder explains.
    config : EnhancerConfig, optional

    Examples
    --------
    >>> enhancer = VariationalEnhancer(taxonomy, encoder).fit(prompts)     # doctest: +SKIP
    >>> enhancer.predict(["How tall is it?"])                              # doctest: +SKIP
    [RejectionDistribution(underspecified 0.93, ...; risk 0.97 [0.91, 1.00])]
    """

    def __init__(self, taxonomy: Taxonomy, encoder: PromptEncoder, config: EnhancerConfig | None = None) -> None:
        self.taxonomy = taxonomy
        self.base = encoder
        self.encoder = encoder
        self.config = config or EnhancerConfig()
        self.network: EnhancerNetwork | None = None
        self.temperature = 1.0
        self.history: list[dict[str, float]] = []
        self._adapter: dict[str, bytes] | None = None  # files of the adapter that a loaded encoder was merged with

    def __repr__(self) -> str:
        state = "fitted" if self.network is not None else "not fitted"
        return f"VariationalEnhancer({self.taxonomy!r}, {self.encoder!r}, {state})"

    # ---------------------------------------------------------------- training

    def fit(
        self,
        prompts: Sequence[Prompt],
        validation: Sequence[Prompt] | None = None,
        *,
        progress: Callable[[dict[str, float]], None] | None = None,
    ) -> "VariationalEnhancer":
        """Maximise the objective on labelled prompts (binary, category, leaf or mixed), then calibrate the temperature on validation rows.

        Parameters
        ----------
        prompts : sequence of Prompt
        validation : sequence of Prompt, optional
            Rows for calibration. By default those of `prompts` in the split `validation`, or a tenth drawn at random.
        progress : callable, optional
            Called after each epoch with its record, as it goes into `history`.

        Raises
        ------
        DataError
            When there is no benign or no noncompliant prompt.
        TaxonomyError
            When a label is not in the taxonomy.
        """
        train, validation = hold_out(prompts, validation, self.config.seed)
        labels = encode_labels(train, self.taxonomy)
        base_rate = float(1 - labels.candidates[:, 0].mean())
        if not 0 < base_rate < 1:
            raise DataError(f"training needs benign and noncompliant prompts; all {len(train)} rows are {'noncompliant' if base_rate else 'benign'}")
        rng = np.random.default_rng(self.config.seed)
        first = _first_windows(self.base, [p.text for p in train], self.config.train_tokens)
        x = self.base.embed(first)
        self.encoder = self.base
        self._adapter = None
        if self.config.lora_rank:
            self.encoder = copy.deepcopy(self.base)
            self.encoder.add_lora(self.config.lora_rank, seed=self.config.seed)
        self.history = []
        self.temperature = 1.0
        with torch.random.fork_rng():  # the caller's generator stays as it was
            torch.manual_seed(self.config.seed)
            self.network = self._new_network(x, labels, base_rate)
            self._optimise(x, first, labels, rng, progress)
        with torch.no_grad():  # weights are stored in half precision: calibrate what will be loaded
            for p in self.network.parameters():
                if p.ndim > 1:
                    p.copy_(p.half())
        if validation:
            self.calibrate(validation)
        return self

    def _new_network(self, x: Tensor, labels: Labels, base_rate: float) -> EnhancerNetwork:
        cfg = self.config
        net = EnhancerNetwork(self.base.dim, len(self.taxonomy), layers=cfg.layers, hidden=cfg.hidden, latent_dim=cfg.latent_dim, dropout=cfg.dropout)
        scaled = net.scaled(x)
        net.centre.copy_(scaled.mean(0))
        net.spread.copy_(scaled.std(0).clamp_min(1e-3))
        net.prior.copy_(dirichlet_prior(len(self.taxonomy), base_rate))
        net.anchors.copy_(self._anchors(x, labels, net))
        with torch.no_grad():
            net.directions.copy_(net.anchors)
        return net.to(self.base.device)

    def _anchors(self, x: Tensor, labels: Labels, net: EnhancerNetwork) -> Tensor:
        """e_k: mean embedding of the leaf's description and of its own seed prompts (where leaves are known), minus the benign mean."""
        described = self.base.encode([leaf.anchor for leaf in self.taxonomy.leaves])
        benign = net.scaled(x[torch.from_numpy(labels.candidates[:, 0])]).mean(0)
        single = labels.candidates.sum(1) == 1
        rows = []
        for k in range(1, len(self.taxonomy) + 1):
            seeds = np.flatnonzero(single & labels.candidates[:, k])[: self.config.seeds_per_anchor]
            rows.append(net.scaled(torch.cat([described[k - 1 : k], x[torch.from_numpy(seeds)]])).mean(0) - benign)
        return torch.stack(rows)

    def _optimise(
        self, x: Tensor, windows: list[Window], labels: Labels, rng: np.random.Generator, progress: Callable[[dict[str, float]], None] | None
    ) -> None:
        cfg, w, net, device = self.config, self.config.weights, self._fitted(), self.base.device
        candidates = torch.from_numpy(labels.candidates)
        eta = torch.from_numpy(labels.eta)
        weight = torch.where(torch.from_numpy(labels.known), w.label, w.binary).double()
        groups: list[dict[str, Any]] = [{"params": list(net.parameters()), "lr": cfg.lr}]
        if cfg.lora_rank:
            groups.append({"params": [p for p in self.encoder.model.parameters() if p.requires_grad], "lr": cfg.lora_lr})
        optimiser = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
        steps = cfg.epochs * math.ceil(len(x) / cfg.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1.0, (s + 1) / (0.06 * steps + 1)) * max(0.02, 1 - s / steps))
        step = 0
        for epoch in range(cfg.epochs):
            net.train()
            self.encoder.model.train(cfg.lora_rank > 0)
            sums: dict[str, float] = {}
            for index in self._epoch_batches(windows, rng):
                rows = torch.as_tensor(index)
                target = net.scaled(x[rows].to(device))
                alpha = net.alpha(self._posterior_input(x, windows, index))
                ramp = min(1.0, (step + 1) / (cfg.kl_warmup * steps)) if cfg.kl_warmup else 1.0
                terms = net.terms(alpha, target)
                label = label_term(alpha, candidates[rows].to(device), eta[rows].to(device))
                objective = (
                    weight[rows].to(device) * label + w.reconstruction * terms["reconstruction"] - ramp * w.kl_d * terms["kl_d"] - ramp * w.kl_z * terms["kl_z"]
                ).mean() - w.anchor * anchor_term(net.directions, net.anchors)
                optimiser.zero_grad()
                (-objective).backward()  # type: ignore[no-untyped-call]
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], cfg.clip)
                optimiser.step()
                schedule.step()
                step += 1
                record = {"objective": objective, "label": label.mean(), "concentration": alpha.sum(-1).mean()} | {k: v.mean() for k, v in terms.items()}
                for key, value in record.items():
                    sums[key] = sums.get(key, 0.0) + float(value.detach()) * len(index)
            net.eval()
            self.encoder.model.eval()
            self.history.append({"epoch": epoch + 1, **{k: v / len(x) for k, v in sums.items()}, **self._collapse(x, windows)})
            if progress:
                progress(self.history[-1])
        if cfg.lora_rank:
            self.encoder.model.requires_grad_(False)

    def _epoch_batches(self, windows: list[Window], rng: np.random.Generator) -> Iterator[list[int]]:
        """Shuffled batches; with a LoRA adapter, of similar length, which saves padding."""
        order = rng.permutation(len(windows)).tolist()
        size = self.config.batch_size
        if self.config.lora_rank:
            chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(windows[i].ids))]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for i in rng.permutation(len(batches)).tolist():
            yield batches[i]

    def _posterior_input(self, x: Tensor, windows: list[Window], index: Sequence[int]) -> Tensor:
        if not self.config.lora_rank:
            return x[torch.as_tensor(index)].to(self.base.device)
        with training_autocast(self.base.device):
            embedding = self.encoder.forward(*self.encoder.collate([windows[i] for i in index]))
        return embedding.float()

    @torch.no_grad()
    def _collapse(self, x: Tensor, windows: list[Window], most: int = 512) -> dict[str, float]:
        """Signs of collapse on the first rows: units of z that move, distance of b from the anchors, spread of the posterior means."""
        net = self._fitted()
        n = min(most, len(x))
        target = net.scaled(x[:n].to(self.base.device))
        alpha = torch.cat([net.alpha(self._posterior_input(x, windows, range(i, min(i + 128, n)))) for i in range(0, n, 128)])
        d_bar = alpha / alpha.sum(-1, keepdim=True)
        mu, _ = net.posterior_z(target, d_bar)
        return {
            "active_units": float((mu.var(0) > 0.01).sum()) if net.latent_dim else 0.0,
            "anchor_distance": float((net.directions - net.anchors).norm(dim=-1).mean()),
            "mean_spread": float(d_bar.std(0).mean()),
        }

    def calibrate(self, prompts: Sequence[Prompt]) -> float:
        """Fit the temperature T on labelled prompts: ln alpha / T, with A unchanged, minimises the negative log-likelihood of their labels."""
        self.temperature = 1.0
        alpha = self.predict_alpha([p.text for p in prompts])
        self.temperature = fit_temperature(alpha, encode_labels(prompts, self.taxonomy))
        return self.temperature

    # -------------------------------------------------------------- prediction

    def _fitted(self) -> EnhancerNetwork:
        if self.network is None:
            raise ModelError("this enhancer is not fitted; call fit, or VariationalEnhancer.from_pretrained(folder)")
        return self.network

    def alpha_of(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k1"]:
        """Calibrated concentrations for embeddings of the adapted encoder; differentiable."""
        raw = self._fitted().alpha(embedding)
        log = torch.log(raw) / self.temperature
        return raw.sum(-1, keepdim=True) * torch.softmax(log, dim=-1)

    @torch.inference_mode()
    def predict_alpha(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Concentrations, float64 (n, K + 1). A long prompt is read in overlapping windows and takes those of its riskiest one."""
        return self.predict_windows(texts, batch_size)[0]

    @torch.inference_mode()
    def predict_windows(self, texts: Sequence[str], batch_size: int | None = None) -> tuple[np.ndarray, list[Window]]:
        """Concentrations (n, K + 1) with, for each prompt, the window that they come from."""
        windows = self.encoder.windows(texts)
        alpha = np.empty((len(windows), len(self.taxonomy) + 1))
        for index in self.encoder.batches(windows, batch_size):
            embedding = self.encoder.forward(*self.encoder.collate([windows[i] for i in index])).float()
            alpha[index] = self.alpha_of(embedding).cpu().numpy()
        best: dict[int, int] = {}
        benign = alpha[:, 0] / alpha.sum(1)
        for i, window in enumerate(windows):
            if window.owner not in best or benign[i] < benign[best[window.owner]]:
                best[window.owner] = i
        chosen = [best[n] for n in range(len(texts))]
        return alpha[np.array(chosen, dtype=int)], [windows[i] for i in chosen]

    def predict(self, texts: Sequence[str], batch_size: int | None = None) -> list[RejectionDistribution]:
        """One RejectionDistribution per prompt."""
        return [RejectionDistribution(self.taxonomy.keys, row, self.taxonomy) for row in self.predict_alpha(texts, batch_size)]

    def predict_proba(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Means d_bar of the distributions, (n, K + 1)."""
        alpha = self.predict_alpha(texts, batch_size)
        return np.asarray(alpha / alpha.sum(1, keepdims=True))

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, with LoRA, adapter/. Nothing in the folder needs a pickle."""
        if not self.base.name:
            raise ModelError("the encoder has no name to load it by; save it to a folder and load it with PromptEncoder.from_pretrained first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: (v.half() if v.dtype == torch.float32 and v.ndim > 1 else v).contiguous() for k, v in self._fitted().state_dict().items()}
        save_file(state, folder / "model.safetensors")
        files = ["model.safetensors"]
        if self.config.lora_rank:
            if self._adapter is None:
                self.encoder.save_adapter(folder / "adapter")
                (folder / "adapter" / "README.md").unlink(missing_ok=True)
            else:
                (folder / "adapter").mkdir(exist_ok=True)
                for name, data in self._adapter.items():
                    (folder / "adapter" / name).write_bytes(data)
            files += [f"adapter/{name}" for name in ADAPTER_FILES]
        meta = {
            "encoder": {"name": self.base.name, "revision": self.base.revision, "max_tokens": self.base.max_tokens},
            "config": self.config.to_dict(),
            "temperature": self.temperature,
            "taxonomy": self.taxonomy.to_dict(),
            "history": self.history,
        }
        write_model_config(folder, meta, files)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None, base: PromptEncoder | None = None) -> "VariationalEnhancer":
        """Load what `save_pretrained` wrote.

        Raises
        ------
        ModelError
            When the folder, a file or the format is missing or wrong, or a weight file does not have the recorded sha256.
        """
        folder = Path(folder)
        meta = read_model_config(folder)
        enc = meta["encoder"]
        base = base or PromptEncoder.from_pretrained(enc["name"], revision=enc["revision"], max_tokens=enc["max_tokens"], device=device)
        out = cls(Taxonomy.from_dict(meta["taxonomy"]), base, EnhancerConfig.from_dict(meta["config"]))
        if out.config.lora_rank:
            out.encoder = base.with_adapter(folder / "adapter")
            out._adapter = {name: (folder / "adapter" / name).read_bytes() for name in ADAPTER_FILES}
        state = load_file(folder / "model.safetensors", device=str(base.device))
        cfg = out.config
        net = EnhancerNetwork(base.dim, len(out.taxonomy), layers=cfg.layers, hidden=cfg.hidden, latent_dim=cfg.latent_dim, dropout=cfg.dropout).to(base.device)
        try:
            net.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()})
        except RuntimeError as error:
            raise ModelError(f"the weights in {str(folder)!r} do not fit its config.json: {error}") from error
        out.network = net.eval().requires_grad_(False)
        out.temperature = float(meta["temperature"])
        out.history = list(meta.get("history", []))
        return out


def _first_windows(encoder: PromptEncoder, texts: Sequence[str], tokens: int) -> list[Window]:
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
