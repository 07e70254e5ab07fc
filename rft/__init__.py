"""rft: GRPO reinforcement finetuning of language models, with task selection built in."""

__version__ = "0.1.0"
