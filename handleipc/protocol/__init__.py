"""One end of a channel as a state machine. ``channel`` is the name that a front knows."""
