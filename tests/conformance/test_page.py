"""The page is what the tests say, and none of Node's tests is missing."""

from tests.conformance import record

LISTED = """
test-child-process-fork test-child-process-fork3 test-child-process-fork-and-spawn
test-child-process-fork-stdio test-child-process-fork-stdio-string-variant
test-child-process-fork-close test-child-process-fork-ref test-child-process-fork-ref2
test-child-process-fork-closed-channel-segfault test-child-process-fork-net
test-child-process-fork-net-socket test-child-process-fork-net-server
test-child-process-fork-getconnections test-child-process-fork-dgram
test-child-process-fork-advanced-header-serialization test-child-process-send-after-close
test-child-process-send-cb test-child-process-send-returns-boolean
test-child-process-send-type-error test-child-process-send-utf8 test-child-process-send-keep-open
test-child-process-recv-handle test-child-process-internal test-child-process-ipc-next-tick
test-child-process-disconnect test-child-process-stdin-ipc test-child-process-stdout-ipc
test-child-process-http-socket-leak test-child-process-advanced-serialization
test-child-process-advanced-serialization-largebuffer
test-child-process-advanced-serialization-splitted-length-field test-child-process-validate-stdio
sequential/test-child-process-pass-fd sequential/test-cluster-send-handle-large-payload
test-internal-socket-list-send test-internal-socket-list-receive test-process-external-stdio-close
test-process-external-stdio-close-spawn test-net-listen-handle-in-cluster-1
async-hooks/test-net-get-connections es-module/test-esm-child-process-fork-main
fork-net2 fork-regr-gh-2847
test-cluster-net-send test-cluster-send-handle-twice test-cluster-send-deadlock
test-cluster-invalid-message
"""


def test_page_is_up_to_date() -> None:
    """docs/conformance.md is what ``python -m tests.conformance`` writes."""
    assert record.PAGE.read_text() == record.page(), "run: python -m tests.conformance"


def test_every_test_of_node_is_recorded() -> None:
    """Each of Node's tests that concerns us has its line."""
    record.collect()
    assert set(record.NODE_TESTS) == set(LISTED.split())
