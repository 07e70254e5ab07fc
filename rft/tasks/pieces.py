"""Which part of a response's text each of its tokens is.

>>> Pieces("Qwen/Qwen3-1.7B")(ids, text)
[4, 1, 0, 1, 0]
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from rft.tasks.prompts import load_tokenizer


class Pieces:
    """The model's tokenizer, asked where its tokens end in the text that it made of them.

    Raises RftError where there is no model or it has no tokenizer.
    """

    def __init__(self, model_path: str) -> None:
        self._tokenizer = load_tokenizer(model_path)
        self._texts: dict[int, str] = {}

    def __call__(self, ids: Sequence[int], text: str) -> list[int] | None:
        """Characters of `text` that each of `ids` [T] adds, [T], which add up to len(text): 0 for a
        special token, and for part of a character all but the last part of it. None where a text is
        not its tokens' texts, one after another, as with tokenizers that clean up spaces.
        """
        # A token that has whole characters has the same in any context, and looking them up is
        # thirty times as fast as decoding.
        for new in set(ids) - self._texts.keys():
            self._texts[new] = self._tokenizer.decode([new], skip_special_tokens=True)
        texts = [self._texts[i] for i in ids]
        if "".join(texts) != text:
            texts = self._streamed(ids, text)
        return [len(piece) for piece in texts] if "".join(texts) == text else None

    def _streamed(self, ids: Sequence[int], text: str) -> list[str]:
        """Texts of tokens in context: what begins a character waits for the token that ends it."""
        if not self._tokenizer.is_fast:
            return []
        stream, backend = DecodeStream(skip_special_tokens=True), self._tokenizer.backend_tokenizer
        try:
            texts = [stream.step(backend, i) or "" for i in ids]
        except Exception as error:  # tokenizers has no class of its own for it
            # With single bytes as tokens, what follows can change what came before: no pieces then.
            if "Invalid prefix" not in str(error):
                raise
            return []
        # What is no character to the end is never given out; it is the last token's.
        known = "".join(texts)
        if texts and text.startswith(known):
            texts[-1] += text[len(known) :]
        return texts
