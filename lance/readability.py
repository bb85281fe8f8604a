"""Can the encoder read this prompt at all? If not, the honest outcome is to abstain and to say so."""

import re
import unicodedata
from typing import Literal

from lance.encoder import PromptEncoder
from lance.words import FUNCTION_WORDS

Unreadable = Literal["empty", "one_token", "unknown_language"]
WORD = re.compile(r"(?<![\w^])[^\W\d_]{2,}(?!\w)", re.UNICODE)  # whole words: neither the e of e^2 nor that of 3e7
# Frequent function words of other languages in Latin script.
OTHER_FUNCTION_WORDS = frozenset(
    (
        "el la los las una unos del por para con como cómo qué que puedo está es muy donde cuando mi tu su der das den dem und oder nicht "
        "ist sind wie ich kann ein eine einen mein meine für mit auf zu von wenn wo le les une du des est sont dans pour avec comment je "
        "puis mon ma mes et ou où qui sur pas um uma não faço posso meu minha e ele ela dele sem os dos em il gli che di per non sono come "
        "mio mia nel della het een van niet hoe ik kan mijn en met voor jag är och inte hur min jeg ikke hvordan og jak mogę się w na nie "
        "czy moja jest nasıl bir ve benim için"
    ).split()
)


def unreadable(text: str, encoder: PromptEncoder) -> Unreadable | None:
    """Why a prompt cannot be judged, or None.

    `empty`: nothing but space and control characters. `one_token`: a single word piece. `unknown_language`: most letters are of a script other
    than Latin, or at least two words are function words of another language and outnumber the English ones. Gibberish is none of these: it has a
    leaf of its own. The embedded encoder reads English; with an encoder of another language, set `check_language=False` in the RefinerConfig.
    """
    sample = text.lstrip()[:4000]
    visible = "".join(c for c in sample if not unicodedata.category(c).startswith(("C", "Z")))
    if not visible:
        return "empty"
    letters = [c for c in visible if c.isalpha()]
    if letters and sum("LATIN" in unicodedata.name(c, "") for c in letters) < 0.5 * len(letters):
        return "unknown_language"
    if sum(end > start for start, end in encoder.windows([sample])[0].offsets) <= 1:
        return "one_token"
    words = {w.lower() for w in WORD.findall(sample)}
    other = len(words & OTHER_FUNCTION_WORDS)
    if other >= 2 and other > len(words & FUNCTION_WORDS):
        return "unknown_language"
    return None
