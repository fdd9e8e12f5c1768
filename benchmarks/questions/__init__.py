"""The questions, one in each module: ``ask(tools)`` returns it."""

from __future__ import annotations

from benchmarks.harness import Question, Tools
from benchmarks.questions import (
    cost,
    handles,
    handoff,
    large,
    latency,
    messages,
    node_dialect,
    queued,
    tracked,
)

__all__ = ["all_questions"]


def all_questions(tools: Tools) -> list[Question]:
    """Return all questions, in the order of the README."""
    modules = (handles, messages, queued, latency, node_dialect, large, tracked, handoff, cost)
    return [module.ask(tools) for module in modules]
