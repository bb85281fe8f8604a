"""From word pieces back to how people write."""

import pytest

from lance.spelling import cased, joined


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("how do i get there , please ?", "how do i get there, please?"),
        ("don ' t touch the neighbour ' s wi - fi", "don't touch the neighbour's wi-fi"),
        ("it costs 3 . 50 ( in euros )", "it costs 3.50 (in euros)"),
        ("call it ' the house ' , then stop", "call it 'the house', then stop"),
        ("at 10 : 30", "at 10:30"),
        ("", ""),
    ],
)
def test_signs_go_back_to_their_words(pieces: str, text: str):
    assert joined(pieces) == text


@pytest.mark.parametrize(
    ("text", "models", "found"),
    [
        ("who is anna in paris?", ("Where does Anna live?", "Is Paris large?"), "Who is Anna in Paris?"),
        ("who is anna", ("tell me of Anna",), "who is Anna"),
        ("how do i stop? why now?", ("How do I start?",), "How do I stop? Why now?"),
        ("the cat. the dog", ("The cat sat. A dog ran to the door",), "The cat. The dog"),
        ("what does nasa do", ("NASA, what does it do",), "What does NASA do"),
        ("nothing to copy", (), "nothing to copy"),
    ],
)
def test_names_are_spelt_as_where_they_were_read(text: str, models: tuple[str, ...], found: str):
    assert cased(text, *models) == found
