"""One run as a picture and a page: curves.png and report.html in its folder. Several compared.

    python -m rft.report runs/letters_bots
    python -m rft.report runs/sweep --baseline uniform --out comparison

The page needs no network: images and rollouts are inside it. Model text is escaped, and the page's
policy lets nothing load, and no script run but its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rft.errors import RftError
from rft.reporting.arms import find_runs
from rft.reporting.comparison import compare, write
from rft.reporting.page import comparison_page, run_page
from rft.tracking.curves import PANELS, draw
from rft.tracking.run import read_run


def write_report(run_folder: Path) -> tuple[Path, Path]:
    """Write curves.png and report.html into the run's folder and return their paths."""
    run = read_run(run_folder)
    curves, page = run_folder / "curves.png", run_folder / "report.html"
    curves.write_bytes(draw(run, list(PANELS), "light", columns=5))
    page.write_text(run_page(run), encoding="utf-8", errors="replace")
    return curves, page


def main(arguments: list[str] | None = None) -> int:
    """Write the report of the run that is named, or the comparison of several."""
    parser = argparse.ArgumentParser(prog="python -m rft.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of these")
    parser.add_argument("--baseline", default="", help="the arm that ratios are over")
    parser.add_argument("--set", default="", help="one evaluation set, in place of all")
    parser.add_argument("--out", type=Path, help="a comparison's folder; ./comparison unless given")
    given = parser.parse_args(arguments)
    try:
        if find_runs(given.runs) == [given.runs[0].resolve()]:
            if given.baseline or given.set or given.out:
                raise RftError(
                    f"{given.runs[0]} is one run, whose report goes into its folder: leave "
                    "--baseline, --set and --out away, or name more runs to compare"
                )
            written = [*write_report(given.runs[0])]
        else:
            comparison = compare(given.runs, given.baseline, given.set)
            out = given.out or Path("comparison")
            page = out / "report.html"
            written = [*write(comparison, out), page]
            page.write_text(comparison_page(comparison), encoding="utf-8", errors="replace")
    except RftError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
