"""Groups as a state: a few long arrays, laid end to end, that `rft.state` can write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rft.records import Finish, Group, Reason, Rollout, Score
from rft.state import State

Array = npt.NDArray[Any]


def pack(groups: Sequence[Group]) -> State:
    """All that `groups` hold. Texts are bytes in an array, for a file's header is limited."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    return {
        "task": _pack_texts([group.task for group in groups]),
        "size": np.array([len(group.rollouts) for group in groups], dtype=np.int64),
        "shaped": _pack([group.shaped for group in groups], np.float64),
        "advantage": _pack([group.advantage for group in groups], np.float64),
        "kept": _pack([group.kept for group in groups], np.bool_),
        "index": np.array([rollout.index for rollout in rollouts], dtype=np.int64),
        "tag": _pack_texts([rollout.tag for rollout in rollouts]),
        "prompt": _pack([np.array(rollout.prompt_ids) for rollout in rollouts], np.int32),
        "response": _pack([rollout.response_ids for rollout in rollouts], np.int32),
        "logp": _pack([rollout.behaviour_logp for rollout in rollouts], np.float32),
        "version": _pack([rollout.version for rollout in rollouts], np.int32),
        "forced": _pack([rollout.forced for rollout in rollouts], np.bool_),
        "finish": _pack_texts([rollout.finish for rollout in rollouts]),
        "text": _pack_texts([rollout.text for rollout in rollouts]),
        "reward": np.array([score.reward for score in scores], dtype=np.float64),
        "reason": _pack_texts([score.reason for score in scores]),
        "detail": _pack_texts([score.detail for score in scores]),
    }


def unpack(state: State) -> list[Group]:
    """The groups that `pack` was given."""
    sizes = state["size"].tolist()
    tasks = _unpack_texts(state["task"])
    rollouts = [
        Rollout(
            task=task,
            index=index,
            tag=tag,
            prompt_ids=tuple(_present(prompt).tolist()),
            response_ids=_present(response),
            behaviour_logp=_present(logp),
            version=_present(version),
            finish=cast(Finish, finish),
            text=text,
            forced=forced,
        )
        for task, index, tag, prompt, response, logp, version, finish, text, forced in zip(
            [task for task, size in zip(tasks, sizes, strict=True) for _ in range(size)],
            state["index"].tolist(),
            _unpack_texts(state["tag"]),
            _unpack(state["prompt"]),
            _unpack(state["response"]),
            _unpack(state["logp"]),
            _unpack(state["version"]),
            _unpack_texts(state["finish"]),
            _unpack_texts(state["text"]),
            _unpack(state["forced"]),
            strict=True,
        )
    ]
    scores = [
        Score(reward, cast(Reason, reason), detail)
        for reward, reason, detail in zip(
            state["reward"].tolist(),
            _unpack_texts(state["reason"]),
            _unpack_texts(state["detail"]),
            strict=True,
        )
    ]
    shaped, advantage, kept = (_unpack(state[key]) for key in ("shaped", "advantage", "kept"))
    stops = np.cumsum(sizes, dtype=np.int64).tolist()
    return [
        Group(
            task=task,
            rollouts=tuple(rollouts[stop - size : stop]),
            scores=tuple(scores[stop - size : stop]),
            shaped=shaped[k],
            advantage=advantage[k],
            kept=kept[k],
        )
        for k, (task, size, stop) in enumerate(zip(tasks, sizes, stops, strict=True))
    ]


def _pack(arrays: Sequence[Array | None], dtype: type[np.generic]) -> State:
    """Arrays [n] of any lengths as one, and their lengths; -1 is that of None."""
    lengths = [-1 if array is None else len(array) for array in arrays]
    present = [np.asarray(array, dtype=dtype) for array in arrays if array is not None]
    return {
        "length": np.array(lengths, dtype=np.int64),
        "data": np.concatenate([np.empty(0, dtype=dtype), *present]),
    }


def _unpack(state: State) -> list[Array | None]:
    lengths = state["length"]
    stops = np.cumsum(np.maximum(lengths, 0)).tolist()
    return [
        None if length < 0 else state["data"][stop - length : stop].copy()
        for length, stop in zip(lengths.tolist(), stops, strict=True)
    ]


def _present(array: Array | None) -> Array:
    assert array is not None
    return array


def _pack_texts(texts: Sequence[str]) -> State:
    # A model's text may have halves of surrogate pairs, which plain UTF-8 has not.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return _pack([np.frombuffer(text, dtype=np.uint8) for text in encoded], np.uint8)


def _unpack_texts(state: State) -> list[str]:
    return [_present(text).tobytes().decode("utf-8", "surrogatepass") for text in _unpack(state)]
