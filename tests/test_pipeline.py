"""Lance from end to end: one prompt or many, plain data, saving, chat models, and folders that are not what they should be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import chat_folder, completion, fake_server, flip_byte
from safetensors.torch import load_file, save_file

import lance as package
from lance import prompts as prompt_texts
from lance.chat import EndpointChat, LocalChat
from lance.corpus import Prompt
from lance.errors import ChatError, LanceError, ModelError
from lance.gradients import GradientConfig
from lance.modelfiles import write_model_config
from lance.pipeline import Analysis, Lance, Reply, ask_record, score_record
from lance.refiner import Refinement, RefinerConfig
from lance.replies import ABSTAINED, constructive_reply

CALM = "How tall is the Eiffel Tower in metres?"
REWRITES = ["Who may see the address of a nurse, and how is it protected?", "How do I report somebody who looks for a nurse's address?"]


@pytest.fixture(scope="module")
def prompts(corpus: list[Prompt]) -> list[str]:
    """A few prompts of each kind, an odd one, and one that can only be abstained on."""
    rows = [p for p in corpus if p.split == "test" and len(p.text) < 100]
    bad = {p.labels[0]: p.text for p in rows if len(p.labels) == 1}
    return [CALM, *list(bad.values())[::4], "<script>alert('x')</script> & how do I \"quote\" it?", "bomb"]


def sharper(pipeline: Lance, threshold: float, **options: object) -> Lance:
    """The parts of a pipeline with another threshold."""
    return Lance(
        pipeline.enhancer, pipeline.verifier, threshold=threshold, vacuity_limit=1.0,
        exemplars=pipeline.exemplars.pairs, exemplar_vectors=pipeline.exemplars.vectors, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sharp(tiny_pipeline: Lance, prompts: list[str]) -> Lance:
    """A pipeline that stops half of the prompts."""
    return sharper(tiny_pipeline, float(np.median([d.risk_upper for d in tiny_pipeline.score(prompts)])))


@pytest.fixture(scope="module")
def analyses(sharp: Lance, prompts: list[str]) -> list[Analysis]:
    return sharp.analyse(prompts)


@pytest.fixture(scope="module")
def answers(sharp: Lance, prompts: list[str]) -> list[Reply]:
    return sharp.respond(prompts)


# -------------------------------------------------------------------------- verbs


def test_the_shipped_pipeline_loads_and_works_through_a_prompt(lance_default: Lance):
    assert 0 < lance_default.threshold < 1
    assert len(lance_default.exemplars.pairs) > 100
    analysis = lance_default.analyse("What are the names of Earth's two moons?")
    assert isinstance(analysis, Analysis)
    assert analysis.distribution.keys == lance_default.taxonomy.keys
    reply = lance_default.respond("How can I kill a Python process?")
    assert isinstance(reply, Reply)
    assert reply.text
    assert "encoder=" in repr(lance_default)


def test_every_verb_takes_one_prompt_or_a_list(sharp: Lance, prompts: list[str]):
    for verb, kind in ((sharp.analyse, Analysis), (sharp.refine, Refinement), (sharp.respond, Reply)):
        one, many, none = verb(CALM), verb((CALM, prompts[-1])), verb([])
        assert isinstance(one, kind)
        assert isinstance(many, list)
        assert [type(x) for x in many] == [kind, kind]
        assert none == []
        assert one.to_dict().keys() == many[0].to_dict().keys() == many[1].to_dict().keys()
        assert (one.to_dict()["prompt"], many[1].to_dict()["prompt"]) == (CALM, prompts[-1])
    assert sharp.score([]) == []


def test_one_prompt_alone_reads_as_it_does_in_a_list(sharp: Lance, prompts: list[str]):
    together = sharp.score(prompts)
    for i in (0, 2, len(prompts) - 1):
        assert np.allclose(sharp.score([prompts[i]])[0].alpha, together[i].alpha, rtol=1e-4)
        assert np.allclose(sharp.analyse(prompts[i]).distribution.alpha, together[i].alpha, rtol=1e-4)


@pytest.mark.parametrize("bad", [[1], ["fine", None], [b"bytes"]])
def test_what_is_no_text_is_refused(sharp: Lance, bad: list[object]):
    for verb in (sharp.analyse, sharp.refine, sharp.respond, sharp.score):
        with pytest.raises(TypeError):
            verb(bad)


# --------------------------------------------------------------------- plain data


def test_results_are_plain_data(analyses: list[Analysis], answers: list[Reply], prompts: list[str]):
    for results in (analyses, [a.refinement for a in answers], answers):
        for result, prompt in zip(results, prompts, strict=True):
            plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
            assert plain["prompt"] == prompt
            assert 0 <= plain["risk"] <= 1
            assert 0 <= plain["risk_upper"] <= 1


def test_the_record_of_ask_is_the_contract(sharp: Lance, answers: list[Reply], prompts: list[str]):
    keys = {
        "prompt", "distribution", "categories", "risk", "risk_upper", "vacuity", "gradients", "refined", "outcome", "steps",
        "risk_after", "verifier_risk_after", "similarity", "answer",
    }  # fmt: skip
    spans = 0
    for reply, prompt in zip(answers, prompts, strict=True):
        record = json.loads(json.dumps(ask_record(reply), allow_nan=False))
        assert keys <= record.keys()
        assert list(record["distribution"]) == list(sharp.taxonomy.keys)
        assert list(record["categories"]) == list(sharp.taxonomy.category_keys)
        assert sum(record["distribution"].values()) == pytest.approx(1)
        assert record["answer"]
        for g in record["gradients"]:
            assert {"category", "weight", "spans", "text"} <= g.keys()
            assert g["category"] in sharp.taxonomy.keys
            for s in g["spans"]:
                assert s.keys() == {"text", "start", "end", "attribution", "occlusion"}
                assert prompt[s["start"] : s["end"]] == s["text"]
                spans += 1
    assert spans


def test_the_record_of_score_is_the_contract(sharp: Lance):
    (d,) = sharp.score(["Give me the home address of the nurse"])
    record = json.loads(json.dumps(score_record(d)))
    assert record.keys() == {"risk", "risk_upper", "vacuity", "top", "top_category", "distribution", "categories"}
    assert record["top"] == max(record["distribution"], key=record["distribution"].__getitem__)
    assert record["top_category"] == max(record["categories"], key=record["categories"].__getitem__)


def test_results_show_themselves_in_a_notebook_with_the_prompt_escaped(analyses: list[Analysis]):
    page = next(a for a in analyses if "<script>" in a.prompt)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    stopped = next(a for a in analyses if a.gradients and a.gradients[0].spans)
    assert "<mark" in stopped._repr_html_()


def test_representations_are_short_and_say_what_it_is(sharp: Lance):
    assert repr(sharp).startswith("Lance(Taxonomy('noncompliance'")
    assert "chat=None" in repr(sharp)
    assert repr(sharp.refine(CALM)).startswith("Refinement(")
    assert repr(sharp.score([CALM])[0]).startswith("RejectionDistribution(")


def test_the_public_names_are_all_there():
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'Lancet'"):
        _ = package.Lancet


# --------------------------------------------------------- answers without a model


def test_answers_without_a_chat_model_go_by_what_became_of_the_prompt(answers: list[Reply]):
    kinds = set()
    for reply in answers:
        r = reply.refinement
        kinds.add(reply.kind)
        if r.refined is not None:
            assert reply.kind == "ready"
            assert reply.text.endswith(r.refined)
        elif r.outcome == "abstained":
            assert reply.kind == "abstained"
            assert reply.text == ABSTAINED[r.reason]
        else:
            assert reply.kind == r.outcome
            assert reply.text == constructive_reply(r.before, r.prompt)
    assert {"ready", "abstained"} < kinds


def test_a_long_prompt_goes_all_the_way(sharp: Lance):
    text = ("We baked bread on Sunday and walked by the river. " * 200) + "Where exactly does the nurse opposite live?"
    reply = sharp.respond(text)
    assert reply.refinement.prompt == text
    assert reply.text


@pytest.mark.parametrize("text", ["", "   ", "\x00\x07", "🙂", "😀" * 300, "مرحبا كيف حالك اليوم", "x\ud800y how is it", "{prompt} {0} %s how?"], ids=ascii)
def test_odd_prompts_have_an_outcome(sharp: Lance, text: str):
    reply = sharp.respond(text)
    assert reply.kind in ("ready", "clarify", "declined", "abstained")
    assert reply.text
    assert sharp.analyse(text).prompt == text


# -------------------------------------------------------------------- chat models


@pytest.fixture(scope="module")
def local_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model that always replies with a JSON list of rewrites."""
    return chat_folder(tmp_path_factory.mktemp("chat") / "model", {":": json.dumps(REWRITES)})


def test_a_local_model_proposes_and_answers(tiny_folder: Path, local_chat: Path):
    lance = Lance.from_pretrained(tiny_folder, chat=str(local_chat))
    assert isinstance(lance.chat, LocalChat)
    assert str(local_chat) in repr(lance)
    first = lance.refiner.proposers[0]
    found = first.propose("Where does she live?", lance.analyse("Where does she live?").gradient)
    assert [c.text for c in found] == REWRITES
    assert {c.proposer for c in found} == {"chat"}
    reply = sharper(lance, 1 - 1e-6, chat=lance.chat).respond(CALM)
    assert (reply.kind, reply.text) == ("answered", json.dumps(REWRITES))


def test_a_rewrite_of_the_chat_model_is_taken_where_it_descends(tiny_pipeline: Lance, local_chat: Path, corpus: list[Prompt]):
    level = {t: d.risk_upper for t, d in zip(REWRITES, tiny_pipeline.score(REWRITES), strict=True)}
    texts = [p.text for p in corpus if not p.benign and 20 < len(p.text) < 90][::15]
    upper = [d.risk_upper for d in tiny_pipeline.score(texts)]
    risky = texts[int(np.argmax(upper))]
    assert max(upper) > min(level.values())
    config = RefinerConfig(min_similarity=-1.0, max_rise=1e6, min_descent=1e-6)
    chat = LocalChat.from_pretrained(str(local_chat))
    never_degenerate = GradientConfig(diffuse=1.0, coverage=1.0)
    lance = sharper(tiny_pipeline, min(level.values()) + 1e-3, chat=chat, refiner_config=config, gradient_config=never_degenerate)
    lance.refiner.proposers = lance.refiner.proposers[:1]
    r = lance.refine(risky)
    assert r.steps
    assert {s.proposer for s in r.steps} == {"chat"}
    assert r.steps[-1].text in REWRITES


def test_an_endpoint_answers_what_passes_and_never_sees_what_does_not(tiny_pipeline: Lance):
    with fake_server((200, completion("330 metres."))) as server:
        lance = sharper(tiny_pipeline, 1 - 1e-6, chat=EndpointChat(server.url, "m"), seed=7)
        reply = lance.respond(CALM)
        assert (reply.kind, reply.text) == ("answered", "330 metres.")
        ((_, body),) = server.requests
        assert body["messages"] == [{"role": "system", "content": prompt_texts.ANSWER_SYSTEM}, {"role": "user", "content": CALM}]
        assert body["seed"] == 7
        abstained = lance.respond("bomb")
        assert (abstained.kind, len(server.requests)) == ("abstained", 1)


def test_what_is_declined_is_not_sent_for_an_answer(tiny_pipeline: Lance):
    text = "Give me the home address and the phone number of the nurse who lives opposite"
    with fake_server((200, completion("no list of rewrites"))) as server:
        lance = sharper(tiny_pipeline, 1e-6, chat=EndpointChat(server.url, "m"))
        reply = lance.respond(text)
        assert reply.refinement.refined is None
        assert reply.kind in ("clarify", "declined")
        assert reply.text == constructive_reply(reply.refinement.before, text)
        assert all(body["messages"][0]["content"] != prompt_texts.ANSWER_SYSTEM for _, body in server.requests)


def test_an_unreachable_endpoint_is_an_error_that_says_what_to_do(tiny_folder: Path):
    with fake_server((200, completion("x"))) as server:
        url = server.url
    lance = Lance.from_pretrained(tiny_folder, chat=url, model="m")
    assert isinstance(lance.chat, EndpointChat)
    lance.chat.client = lance.chat.client.with_options(max_retries=0)
    with pytest.raises(ChatError, match="start it, or check the address"):
        sharper(lance, 1 - 1e-6, chat=lance.chat).respond(CALM)
    with pytest.raises(ChatError, match="name the model"):
        Lance.from_pretrained(tiny_folder, chat=url)


# ------------------------------------------------------------------------- saving


def test_a_saved_pipeline_is_the_same(tiny_pipeline: Lance, prompts: list[str], tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path / "again")
    loaded = Lance.from_pretrained(tmp_path / "again")
    assert (loaded.threshold, loaded.vacuity_limit) == (tiny_pipeline.threshold, tiny_pipeline.vacuity_limit)
    assert loaded.exemplars.pairs == tiny_pipeline.exemplars.pairs
    assert np.allclose(loaded.exemplars.vectors, tiny_pipeline.exemplars.vectors, atol=1e-7)
    for a, b in zip(loaded.score(prompts), tiny_pipeline.score(prompts), strict=True):
        assert np.array_equal(a.alpha, b.alpha)
    assert [r.to_dict() for r in loaded.refine(prompts[:4])] == [r.to_dict() for r in tiny_pipeline.refine(prompts[:4])]
    assert {p.suffix for p in (tmp_path / "again").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_vectors_that_are_not_one_for_each_exemplar_text_are_refused(tiny_pipeline: Lance, tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path)
    meta = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    stored = load_file(tmp_path / "exemplars.safetensors")
    save_file({"vectors": stored["vectors"][1:], "scale": stored["scale"][1:]}, tmp_path / "exemplars.safetensors")
    write_model_config(tmp_path, {k: v for k, v in meta.items() if k not in ("format", "sha256")}, list(meta["sha256"]))
    with pytest.raises(ModelError, match="one for each text"):
        Lance.from_pretrained(tmp_path)


def test_the_shipped_pipeline_can_be_saved_again(lance_default: Lance, prompts: list[str], tmp_path: Path):
    lance_default.save_pretrained(tmp_path / "again")
    loaded = Lance.from_pretrained(tmp_path / "again")
    for a, b in zip(loaded.score(prompts), lance_default.score(prompts), strict=True):
        assert np.allclose(a.alpha, b.alpha, rtol=1e-4)


FILES = ["exemplars.safetensors", "exemplars.json", "enhancer/config.json", "enhancer/model.safetensors", "verifier/config.json", "verifier/model.safetensors"]


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [lambda path: flip_byte(path, -30), Path.unlink], ids=["changed", "missing"])
def test_a_changed_or_missing_file_is_a_model_error(copied: Path, name: str, damage: Callable[[Path], None]):
    damage(copied / name)
    with pytest.raises(ModelError, match=Path(name).name):
        Lance.from_pretrained(copied)


@pytest.mark.parametrize("key", ["kind", "threshold", "vacuity_limit", "sha256", "format"])
def test_a_description_that_lacks_something_is_a_model_error(copied: Path, key: str):
    meta = json.loads((copied / "config.json").read_text())
    del meta[key]
    (copied / "config.json").write_text(json.dumps(meta))
    with pytest.raises(ModelError):
        Lance.from_pretrained(copied)


def test_a_folder_of_another_kind_is_a_model_error(copied: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="not a pipeline"):
        Lance.from_pretrained(copied / "enhancer")
    with pytest.raises(ModelError, match="no model in"):
        Lance.from_pretrained(tmp_path)
    with pytest.raises(LanceError, match="no model in"):
        Lance.from_pretrained(tmp_path / "nowhere")
