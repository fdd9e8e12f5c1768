"""What the kernel and the peer see: system calls, lines, and how each line is spelled."""

VERSION = 2
"""The version of the native dialect that this package writes and reads."""
