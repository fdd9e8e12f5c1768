/*
 * libFuzzer target: bytes with real descriptors through a real socket pair, in writes and reads of
 * any size, until the end.
 *
 * Every byte and every descriptor arrives, once and in order, prepared and of its kind; when all is
 * done the process has as many descriptors as before.
 */
#include "fuzz.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define KINDS 8

static int fds_of_kinds[KINDS];
static int32_t kinds[KINDS];

static void open_kinds(void)
{
    int ends[2];

    CHECK(pipe(ends) == 0);
    fds_of_kinds[0] = socket(AF_INET, SOCK_STREAM, 0);
    fds_of_kinds[1] = socket(AF_INET, SOCK_DGRAM, 0);
    fds_of_kinds[2] = socket(AF_UNIX, SOCK_STREAM, 0);
    fds_of_kinds[3] = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    fds_of_kinds[4] = ends[0];
    fds_of_kinds[5] = ends[1];
    fds_of_kinds[6] = open("/dev/null", O_RDONLY);
    fds_of_kinds[7] = open("/", O_PATH);
    for (int i = 0; i < KINDS; i++) {
        CHECK(fds_of_kinds[i] >= 0);
        kinds[i] = hipc_kind(fds_of_kinds[i]);
        CHECK(kinds[i] > 0);
    }
}

static int lowest_free(void)
{
    int fd = dup(fds_of_kinds[0]);

    CHECK(fd >= 0);
    CHECK(close(fd) == 0);
    return fd;
}

/* What has been written and what has arrived. */
typedef struct account {
    uint64_t bytes, sum, lines;
    int64_t fds, kinds; /* the kinds' sum, each times its place in the order */
} account;

static void count_fd(account *of, int32_t kind)
{
    of->fds++;
    of->kinds += of->fds * kind;
}

/* One write, of bytes and descriptors that the input chooses. Returns what hipc_send returned. */
static int64_t write_some(input *in, int fd, account *sent)
{
    unsigned what = take(in), first = take(in);
    size_t length, offset = 0;
    char *bytes = take_bytes(in, take(in), &length);
    int32_t fds[HIPC_MAX_FDS], n_fds = 0;
    int64_t written;

    if (what & 1 && length > 0)
        bytes[length - 1] = '\n';
    if (what & 2)
        n_fds = (int32_t)(what & 4 ? 1 + first % HIPC_MAX_FDS : 1 + first % 4);
    for (int32_t i = 0; i < n_fds; i++)
        fds[i] = fds_of_kinds[(first + (unsigned)i) % KINDS];
    if (what & 8 && length > 0) {
        offset = first % length;
        n_fds = offset > 0 ? 0 : n_fds;
    }
    if (what & 16) {
        size_t head = length / 3, tail = length / 4;

        written = hipc_send_parts(fd, bytes, head, bytes + head, length - head - tail,
                                  bytes + length - tail, tail, offset, fds, n_fds);
    } else {
        written = hipc_send(fd, bytes, offset, length, fds, n_fds);
    }
    CHECK(written <= (int64_t)(length - offset));
    CHECK(written > 0 || (length == 0 && written == (n_fds > 0 ? -EINVAL : 0)) ||
          written == -EAGAIN || written == -ETOOMANYREFS);
    for (int64_t i = 0; i < written; i++) {
        sent->sum += (uint8_t)bytes[offset + (size_t)i];
        sent->lines += bytes[offset + (size_t)i] == '\n';
    }
    if (written > 0) {
        sent->bytes += (uint64_t)written;
        for (int32_t i = 0; i < n_fds; i++)
            count_fd(sent, kinds[(first + (unsigned)i) % KINDS]);
    }
    free(bytes);
    return written;
}

/* Read until the socket is empty or at its end. Returns whether it has ended. */
static int read_all(int fd, hipc_reader *reader, size_t budget, account *got)
{
    for (;;) {
        int outcome = hipc_receive(fd, reader, budget);

        CHECK(outcome >= 0 && reader->error == 0);
        check_sets(reader);
        for (int32_t i = 0; i < reader->n_fds; i++) {
            int one = reader->fds[i];

            int32_t kind = hipc_adopt(one);

            count_fd(got, kind);
            CHECK(fcntl(one, F_GETFD) == FD_CLOEXEC);
            if (kind & HIPC_KIND_SOCKET)
                CHECK((fcntl(one, F_GETFL) & O_NONBLOCK) != 0);
            CHECK(hipc_close(one) == 0);
        }
        for (int32_t i = 0; i < reader->n_sets; i++)
            CHECK(reader->sets[i * HIPC_SET_FIELDS + 3] == 0);
        reader->n_fds = reader->n_sets = 0;
        got->lines += (uint64_t)take_lines(reader, &got->sum);
        got->bytes = reader->position + reader->filled;
        if (outcome == HIPC_FULL)
            grow(reader);
        if (outcome == HIPC_DRAINED || (outcome == HIPC_EOF && reader->scanned == reader->filled))
            return outcome == HIPC_EOF;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    account sent = {0}, got = {0};
    hipc_reader reader;
    size_t budget;
    int pair[2], before;

    if (fds_of_kinds[0] == 0)
        open_kinds();
    before = lowest_free();
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0); /* blocking, even */
    new_reader(&reader, 1 + take(&in) * 4, 1 + (int)(take(&in) % 32), 1 + (int)(take(&in) % 8),
               HIPC_READ_FDS + (int)take(&in) * 3);
    budget = 1 + take(&in) * 8;
    while (in.left > 0) {
        /* Several writes may come before a read, but descriptors in flight are few per user. */
        for (unsigned writes = 1 + take(&in) % 3; writes > 0; writes--)
            if (write_some(&in, pair[0], &sent) < 0)
                break;
        CHECK(!read_all(pair[1], &reader, budget, &got));
        CHECK(got.bytes == sent.bytes && got.lines == sent.lines);
    }
    CHECK(hipc_close(pair[0]) == 0);
    CHECK(read_all(pair[1], &reader, budget, &got));
    for (; reader.consumed < reader.filled; reader.consumed++)
        got.sum += (uint8_t)reader.data[reader.consumed];
    CHECK(memcmp(&sent, &got, sizeof(sent)) == 0);
    CHECK(hipc_close(pair[1]) == 0);
    free_reader(&reader);
    CHECK(lowest_free() == before);
    return 0;
}
