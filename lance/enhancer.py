"""The variational label enhancer: from a coarse label to a distribution over rejection categories, amortised on the prompt alone.

The decoder explains the *frozen* embedding x of a prompt; the posterior q(d | x) may read it through an adapter that is trained jointly. So the
adapter cannot make reconstruction easy by emptying the embedding.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from lance.calibration import fit_temperature
from lance.changes import change_of, changed, unfreeze
from lance.corpus import Prompt, encode_labels
from lance.distribution import RejectionDistribution
from lance.encoder import ADAPTER_FILES, PromptEncoder, Window
from lance.errors import DataError, ModelError
from lance.fitting import EnhancerConfig, Fitting, TrainingRows, hold_out, new_network
from lance.modelfiles import read_model_config, write_model_config
from lance.network import EnhancerNetwork
from lance.objective import conditioned_on_label
from lance.taxonomy import Taxonomy

LABEL_WEIGHT = 8.0
CHANGE_FILE = "encoder_change.safetensors"


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
        self._change: dict[str, Tensor] | None = None  # what full fine-tuning changed

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
        rows = TrainingRows.of(train, labels, self.base, self.config.train_tokens)
        encoder = copy.deepcopy(self.base) if self.config.trains_encoder else self.base
        if self.config.adaptation == "lora":
            encoder.add_lora(self.config.lora_rank, seed=self.config.seed)
        elif self.config.adaptation == "full":
            unfreeze(encoder)
        with torch.random.fork_rng():  # the caller's generator stays as it was
            torch.manual_seed(self.config.seed)
            network = new_network(rows, self.taxonomy, self.base, self.config, base_rate)
            self.encoder, self.network, self.temperature, self._adapter, self._change = encoder, network, 1.0, None, None
            rng, self.history = np.random.default_rng(self.config.seed), []
            if self.config.trains_encoder:
                self.history = Fitting(network, encoder, rows, self.config).run(rng, progress)
                self._round_encoder()
                rows = rows.with_outliers(self.config.outliers, self.base, rng)
            if epochs := self.config.head_epochs if self.config.trains_encoder else self.config.epochs:
                inputs = self.encoder.embed(rows.windows) if self.config.trains_encoder else rows.x
                head = Fitting(network, self.encoder, rows, replace(self.config, epochs=epochs), inputs)
                self.history += head.run(rng, progress, first_epoch=len(self.history) + 1)
        self._round_network()
        if validation:
            self.calibrate(validation)
        return self

    @torch.no_grad()
    def _round_encoder(self) -> None:
        """Round to what is stored, an adapter to half precision and a change to 8 bits, so that what is calibrated is what will be loaded."""
        if self.config.adaptation == "full":
            self._change = change_of(self.encoder, self.base)
            self.encoder = changed(self.base, self._change)
        for name, p in self.encoder.model.named_parameters():
            if "lora_" in name:
                p.copy_(p.half())

    @torch.no_grad()
    def _round_network(self) -> None:
        """Round the matrices of the network to half precision, as they are stored."""
        for p in self._fitted().parameters():
            if p.ndim > 1:
                p.copy_(p.half())

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
        alpha = self.alpha_of(self.encoder.embed(windows, batch_size).to(self.base.device)).cpu().numpy()
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

    def enhance(self, prompts: Sequence[Prompt], *, label_weight: float = LABEL_WEIGHT) -> Float[np.ndarray, "n k1"]:
        """Label enhancement of labelled prompts: the mean of q(d | x) conditioned on the label of each prompt, (n, K + 1), rows summing to 1.

        `label_weight` says how many times the evidence of the prompt itself the label is worth. The default had the lowest KL to the annotated distributions
        of the corpus's validation rows; 0 leaves the label aside.

        Raises
        ------
        ValueError
            When the weight is negative or not finite.
        """
        if not (math.isfinite(label_weight) and label_weight >= 0):
            raise ValueError(f"label_weight must be a finite number >= 0, found {label_weight!r}")
        alpha, labels = self.predict_alpha([p.text for p in prompts]), encode_labels(prompts, self.taxonomy)
        return conditioned_on_label(alpha, labels.candidates, labels.eta, label_weight * alpha.sum(1))

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, where the encoder was trained, adapter/ or encoder_change.safetensors. Nothing there needs a pickle."""
        if self.config.adaptation == "full" and self._fitted() and self._change is None:
            raise ModelError("the last fit was interrupted, and what it trained of the encoder is not known; fit again")
        if not self.base.name:
            raise ModelError("the encoder has no name to load it by; save it to a folder and load it with PromptEncoder.from_pretrained first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: (v.half() if v.dtype == torch.float32 and v.ndim > 1 else v).contiguous() for k, v in self._fitted().state_dict().items()}
        save_file(state, folder / "model.safetensors")
        files = ["model.safetensors"]
        if self._change is not None:
            save_file(self._change, folder / CHANGE_FILE)
            files.append(CHANGE_FILE)
        if self.config.adaptation == "lora":
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
        for stale in {CHANGE_FILE, *(f"adapter/{name}" for name in ADAPTER_FILES)} - set(files):  # of a model that was here before
            (folder / stale).unlink(missing_ok=True)
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
        try:
            config = EnhancerConfig.from_dict(meta["config"])
        except TypeError as error:
            raise ModelError(f"the settings in {str(folder)!r} are of another version ({error}); train again") from error
        out = cls(Taxonomy.from_dict(meta["taxonomy"]), base, config)
        if out.config.adaptation == "full":
            if CHANGE_FILE not in meta["sha256"]:
                raise ModelError(f"the config.json in {str(folder)!r} names no {CHANGE_FILE}, which has what was trained of the encoder; save it again")
            out._change = load_file(folder / CHANGE_FILE)
            out.encoder = changed(base, out._change)
        elif out.config.adaptation == "lora":
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
