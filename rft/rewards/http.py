"""A verifier behind an address: each completion is sent as JSON, the reward comes back as JSON.

    POST url  {"id": ..., "prompt": ..., "completion": ..., "answer": ..., "finish": "stop"}
    200       {"reward": 0.5, "detail": "4 of 8 tests"}

`prompt` is a text or a list of {role, content}; `detail` may be left out.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from typing import Any

import httpx

from rft.errors import RftError
from rft.records import Finish, Task
from rft.rewards.verifier import Verdict

LONGEST_REPLY = 1 << 20
"""Bytes of the largest reply that is read."""
FIRST_PAUSE = 0.25
"""Mean seconds before the first retry; each later one waits twice as long."""
_SHOWN = 200


class RequestFailed(Exception):
    """No usable reply: the address, its status and the reply's first 200 characters."""


class JsonClient:
    """Posts JSON to one address over kept-alive connections, and tries again where that may help.

    Connection errors and the statuses 429 and 5xx are tried again at most `retries` times, after
    pauses that double and are spread at random between half and one and a half times their mean.
    `timeout_seconds` bounds all of it together. The bearer token is the value of the environment
    variable `token_env`, "" for none: a token in a config would be kept beside every run.
    """

    def __init__(self, url: str, *, timeout_seconds: float, retries: int, token_env: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise RftError(f"the address {url!r} of a verifier must start with http:// or https://")
        if not 0 < timeout_seconds < float("inf"):
            raise RftError(f"timeout_seconds={timeout_seconds} must be a positive number")
        if retries < 0:
            raise RftError(f"retries={retries} must not be negative")
        # No compression: a small reply must not become a large one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token_env:
            if not os.environ.get(token_env):
                raise RftError(f"the environment variable {token_env} holds no token; set it")
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self._url = url
        self._timeout = timeout_seconds
        self._retries = retries
        self._client = httpx.Client(headers=headers)
        self._random = random.Random()  # not the global one, which a run may have seeded

    def post(self, payload: dict[str, Any]) -> Any:
        """The reply, decoded. Raises TimeoutError when the time is over and RequestFailed for any
        other status than 200, a reply that is not JSON or over 1 MiB, or no connection."""
        deadline = time.monotonic() + self._timeout
        # Escaped, for a completion may hold half a surrogate pair, which is not UTF-8.
        content = json.dumps(payload).encode()
        for attempt in itertools.count():
            try:
                status, body = self._once(content, deadline)
            except httpx.TimeoutException as error:
                raise self._late() from error
            except httpx.TransportError as error:
                failed = RequestFailed(f"POST {self._url}: {type(error).__name__}: {error}")
            else:
                if status == httpx.codes.OK:
                    return self._decoded(body)
                failed = self._failed(status, body, "is no success")
                if status != httpx.codes.TOO_MANY_REQUESTS and status < 500:
                    raise failed
            if attempt == self._retries:
                raise failed
            pause = FIRST_PAUSE * 2**attempt * self._random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= deadline:
                raise self._late() from failed
            time.sleep(pause)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _once(self, content: bytes, deadline: float) -> tuple[int, bytes]:
        """Status and body of one attempt. httpx bounds each read, not their sum, so that a reply
        that drips is stopped here."""
        left = max(deadline - time.monotonic(), 0.001)
        with self._client.stream("POST", self._url, content=content, timeout=left) as response:
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > LONGEST_REPLY:
                    raise self._failed(response.status_code, body, "is over 1 MiB")
                if time.monotonic() > deadline:
                    raise self._late()
            return response.status_code, body

    def _decoded(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._failed(200, body, "is not JSON") from error

    def _failed(self, status: int, body: bytes, why: str) -> RequestFailed:
        shown = one_line(body[: 4 * _SHOWN].decode(errors="replace"), _SHOWN)
        return RequestFailed(f"POST {self._url}: the reply {why}: {status}: {shown}")

    def _late(self) -> TimeoutError:
        return TimeoutError(f"POST {self._url}: no verdict within {self._timeout:g} s")


def one_line(text: str, length: int) -> str:
    """The first `length` characters of `text`, with one blank for each white space."""
    return " ".join(text.split())[:length]


class Http:
    """The reward that a service at `url` gives; how it is asked stands above.

    `timeout_seconds` bounds a verdict with all its `retries`; keep it under `reward.timeout`, which
    ends the process. `token_env` names the environment variable with the bearer token, if there is
    one. `fractional` says that the service gives partial credit.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 8.0,
        retries: int = 3,
        token_env: str = "",
        fractional: bool = False,
    ) -> None:
        self.fractional = fractional
        self._client = JsonClient(
            url, timeout_seconds=timeout_seconds, retries=retries, token_env=token_env
        )

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises what `JsonClient.post` does, and RequestFailed for a reply without a reward."""
        reply = self._client.post(
            {
                "id": task.id,
                "prompt": task.prompt,
                "completion": text,
                "answer": task.answer,
                "finish": finish,
            }
        )
        said: dict[str, Any] = reply if isinstance(reply, dict) else {}
        reward: Any = said.get("reward")
        detail = said.get("detail", "")
        if type(reward) not in (int, float) or not isinstance(detail, str):
            raise RequestFailed(
                'the reply is not {"reward": a number, "detail": a text}: 200: '
                f"{json.dumps(reply)[:_SHOWN]}"
            )
        return Verdict(float(reward), one_line(detail, _SHOWN))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
