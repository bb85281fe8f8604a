"""Words of a prompt: which of them have content, and what token attributions come to on them."""

import re

import numpy as np
from jaxtyping import Float

from lance.encoder import Window

WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]", re.UNICODE)
# Words without content of their own; a span made of nothing else explains nothing.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no and or but nor so if then than as of in on at by for with from to into onto over under about between
    through i me my mine myself you your yours he him his she her hers it its we us our ours they them their theirs who whom whose which what where
    when why how is are was were be been being am do does did doing have has had having will would shall should can could may might must not n't
    please just very too there here also only own same other again s t m re ve ll d
    """.split()
)


def content_words(text: str) -> list[tuple[int, int]]:
    """Offsets of the words that are neither punctuation nor function words."""
    return [m.span() for m in WORD.finditer(text) if m.group()[0].isalnum() and m.group().lower() not in FUNCTION_WORDS]


def word_attributions(text: str, window: Window, values: Float[np.ndarray, " t"]) -> list[tuple[int, int, float]]:
    """Token attributions added up to words: (start, end, sum) for each word that the window covers."""
    first, last = extent(window)
    words = [m.span() for m in WORD.finditer(text) if m.start() >= first and m.end() <= last]
    sums = [0.0] * len(words)
    i = 0
    for (start, end), value in zip(window.offsets, values, strict=True):
        if start == end:
            continue
        while i < len(words) and words[i][1] <= start:
            i += 1
        if i < len(words) and words[i][0] < end:
            sums[i] += float(value)
    return [(a, b, s) for (a, b), s in zip(words, sums, strict=True)]


def extent(window: Window) -> tuple[int, int]:
    """First and last character that a window covers."""
    return min((a for a, b in window.offsets if b > a), default=0), max((b for _, b in window.offsets), default=0)


def without(text: str, start: int, end: int) -> str:
    """The text without a stretch of it, which does not become empty."""
    rest = re.sub(r"\s+", " ", text[:start].rstrip() + " " + text[end:].lstrip()).strip()
    return rest or " "
