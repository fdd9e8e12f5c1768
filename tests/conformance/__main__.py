"""``python -m tests.conformance`` writes docs/conformance.md anew."""

from tests.conformance import record

record.PAGE.write_text(record.page())
print(record.PAGE.name, "written")
