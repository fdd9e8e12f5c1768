"""The results as tables for benchmarks/README.md: ``python -m benchmarks.tables RESULTS.json``."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of ratios beside their targets."""
    lines = ["| ours | compared with | ratio | spread | target | |", "|---|---|--:|---|---|---|"]
    for row in rows:
        at = f" at {row['at']:,.0f}" if row["at"] is not None else ""
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
        spread = f"{row['low']:.3g} to {row['high']:.3g}"
        target = row["target"].replace(">=", "≥").replace("<=", "≤")
        lines.append(
            f"| {row['ours']}{at} | {row['other']} | {row['ratio']:.3g} | {spread} | {target} |"
            f" {verdict} |"
        )
    return lines


def figures(measured: list[dict[str, Any]]) -> list[str]:
    """Return a table of medians."""
    lines = ["| | median | |", "|---|--:|---|"]
    for one in measured:
        if one["figures"]:
            at = f", {one['at']:,.0f}" if one["at"] is not None else ""
            middle = statistics.median(one["figures"])
            shown = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
            lines.append(f"| {one['name']}{at} | {shown} | {one['unit']} |")
    return lines


def main(path: str) -> None:
    """Print the tables of all questions."""
    results = json.loads(Path(path).read_text())
    for name, measured in results["figures"].items():
        rows = [row for row in results["ratios"] if row["question"] == name]
        print(f"\n### {name}\n")
        print("\n".join([*(ratios(rows) if rows else []), "", *figures(measured)]))


if __name__ == "__main__":
    main(sys.argv[1])
