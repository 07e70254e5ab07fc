"""Which part of a text each token is: exact, whatever the tokens cut through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rft.errors import RftError
from rft.tasks.pieces import Pieces


def test_pieces_are_the_tokens_texts_and_special_tokens_have_none(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [*tokenizer("abc", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert Pieces(str(tiny_model))(ids, "abc") == [1, 1, 1, 0]
    assert Pieces(str(tiny_model))([], "") == []


def test_the_last_part_of_a_character_has_the_whole(chat_model: Path) -> None:
    text = "a≤é🎉."
    ids = AutoTokenizer.from_pretrained(chat_model)(text)["input_ids"]
    assert Pieces(str(chat_model))(ids, text) == [1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]


def test_pieces_of_any_bytes_add_up_to_the_text(chat_model: Path) -> None:
    tokenizer, pieces = AutoTokenizer.from_pretrained(chat_model), Pieces(str(chat_model))
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, len(tokenizer), size=12).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = pieces(ids, text)
        assert found is not None
        assert (len(found), sum(found)) == (len(ids), len(text))


def test_bytes_that_change_what_came_before_them_have_no_pieces(tmp_path: Path) -> None:
    """As of Llama 2, Gemma and Mistral, which have bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(tmp_path)
    ids = [vocabulary[word] for word in ("<0x0A>", "<0x0A>", "<0x82>", "a")]
    assert Pieces(str(tmp_path))(ids, tokenizer.decode(ids)) is None
    euro = [vocabulary[f"<0x{byte:02X}>"] for byte in "€".encode()]
    assert Pieces(str(tmp_path))([*euro, vocabulary["a"]], "€a") == [0, 0, 1, 1]


def test_a_text_that_is_not_its_tokens_has_no_pieces(tiny_model: Path) -> None:
    assert Pieces(str(tiny_model))([3, 4], "another") is None


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RftError, match="tokenizer"):
        Pieces(str(tmp_path))
