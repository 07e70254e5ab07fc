"""Exact answers: the completion is the reference answer and the model ended it itself."""

from rft.records import Finish, Task


class ExactAnswer:
    """1 where the text, outer white space aside, equals the answer and was not cut off, else 0."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return float(finish == "stop" and text.strip() == task.answer.strip())
