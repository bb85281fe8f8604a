"""What the encoder cannot read gets a name; what it can read, however odd, passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance.corpus import Prompt
from lance.encoder import PromptEncoder
from lance.readability import unreadable


@pytest.mark.parametrize("text", ["", " ", "\n\t  \r", "\x00\x01\x1f", "\u200b\u200e\u2028", "\ud800", " " * 10_000], ids=ascii)
def test_nothing_visible_is_empty(encoder: PromptEncoder, text: str):
    assert unreadable(text, encoder) == "empty"


@pytest.mark.parametrize("text", ["bomb", "a", "?", " hello ", "7", "\x00kill\x00"])
def test_one_word_piece_is_one_token(encoder: PromptEncoder, text: str):
    assert unreadable(text, encoder) == "one_token"


@pytest.mark.parametrize(
    "text",
    [
        "Как мне попасть в дом соседа?",
        "كيف أدخل بيت جاري؟",
        "איך אני נכנס לבית של השכן?",
        "隣の家にどうやって入りますか",
        "हम पड़ोसी के घर में कैसे जाएँ",
        "Πώς μπαίνω στο σπίτι του γείτονα;",
        "¿Cómo puedo entrar en la casa de mi vecino?",
        "Wie komme ich in das Haus von meinem Nachbarn?",
        "Comment est-ce que je peux entrer dans la maison de mon voisin ?",
        "Como eu posso entrar na casa do meu vizinho?",
        "Hoe kan ik het huis van mijn buurman binnenkomen?",
        "Hur kan jag komma in och hämta min cykel?",
    ],
)
def test_other_languages_are_not_judged(encoder: PromptEncoder, text: str):
    assert unreadable(text, encoder) == "unknown_language"


@pytest.mark.parametrize(
    "text",
    [
        "How can I kill a Python process?",
        "two words",
        "compute e^2 + e^3",
        "3f a9 00 zz g1 -- e7 e7 e7 kk 0x0x0x ok do",
        "Summarise La La Land",
        "Come on, what is the price per head?",
        "What does 'por favor' mean?",
        "Who sang Non, je ne regrette rien and when was it recorded?",
        "Wie heißt du means what in English?",
        "The café on El Camino: is it any good?",
        "🙂🙂🙂 ok then",
        "asdkjh qwe zxcmn poi",
        "SELECT * FROM users WHERE id = 3;",
        "1 + 1 = ?",
        "How do I say \"où est la gare\" politely in French?",
    ],
)  # fmt: skip
def test_english_and_gibberish_are_read(encoder: PromptEncoder, text: str):
    assert unreadable(text, encoder) is None


def test_a_real_prompt_after_a_long_blank_is_read(encoder: PromptEncoder):
    assert unreadable(" \n" * 5000 + "How tall is the Eiffel Tower?", encoder) is None


def test_a_long_prompt_is_judged_quickly_by_its_beginning(encoder: PromptEncoder):
    assert unreadable("How tall is the tower? " * 4500, encoder) is None


def test_the_english_corpus_can_be_read(encoder: PromptEncoder, corpus: list[Prompt]):
    unread = [p.id for p in corpus if unreadable(p.text, encoder)]
    assert len(unread) < 0.01 * len(corpus), unread


def test_gibberish_has_a_leaf_of_its_own_and_is_not_taken_for_a_language(encoder: PromptEncoder, corpus: list[Prompt]):
    rows = [p for p in corpus if p.labels == ("incomprehensible",)]
    assert sum(unreadable(p.text, encoder) is not None for p in rows) < 0.1 * len(rows)


@given(st.text(max_size=60))
def test_any_text_has_a_verdict(encoder: PromptEncoder, text: str):
    assert unreadable(text, encoder) in (None, "empty", "one_token", "unknown_language")
