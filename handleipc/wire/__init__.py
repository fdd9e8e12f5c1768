"""What the kernel and the peer see: system calls, lines, and how each line is spelled."""
