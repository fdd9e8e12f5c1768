/*
 * Every declaration of the C core, with its contract.
 *
 * This file has no guard and no conditionals: the C compiler includes it (through hipc.h) and
 * cffi parses it, so nothing is declared twice.
 *
 * What the core does: the two system calls that move bytes together with descriptors, newline
 * framing, batched accept. What it does not: messages, JSON, acknowledgements, ownership. It sees
 * bytes, ints and counts, allocates nothing, calls nobody back and keeps nothing between calls but
 * what the caller's own hipc_reader holds.
 *
 * Return rule, one for all functions:
 *     >= 0   done, or a condition that this function documents and its one caller handles;
 *     < 0    -errno.
 */

#define HIPC_MAX_FDS 253      /* SCM_MAX_FD of Linux: the most that one sendmsg can carry */
#define HIPC_READ_FDS 254     /* the most that one read can bring, where others send more */
#define HIPC_SET_FIELDS 4     /* ints per descriptor set in hipc_reader.sets */
#define HIPC_ADDRESS_SIZE 128 /* sizeof(struct sockaddr_storage), checked where it is used */

/* Outcomes of hipc_receive. */
#define HIPC_DRAINED 0 /* the socket is empty: wait until it is readable */
#define HIPC_MORE 1    /* the budget or a report array is used up: take the report, call again */
#define HIPC_FULL 2    /* the buffer holds one unfinished line and has no room: grow it */
#define HIPC_EOF 3     /* the peer closed; the report may still hold lines */

/* Kind of a descriptor, as hipc_kind returns it: for a socket its domain and type in the low
 * sixteen bits, and the flags. Compared, never computed with. */
#define HIPC_KIND_SOCKET 65536
#define HIPC_KIND_LISTENING 131072
#define HIPC_KIND_FIFO 262144
#define HIPC_KIND_OTHER 524288

/* Outcomes of hipc_shape, beside a depth, which is smaller. */
#define HIPC_TOO_DEEP 2147483646
#define HIPC_TOO_MANY 2147483647

/* What hipc_shape counts for numbers that take long to read, measured with msgspec 0.20: 8 us for
 * a far exponent, 100 us for 4,000 digits, and 0.02 to 0.15 us for most other values. */
#define HIPC_FAR_EXPONENT 64
#define HIPC_LONG_NUMBER 64

/*
 * The receiving side of one channel: a byte buffer and the report of the last call.
 *
 * All memory is the caller's, all offsets count from `data`. The caller sets the first group of
 * fields once (again after growing the buffer), reads the second, and after taking a report sets
 * `consumed` to the end of the last line it took and the three counts to 0.
 *
 * Descriptors in `fds` are owned by whoever holds the reader until the caller takes them; that is
 * why they stay here, and not in a return value, if the caller is interrupted.
 */
typedef struct hipc_reader {
    char *data;         /* buffer of `capacity` bytes */
    size_t capacity;    /* at most INT32_MAX, since offsets are reported as int32 */
    int32_t *ends;      /* report: offset one past each newline found */
    int32_t *sets;      /* report: HIPC_SET_FIELDS ints a set, one set per read that brought
                           descriptors or lost some: first byte and end of that read, number of
                           descriptors that arrived, 1 if the kernel dropped some (MSG_CTRUNC) */
    int32_t *fds;       /* report: descriptors of all sets, in order of arrival */
    int32_t max_ends;
    int32_t max_sets;
    int32_t max_fds;    /* at least HIPC_READ_FDS */

    uint64_t position;  /* stream offset of data[0] */
    size_t consumed;    /* bytes at the front that the caller has taken */
    size_t scanned;     /* bytes already searched for a newline: never searched again */
    size_t filled;      /* bytes in the buffer */
    int32_t n_ends;
    int32_t n_sets;
    int32_t n_fds;
    int32_t error;      /* errno of a read that failed after others had succeeded, else 0 */
} hipc_reader;

/*
 * Read from the stream socket `fd` until it is empty, `budget` bytes have come, or something has no
 * room in a report array; then report every complete line and every descriptor set. Lines that did
 * not fit into the report stay in the buffer (scanned < filled): no readiness of the socket will
 * tell of them.
 *
 * Consumed bytes are dropped first, so offsets of an earlier report are no longer valid.
 * Descriptors arrive close-on-exec; what they are is for hipc_adopt to say. EINTR is retried. Never
 * waits, even if somebody who shares the open file description has made it blocking.
 *
 * Returns HIPC_DRAINED, HIPC_MORE, HIPC_FULL or HIPC_EOF; -errno if a read failed with nothing to
 * report. If there is something, it is reported, HIPC_MORE is returned and `error` is set.
 */
int hipc_receive(int fd, hipc_reader *reader, size_t budget);

/*
 * Append `length` bytes to the buffer as if they had been received, and report the lines.
 *
 * Returns the number of bytes that fitted.
 */
int64_t hipc_feed(hipc_reader *reader, const char *bytes, size_t length);

/*
 * Look at the shape of one JSON text, in one pass: how deep brackets and braces are nested, and
 * how many values it holds at most, which is what it costs in memory and time to read it.
 *
 * Counted are commas and opening brackets and braces, all of them outside of strings. Numbers that
 * take a parser unusually long count more, since readers compute them digit by digit: by
 * HIPC_FAR_EXPONENT for an exponent of three digits or more, and by the square of the number of
 * times that HIPC_LONG_NUMBER bytes go into one. Exact for JSON without spaces; for anything else
 * some answer.
 *
 * Returns the deepest level, at most `max_depth`; HIPC_TOO_DEEP if there is a deeper one, or
 * HIPC_TOO_MANY if the count is above `max_values`, whichever shows first.
 */
int hipc_shape(const char *text, size_t length, int max_depth, int64_t max_values);

/*
 * Write bytes [offset, length) of `data` to the stream socket `fd`, with `n_fds` borrowed
 * descriptors attached to the first of them (none if offset > 0: they left with the first byte).
 * Goes on until all is written or the kernel takes no more; later writes of one call carry no
 * descriptors. Never waits, even if somebody who shares the open file description has made it
 * blocking. Never raises SIGPIPE. EINTR is retried.
 *
 * Returns the number of bytes written, at least 1 if there are any; -errno if none was, of which
 * these mean "wait": -EAGAIN until the socket is writable; -ETOOMANYREFS, -ENOBUFS, -ENOMEM for a
 * while, since the socket stays writable. -EINVAL if there are descriptors but no bytes to carry
 * them.
 */
int64_t hipc_send(int fd, const char *data, size_t offset, size_t length,
                  const int32_t *fds, int32_t n_fds);

/*
 * As hipc_send, of the bytes of `head`, `body` and `tail` in a row, which nobody has to join: a
 * message of many megabytes is not copied for the three bytes before it. `offset` counts from the
 * first byte of `head`.
 */
int64_t hipc_send_parts(int fd, const char *head, size_t head_length, const char *body,
                        size_t body_length, const char *tail, size_t tail_length, size_t offset,
                        const int32_t *fds, int32_t n_fds);

/*
 * Close a descriptor that a peer has had in its hands: clear SO_LINGER, then close(2). Its sender
 * may have set that option, and then close blocks, non-blocking socket or not, until the far end
 * has taken what was written. EINTR counts as closed.
 *
 * Returns 0; -errno if close failed (-EBADF: it was not open).
 */
int hipc_close(int fd);

/*
 * End the connection `fd`: write `data`, send FIN if the kernel has taken all of it, and read and
 * drop what has come, 64 KiB at most. The FIN rides in the segment of the last byte. Called again
 * without data it goes on dropping. Never waits, and never raises SIGPIPE.
 *
 * Returns how many bytes were written: fewer than `length` if the kernel takes no more, then no FIN
 * was sent; `length` if it was; `length` + 1 if the other end has sent its own, or is gone, so that
 * nothing is left but to close. -errno if a write failed, or `fd` is not open.
 */
int64_t hipc_end(int fd, const char *data, size_t length);

/*
 * Accept up to `max` connections from the non-blocking listening socket `fd`.
 *
 * `fds` receives the descriptors (non-blocking, close-on-exec, owned by the caller), `addresses`
 * HIPC_ADDRESS_SIZE bytes for each, `lengths` how many of them are meaningful.
 *
 * Returns how many were accepted; -errno if none was (-EAGAIN: nobody is waiting). Connections
 * that ended while they waited are skipped.
 */
int hipc_accept(int fd, int32_t max, int32_t *fds, char *addresses, int32_t *lengths);

/*
 * Have the kernel send `signal` to this process when the thread that started it ends (Linux,
 * PR_SET_PDEATHSIG). To be called in the new process, before it executes its program.
 *
 * Returns 0; -ESRCH if `parent` is not the parent any more; -ENOSYS where there is no such thing.
 */
int hipc_exit_with_parent(int signal, int parent);

/*
 * Say whether a program started by the calling thread would inherit a blocked or an ignored signal:
 * both survive an exec. Python ignores SIGPIPE and SIGXFSZ, which `subprocess` sets right itself;
 * they do not count.
 *
 * Returns 1 or 0.
 */
int hipc_signals_inherited(void);

/*
 * Set every signal to its default and block none, as libuv does. To be called in a new process,
 * before it executes its program.
 */
void hipc_reset_signals(void);

/*
 * Say what the descriptor `fd` is: HIPC_KIND_SOCKET | domain << 8 | type, with
 * HIPC_KIND_LISTENING for a listening stream socket; HIPC_KIND_FIFO; or HIPC_KIND_OTHER.
 *
 * Returns the kind; -errno if it is not open (-EBADF), or the system does not tell.
 */
int32_t hipc_kind(int fd);

/*
 * As hipc_kind, of a descriptor that was received; a socket is non-blocking from here on, or it
 * would freeze the receiver's event loop. The flag belongs to the open file description, so a
 * sender that keeps a copy shares it.
 */
int32_t hipc_adopt(int fd);
