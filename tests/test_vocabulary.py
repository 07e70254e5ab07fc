"""A tokenizer that knows more than its model is refused at the start."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rft.errors import RftError
from rft.tasks.prompts import vocabulary


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    assert vocabulary(str(tiny_model)) == 64
    folder = tmp_path / "grown"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(RftError, match="has 65 tokens and the model only 64"):
        vocabulary(str(folder))
