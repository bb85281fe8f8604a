"""Constructive replies composed from the rejection distribution: a reason by leaf, what can be offered, a question to go on with."""

import hashlib

from lance.distribution import RejectionDistribution
from lance.taxonomy import Category, Reply

GENERIC = {
    "refuse_with_reason": Reply(
        ("I leave this one out, because answering it as asked could do harm.",),
        ("I can help with a safe way to what you need.",),
        ("What are you trying to achieve?",),
    ),
    "correct_premise": Reply(("The question seems to rest on something that is not so.",), ("I can answer the corrected question.",), ("Shall I?",)),
    "ask": Reply(("A detail that the answer depends on is missing.",), ("With it I can answer at once.",), ("Which one do you mean?",)),
    "say_again": Reply(("I could not make out a request here.",), ("Write it once more in other words.",), ("What do you need?",)),
    "state_limit": Reply(("This lies outside what I can do or know.",), ("I can help with the part that fits into text.",), ("Which part matters most?",)),
    "give_views": Reply(("People differ on this, and no single answer is right.",), ("I can lay out the main views.",), ("What weighs most for you?",)),
}
ABSTAINED = {
    "empty": "There is nothing in this message that I could read. What would you like to ask?",
    "one_token": "A single word leaves too much open for me to judge what you need. Could you put it into a sentence?",
    "unknown_language": "I can only judge prompts in English here, so I have not passed this one on. Could you put it into English?",
}
READY = "Ready to send to a chat model: {prompt}"


def constructive_reply(distribution: RejectionDistribution, text: str) -> str:
    """Reason, offer and question for the strongest leaf; the same prompt always gets the same words (chosen by hash).

    When a second leaf with another kind of answer holds at least 30 % of the shares, its reason is given too.
    """
    ranked = sorted(distribution.shares.items(), key=lambda kv: -kv[1])
    first = distribution.taxonomy[ranked[0][0]]
    parts = [_pick(first, "reasons", text)]
    if len(ranked) > 1 and ranked[1][1] >= 0.3:
        second = distribution.taxonomy[ranked[1][0]]
        if second.response != first.response:
            parts.append(_pick(second, "reasons", text))
    return " ".join([*parts, _pick(first, "offers", text), _pick(first, "questions", text)])


def _pick(leaf: Category, part: str, text: str) -> str:
    choices: tuple[str, ...] = getattr(leaf.reply, part) or getattr(GENERIC[leaf.response], part)
    digest = hashlib.sha256(f"{part}:{text}".encode("utf-8", "surrogatepass")).digest()
    return choices[int.from_bytes(digest[:4], "big") % len(choices)]
