"""The plain baselines that stand beside the enhancer: logistic regression on frozen embeddings, and an adapted encoder with a softmax head."""

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lance.changes import unfreeze
from lance.corpus import Prompt, encode_labels
from lance.encoder import PromptEncoder, Window, training_autocast
from lance.fitting import first_windows
from lance.network import Ascent
from lance.taxonomy import Taxonomy

TRAIN_TOKENS = 128  # as the enhancer


class LogisticBaseline:
    """Logistic regression over the K + 1 coordinates on standardised frozen embeddings; a label that is a set counts for its members in equal parts."""

    def __init__(self, taxonomy: Taxonomy, encoder: PromptEncoder, C: float = 0.1, seed: int = 0) -> None:
        self.taxonomy, self.encoder = taxonomy, encoder
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000, random_state=seed))

    def fit(self, prompts: Sequence[Prompt]) -> "LogisticBaseline":
        candidates = encode_labels(prompts, self.taxonomy).candidates
        row, member = np.nonzero(candidates)
        x = self.encoder.encode([p.text for p in prompts]).numpy()
        self.model.fit(x[row], member, logisticregression__sample_weight=1 / candidates.sum(1)[row])
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (n, K + 1)."""
        out = np.zeros((len(texts), len(self.taxonomy) + 1))
        out[:, self.model.classes_] = self.model.predict_proba(self.encoder.encode(texts).numpy())
        return out


class SoftmaxBaseline:
    """A LoRA adapter and a linear softmax head; the loss is the negative log-likelihood of the label, as the enhancer has it.

    With rank 0 the encoder stays frozen, and with `full` all of its linear layers are trained; `encoder_lr` is the learning rate there, by default that of
    the head. As in the enhancer, embeddings are standardised by the mean and spread of the frozen ones of the training rows. With label smoothing, that
    share of the loss is the mean of -ln p over all coordinates. With `hidden`, the head reads the embedding through the trunk of the enhancer's network:
    one layer of that width, with dropout.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        encoder: PromptEncoder,
        *,
        rank: int = 16,
        epochs: int = 6,
        batch_size: int = 32,
        lr: float = 1e-3,
        encoder_lr: float | None = None,
        full: bool = False,
        smoothing: float = 0.0,
        hidden: int = 0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.taxonomy, self.base = taxonomy, encoder
        self.rank, self.epochs, self.batch_size, self.lr, self.smoothing, self.seed = rank, epochs, batch_size, lr, smoothing, seed
        self.hidden, self.dropout, self.full, self.encoder_lr = hidden, dropout, full, lr if encoder_lr is None else encoder_lr
        self.head: nn.Sequential | None = None

    def fit(self, prompts: Sequence[Prompt]) -> "SoftmaxBaseline":
        with torch.random.fork_rng():  # the caller's generator stays as it was
            torch.manual_seed(self.seed)
            self._fit(prompts, np.random.default_rng(self.seed))
        return self

    def _fit(self, prompts: Sequence[Prompt], rng: np.random.Generator) -> None:
        device = self.base.device
        self.encoder = copy.deepcopy(self.base)
        labels = encode_labels(prompts, self.taxonomy)
        candidates, eta = torch.from_numpy(labels.candidates).to(device), torch.from_numpy(labels.eta).to(device)
        windows = first_windows(self.encoder, [p.text for p in prompts], TRAIN_TOKENS)
        frozen = self.encoder.embed(windows)
        self.centre, self.spread = frozen.mean(0).to(device), frozen.std(0).clamp_min(1e-5).to(device)
        adapted = self.full or self.rank > 0
        if self.full:
            unfreeze(self.encoder)
        elif self.rank:
            self.encoder.add_lora(self.rank, seed=self.seed)
        width = self.hidden or self.encoder.dim
        trunk = [nn.Dropout(self.dropout), nn.Linear(self.encoder.dim, width), nn.GELU(), nn.Dropout(self.dropout)] if self.hidden else []
        last = nn.Linear(width, len(self.taxonomy) + 1)
        shares = labels.candidates / labels.candidates.sum(axis=1, keepdims=True)
        with torch.no_grad():  # start from the base rates: inputs are centred, and a bias moves slowly
            last.bias.copy_(torch.from_numpy(np.log(shares.mean(axis=0) + 1e-3)))
        self.head = nn.Sequential(*trunk, last).to(device)
        groups = [{"params": list(self.head.parameters()), "lr": self.lr}]
        if adapted:
            groups.append({"params": [p for p in self.encoder.model.parameters() if p.requires_grad], "lr": self.encoder_lr})
        ascent = Ascent(groups, self.epochs * math.ceil(len(prompts) / self.batch_size))
        self.encoder.model.train(adapted)
        for _ in range(self.epochs):
            for rows in self._batches(windows, rng, by_length=adapted):
                if adapted:
                    with training_autocast(device):
                        x = self.encoder.forward(*self.encoder.collate([windows[i] for i in rows])).float()
                else:
                    x = frozen[rows].to(device)
                log_p = self._log_p(x)
                S, e = candidates[rows], eta[rows]
                any_of = torch.logsumexp(log_p.masked_fill(~S, -torch.inf), dim=-1)
                all_of = (log_p * S).sum(-1) / S.sum(-1)
                ascent.step(((1 - self.smoothing) * ((1 - e) * any_of + e * all_of) + self.smoothing * log_p.mean(-1)).mean())
        self.head.eval()
        self.encoder.model.eval().requires_grad_(False)
        self.encoder.merge_adapter()

    def _batches(self, windows: Sequence[Window], rng: np.random.Generator, *, by_length: bool) -> Iterator[list[int]]:
        """Shuffled batches; of similar length where the encoder is trained, which saves padding."""
        size, order = self.batch_size, rng.permutation(len(windows)).tolist()
        if by_length:
            chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(windows[i].ids))]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for b in rng.permutation(len(batches)):
            yield batches[b]

    def _log_p(self, x: Tensor) -> Tensor:
        assert self.head is not None
        return torch.log_softmax(self.head((x - self.centre) / self.spread), dim=-1)

    @torch.inference_mode()
    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (n, K + 1)."""
        return self._log_p(self.encoder.encode(texts).to(self.base.device)).exp().double().cpu().numpy()
