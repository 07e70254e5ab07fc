"""Seeds. Every random draw derives from (run seed, stream, step, task, rollout), so that a run is
the same whatever the number of processes and wherever it was resumed."""

import hashlib


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers; stable over processes and Python versions.

    >>> derive(0, "rollout", 3, "r-abc", 1) == derive(0, "rollout", 3, "r-abc", 1)
    True
    >>> derive(0, "a") == derive(0, "b")
    False
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
