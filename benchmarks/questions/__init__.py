"""The questions, one in each module: ``ask(tools)`` returns it."""

from __future__ import annotations

from benchmarks.harness import Question, Tools
from benchmarks.questions import (
    accepted,
    cost,
    handles,
    handoff,
    idle,
    large,
    latency,
    messages,
    node_dialect,
    queued,
    scaling,
    starting,
    steadily,
    tracked,
)

__all__ = ["all_questions"]


def all_questions(tools: Tools) -> list[Question]:
    """Return all questions, in the order of the README."""
    handing = (handles, accepted, messages, queued, latency, node_dialect, large, tracked)
    serving = (handoff, steadily, scaling, starting, idle, cost)
    return [module.ask(tools) for module in (*handing, *serving)]
