"""Fails each system call in turn, and looks at what becomes of the channel.

``shim.c`` is preloaded and makes one call fail; ``scenarios`` are what is run with it; ``rules``
say what must hold whatever failed; ``sweep`` runs each cell in a process of its own;
``python -m tests.faults`` is the long form, and writes docs/faults.md.
"""
