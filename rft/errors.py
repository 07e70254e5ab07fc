"""The one error a user meets: the thing, the value, the mend."""


class RftError(Exception):
    """A problem the user can mend. Printed without a traceback; the process exits with code 2.

    The message names the thing, the value it had, and what to do about it. Set `RFT_TRACEBACK=1`
    to see the traceback as well.
    """


class PartDied(RftError):
    """A worker process (engine, learner rank, scheduler, verifier) ended or missed its deadline."""


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint naming the closest known name, or all of them if none is close and they are few."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return (
        f"known: {', '.join(sorted(known))}" if len(known) <= 24 else "--help lists what there is"
    )
