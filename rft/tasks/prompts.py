"""From a task's prompt to the token ids that the policy goes on from.

    encoder = PromptEncoder("Qwen/Qwen3-1.7B", TasksConfig(thinking="disabled"))
    ids = encoder.encode("What is 1+1?", "{prompt}\\nAnswer in \\\\boxed{}.")

A prompt is text or a list of messages. The pool's `user` template goes around what the user says,
`tasks.chat` decides whether the model's chat template is applied, and what starts the model's turn
(`tasks.assistant`, then an announcement's) comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from rft.config.schema import TasksConfig
from rft.errors import RftError
from rft.records import Announcement, Message
from rft.tasks.sources import HUB_ID

Prompt = str | tuple[Message, ...]
SILENCE = Announcement()
PLACE = "{prompt}"
"""What stands for the prompt in a `user` template. Replaced as it is: other braces are text."""


class PromptEncoder:
    """The model's own tokenizer and chat template, under the rules of `tasks.*`.

    Code that comes with a model is never run. Raises RftError where there is no model or it has no
    tokenizer, and where `tasks.chat=always` or `tasks.thinking` want a chat template that is not
    there or knows nothing of thinking. `fingerprint` differs wherever any prompt could be encoded
    differently.
    """

    def __init__(self, model_path: str, tasks: TasksConfig) -> None:
        self._model, self._tasks = model_path, tasks
        self._tokenizer = load_tokenizer(model_path)
        self._template: str | None = None
        if self._tokenizer.chat_template is not None:
            self._template = self._tokenizer.get_chat_template()
        self._options = self._thinking()
        if tasks.chat == "always" and self._template is None:
            raise RftError(
                f"tasks.chat=always and the tokenizer of {model_path!r} has no chat template; "
                "use an instruct model, or set tasks.chat=auto"
            )
        self.fingerprint = self._fingerprint()

    def encode(
        self, prompt: Prompt, user: str = PLACE, announcement: Announcement = SILENCE
    ) -> tuple[int, ...]:
        """Token ids of a prompt, with the pool's `user` template and what is announced.

        Raises RftError where the chat template is missing or refuses the messages, or where the
        user says nothing that a template or an announcement could be put to.
        """
        text, special = self.render(prompt, user, announcement)
        return tuple(self.tokenize([text], special)[0])

    def render(
        self, prompt: Prompt, user: str = PLACE, announcement: Announcement = SILENCE
    ) -> tuple[str, bool]:
        """The text that is tokenized, and whether the tokenizer adds its special tokens: a chat
        template writes its own. Raises as `encode` does."""
        end = self._tasks.assistant + announcement.assistant
        chat = self._tasks.chat == "always" or (
            self._tasks.chat == "auto" and not isinstance(prompt, str)
        )
        if isinstance(prompt, str):
            said = user.replace(PLACE, prompt) + announcement.user
            if not chat:
                return said + end, True
            messages: list[Message] = [{"role": "user", "content": said}]
        else:
            messages = _said(prompt, user, announcement)
        if not chat:
            return "\n\n".join(message["content"] for message in messages) + end, True
        return self._render_chat(messages) + end, False

    def tokenize(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Token ids of each text; a fast tokenizer uses all cores."""
        if not texts:
            return []
        if self._tokenizer.is_fast:  # what it computes besides ids costs half as much again
            backend = self._tokenizer.backend_tokenizer
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=special)]
        return list(self._tokenizer(list(texts), add_special_tokens=special)["input_ids"])

    def _render_chat(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        if self._template is None:
            raise RftError(
                f"the tokenizer of {self._model!r} has no chat template, and the prompt is a list "
                "of messages; use an instruct model, write prompts as text, or set tasks.chat=never"
            )
        if self._tasks.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._tasks.system}, *messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._options
            )
        except TemplateError as error:
            raise RftError(
                f"the chat template of {self._model!r} refuses the messages ({error}); "
                "write them as it wants them"
            ) from error
        return str(rendered)

    def _thinking(self) -> dict[str, bool]:
        """What the chat template is told of thinking."""
        thinking = self._tasks.thinking
        if thinking == "auto":
            return {}
        if self._tasks.chat == "never":
            raise RftError(
                f"tasks.thinking={thinking} is said to a chat template, and tasks.chat=never uses "
                "none; set one of them to auto"
            )
        if self._template is None or "enable_thinking" not in self._template:
            raise RftError(
                f"tasks.thinking={thinking} and the chat template of {self._model!r} does not know "
                "enable_thinking; set tasks.thinking=auto, or start the model's turn with "
                "tasks.assistant"
            )
        return {"enable_thinking": thinking == "enabled"}

    def _fingerprint(self) -> str:
        """Of what the tokenizer would save, the libraries' versions and the settings."""
        digest = xxhash.xxh3_128()
        with TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
        tasks = self._tasks
        settings = (tasks.chat, tasks.system, tasks.thinking, tasks.assistant)
        digest.update(repr((version("transformers"), version("tokenizers"), *settings)).encode())
        return str(digest.hexdigest())


def _said(messages: tuple[Message, ...], user: str, announcement: Announcement) -> list[Message]:
    """The messages, with the template around the last that the user says, and the announcement."""
    changed = [dict(message) for message in messages]
    if user == PLACE and not announcement.user:
        return changed
    for message in reversed(changed):
        if message["role"] == "user":
            message["content"] = user.replace(PLACE, message["content"]) + announcement.user
            return changed
    raise RftError(
        "no message of the prompt is the user's, and there is something to put to it (the pool's "
        "`user`, or an announcement); add one, or leave `user` as it is by default"
    )


def load_tokenizer(model_path: str) -> Any:
    """The model's tokenizer; raises RftError where there is no model, or it has none."""
    from transformers import AutoTokenizer

    folder = Path(model_path)
    mend = "set model.path to a Hugging Face folder that holds a tokenizer, or to a hub id"
    if not folder.is_dir() and not HUB_ID.fullmatch(model_path):
        raise RftError(f"the model folder {model_path!r} is not there; {mend}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise RftError(f"the model {model_path!r} gives no tokenizer ({said}); {mend}") from error
    # From a folder with only a config, transformers makes an empty tokenizer without a word.
    files = tokenizer.vocab_files_names.values()
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise RftError(
            f"the model folder {model_path!r} has no tokenizer (looked for {', '.join(files)}); "
            f"copy it there from the base model, or {mend}"
        )
    if tokenizer.is_fast:  # a saved tokenizer may cut or fill up what it encodes
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def vocabulary(model_path: str) -> int:
    """Entries of the model's output distribution.

    Raises RftError where the tokenizer knows tokens for which the model has no entry; the other way
    round (rows of padding) is usual.
    """
    from transformers import AutoConfig

    size: int = AutoConfig.from_pretrained(model_path).get_text_config().vocab_size
    known = len(load_tokenizer(model_path))
    if known > size:
        raise RftError(
            f"the tokenizer of {model_path!r} has {known} tokens and the model only {size}; they "
            "do not belong together, or the model's embeddings were not resized"
        )
    return size
