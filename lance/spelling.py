"""From lower-case word pieces back to how people write: spaces, apostrophes, capitals."""

import re


def joined(text: str) -> str:
    """Text decoded from word pieces, without the spaces that the tokenizer puts around signs."""
    text = re.sub(r"\s+([,.;:?!%)\]}’…])", r"\1", re.sub(r"([(\[{$€£‘])\s+", r"\1", text))
    text = re.sub(r"(\w)\s*(['’])\s*(s|t|m|d|re|ve|ll)\b", r"\1\2\3", text)
    text = re.sub(r"(\w)\s*([-–/])\s*(?=\w)", r"\1\2", text)
    text = re.sub(r"(\d)([.,:])\s(?=\d)", r"\1\2", text)
    return re.sub(r"(['\"])\s*([^'\"]*?)\s*\1", r"\1\2\1", text)


def cased(text: str, *models: str) -> str:
    """Lower-case text with the capitals that its words have in the model texts, and at the beginning of sentences where the first model text begins so.

    What a model text writes small somewhere, or large only at the beginning of a sentence, stays small.
    """
    spelling: dict[str, str] = {}
    small: set[str] = set()
    for model in models:
        for m in re.finditer(r"\w+(?:[’']\w+)*", model):
            word, first = m.group(), not model[: m.start()].strip(" \"'“‘(") or bool(re.search(r"[.!?:]\W*$", model[: m.start()]))
            if word == word.lower():
                small.add(word)
            elif not first or (len(word) > 1 and word[1:] != word[1:].lower()):
                spelling.setdefault(word.lower(), word)
    text = re.sub(r"\w+(?:[’']\w+)*", lambda m: m.group() if m.group() in small else spelling.get(m.group(), m.group()), text)
    start = next((c for c in models[0] if c.isalpha()), "a") if models else "a"
    if start.isupper():
        text = re.sub(r"(^\W*|[.!?]\s+)(\w)", lambda m: m.group(1) + m.group(2).upper(), text)
        text = re.sub(r"\bi(?=\b(?!\.))", "I", text)
    return text
