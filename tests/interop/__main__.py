"""``python -m tests.interop`` writes docs/peers.md anew."""

from tests.interop import runtimes

runtimes.PAGE.write_text(runtimes.page())
print(runtimes.PAGE.name, "written")
