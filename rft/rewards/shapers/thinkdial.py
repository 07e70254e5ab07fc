"""Three modes of reasoning, and no reasoning outside of the thinking: ThinkDial."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rft.records import Announcement, Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require
from rft.seeding import derive

MODES = ("high", "medium", "low")
STRENGTHS = {"high": 0.0, "medium": 0.5, "low": 1.0}
SENTENCES = {
    "high": "\n\nYou have unlimited time. Think as thoroughly as you can.",
    "medium": "\n\nYou have enough time. Think no longer than is needed.",
    "low": "\n\nYou have very little time. Think as briefly as you can.",
}
# The first five are the paper's, which adds "and similar metacognitive expressions".
WORDS = (
    *("wait", "let me think", "actually", "alternatively", "however"),
    *("hmm", "hold on", "on second thought", "let me check", "let me double-check"),
    *("let me verify", "let me reconsider", "let me rethink", "let me try again"),
)


class ThinkDial(Shaper):
    """ThinkDial, arXiv 2508.18773. A task's rollouts are all told one mode: high, medium or low
    effort. With n the length, and a and b the group's shortest and longest:

        s = 0.5 - (n - a) / (b - a), or 0 where all are of one length
        R = c + strength of the mode * (s if correct, else min(0, s)) + leak * (1 or -1)

    The leak's term is +1 for an answer, the part after the last `</think>`, without words of
    reflection, -1 for one with any of `words` (whole words, in any case of letters); without
    `</think>` there is no answer part, and the term is 0. `sentences` follow the user's message.
    For the first `warmup` steps the mode is high and R = c.

    A wrong answer in one mode may get more than a correct one of the same length in another; not
    in the same one, if `leak` is at most 0.5.

    Deviations: modes are said after the user's message, not in the system prompt, and are drawn
    evenly for each task and step; s = 0 for groups of one length, which the paper leaves open; the
    paper has +1 for the leak's term where there is no answer part, which would pay for truncation;
    nine words of the list are ours.

    Raises `RftError` unless every mode has a strength of at least 0 and a sentence.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        strengths: Mapping[str, float] = STRENGTHS,
        sentences: Mapping[str, str] = SENTENCES,
        leak: float = 0.5,
        words: Sequence[str] = WORDS,
        warmup: int = 95,
    ) -> None:
        super().__init__(setup)
        mend = f"give a number of at least 0 for each of {', '.join(MODES)}"
        good = set(strengths) == set(MODES) and all(x >= 0 for x in strengths.values())
        require(good, "strengths", dict(strengths), mend)
        mend = f"give a text for each of {', '.join(MODES)}"
        require(set(sentences) == set(MODES), "sentences", dict(sentences), mend)
        require(leak >= 0, "leak", leak, "it must be at least 0; 0 leaves the term out")
        require(bool(words), "words", words, "list at least one; leak=0 leaves the term out")
        self._strengths, self._leak, self._warmup = dict(strengths), leak, warmup
        self._said = {mode: Announcement(user=sentences[mode]) for mode in MODES}
        either = "|".join(re.escape(word) for word in words)
        self._reflection = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)

    def announcements(self, step: int) -> Sequence[Announcement]:
        return [self._said[mode] for mode in (MODES if step > self._warmup else MODES[:1])]

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self._said[self._mode(step, task)]

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        if step <= self._warmup:
            return rewards.copy()
        n = lengths(group)
        brevity = 0.5 - (n - n.min()) / np.ptp(n) if np.ptp(n) > 0 else np.zeros_like(n)
        brevity = np.where(group.rewards == 1.0, brevity, np.minimum(0.0, brevity))
        leak = np.array([self._leak_term(rollout.text) for rollout in group.rollouts])
        strength = self._strengths[self._mode(step, group.task)]
        return rewards + strength * brevity + self._leak * leak

    def _mode(self, step: int, task: str) -> str:
        if step <= self._warmup:
            return MODES[0]
        return MODES[derive(self.setup.seed, "mode", step, task) % len(MODES)]

    def _leak_term(self, text: str) -> float:
        _, thought, answer = text.rpartition("</think>")
        if not thought:
            return 0.0
        return -1.0 if self._reflection.search(answer) else 1.0
