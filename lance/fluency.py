"""A small character language model: how unusual does a rewrite read beside its prompt?"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cached_property


class CharLM:
    """Interpolated Witten-Bell character n-gram model, counted on first use (a second or two for a few thousand prompts).

    It tells word salad from sentences and no more; a causal language model is better where there is one.
    """

    def __init__(self, texts: Iterable[str], order: int = 5) -> None:
        self.texts, self.order = list(texts), order

    @cached_property
    def counts(self) -> list[dict[str, Counter[str]]]:
        """For each length of context: context -> counts of the next character."""
        counts: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(self.order)]
        for text in self.texts:
            padded = self._pad(text)
            for i in range(self.order - 1, len(padded)):
                for n in range(self.order):
                    counts[n][padded[i - n : i]][padded[i]] += 1
        return counts

    def _pad(self, text: str) -> str:
        return "\n" * (self.order - 1) + " ".join(text.lower().split()) + "\n"

    def bits_per_character(self, text: str) -> float:
        """Cross entropy in bits a character."""
        padded = self._pad(text)
        vocabulary = max(2, len(self.counts[0].get("", ())))
        total = 0.0
        for i in range(self.order - 1, len(padded)):
            p = 1 / (vocabulary + 1)
            for n in range(self.order):
                seen = self.counts[n].get(padded[i - n : i])
                if not seen:
                    break
                size, types = seen.total(), len(seen)
                p = (seen.get(padded[i], 0) + types * p) / (size + types)
            total -= math.log2(p)
        return total / (len(padded) - self.order + 1)
