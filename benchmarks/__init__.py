"""Questions about speed, each asked of handleipc and of what a user would pick instead.

``python -m benchmarks`` asks all of them, ``--only NAME`` one, ``--quick`` with fewer rounds.
"""
