"""Ask the questions, and show the answers as a table, as JSON and as plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sysconfig
import tempfile
from pathlib import Path

import click

import handleipc
from benchmarks.harness import Figures, Question, Target, compare, find_tools, measure
from benchmarks.questions import all_questions


def show(question: Question, figures: Figures) -> list[dict[str, object]]:
    """Print the tables of one question; returns its ratios."""
    click.secho(f"\n{question.text}", bold=True)
    width = max(len(name) for name, _ in figures)
    for contender in question.contenders:
        name, at = contender.name, contender.at
        scaled = [value * question.factor for value in figures[name, at]]
        low, middle, high = (number(f(scaled)) for f in (min, statistics.median, max))
        place = f" {at:>12,.0f}" if at is not None else ""
        unit = question.unit if contender.unit is None else contender.unit
        click.echo(f"  {name:<{width}}{place} {middle:>12} {unit}   {low} to {high}")
    rows = []
    for target in question.targets:
        ratio = compare(target, figures)
        if ratio is not None:
            rows.append(show_ratio(question, target, ratio))
    return rows


def show_ratio(
    question: Question, target: Target, ratio: tuple[float, float, float]
) -> dict[str, object]:
    """Print one ratio beside its target."""
    middle, low, high = ratio
    met = target.is_met(middle)
    places = ["" if at is None else f" {at:,.0f}" for at in (target.at, target.other_at)]
    what = f"{target.ours}{places[0]} / {target.other}{places[1]}"
    verdict = {True: "met", False: "MISSED", None: ""}[met]
    spread = f"({low:.3g} to {high:.3g})"
    click.echo(f"    {what:<74} {middle:>7.3g} {spread:<18} {target!s:>8}  {verdict}")
    return {
        "question": question.name,
        "ours": target.ours,
        "other": target.other,
        "at": target.at,
        "ratio": middle,
        "low": low,
        "high": high,
        "target": str(target),
        "met": met,
    }


def number(value: float) -> str:
    """Spell a figure with as many digits as it deserves."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _build() -> str:
    """Return how the interpreter was optimised: it changes every figure of ours."""
    given = sysconfig.get_config_var("CONFIG_ARGS") or ""
    found = [flag for flag in ("--enable-optimizations", "--with-lto") if flag in given]
    return " ".join(found) or "neither --enable-optimizations (PGO) nor --with-lto"


def _cpu() -> str:
    """Return what the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


@click.command()
@click.option("--quick", is_flag=True, help="Three short rounds; one Node.js; no callgrind.")
@click.option("--only", help="Ask one question.")
@click.option("--output", type=click.Path(path_type=Path), help="Write figures and ratios as JSON.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw plots there.")
def main(quick: bool, only: str | None, output: Path | None, plots: Path | None) -> None:
    """Measure handleipc against what a user would pick instead."""
    rounds, scale = (3, 0.1) if quick else (5, 1.0)
    rows: list[dict[str, object]] = []
    measured: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        asked = all_questions(find_tools(Path(directory), quick))
        if only is not None:
            asked = [question for question in asked if question.name == only]
            if not asked:
                raise click.BadParameter("no such question", param_hint="--only")
        for question in asked:
            steps = rounds * len(question.contenders)
            with click.progressbar(length=steps, label=f"{question.name:>13}") as bar:
                figures = measure(question, rounds, scale, lambda bar=bar: bar.update(1))
            rows += show(question, figures)
            measured[question.name] = [
                {
                    "name": one.name,
                    "at": one.at,
                    "unit": question.unit if one.unit is None else one.unit,
                    "figures": [v * question.factor for v in figures[one.name, one.at]],
                }
                for one in question.contenders
            ]
            if plots is not None:
                from benchmarks.plots import draw  # only who wants plots needs matplotlib

                plots.mkdir(parents=True, exist_ok=True)
                draw(question, figures, plots)
    if output is not None:
        about = {
            "handleipc": handleipc.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "build": _build(),
            "cpu": _cpu(),
            "cpus": os.cpu_count(),
            "rounds": rounds,
        }
        text = json.dumps({"about": about, "ratios": rows, "figures": measured}, indent=1)
        output.write_text(text + "\n")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
