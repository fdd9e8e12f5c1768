/*
 * Tests of the C core alone, without Python.
 *
 * Every buffer that the core may read or write ends where a page ends, and the next page is not
 * mapped: one byte too far crashes. Descriptors are counted before and after each test.
 *
 * Built and run by tests/wire/test_c_core.py, plainly and under AddressSanitizer and UBSan:
 *
 *     cc -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -Icsrc \
 *        -Wl,--wrap=recvmsg,--wrap=sendmsg tests/csrc/test_hipc.c csrc/hipc_*.c
 */
#include "hipc.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* -- asserting ------------------------------------------------------------------------------- */

static const char *current_test = "";

static void fail(int line, const char *what)
{
    fprintf(stderr, "%s: test_hipc.c:%d: %s\n", current_test, line, what);
    exit(1);
}

static void check_equal(int line, const char *what, long long got, long long wanted)
{
    if (got == wanted)
        return;
    fprintf(stderr, "got %lld, wanted %lld: ", got, wanted);
    fail(line, what);
}

#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define CHECK_EQUAL(got, wanted) \
    check_equal(__LINE__, #got " == " #wanted, (long long)(got), (long long)(wanted))

/* -- the kernel, and what it does rarely ------------------------------------------------------ */

/* How many of the next reads and writes a signal interrupts. With MSG_DONTWAIT Linux never does. */
static int interruptions;

ssize_t __real_recvmsg(int fd, struct msghdr *header, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *header, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *header, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags);

/* A kernel of our own in place of recvmsg, or NULL. */
static ssize_t (*played_recvmsg)(struct msghdr *header);

static int interrupted(void)
{
    if (interruptions == 0)
        return 0;
    interruptions--;
    errno = EINTR;
    return 1;
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *header, int flags)
{
    if (played_recvmsg != NULL)
        return played_recvmsg(header);
    return interrupted() ? -1 : __real_recvmsg(fd, header, flags);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags)
{
    return interrupted() ? -1 : __real_sendmsg(fd, header, flags);
}

/* -- buffers that end at an unmapped page ---------------------------------------------------- */

enum region { DATA, ENDS, SETS, FDS, TAIL, INPUT, LENGTHS, REGIONS };

#define REGION_SIZE ((size_t)4 << 20)

static char *region_end[REGIONS];

static void map_regions(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    for (int i = 0; i < REGIONS; i++) {
        char *start = mmap(NULL, REGION_SIZE + page, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(start != MAP_FAILED);
        region_end[i] = start + REGION_SIZE;
        CHECK(mprotect(region_end[i], page, PROT_NONE) == 0);
    }
}

static void *at_guard(enum region region, size_t size)
{
    CHECK(size <= REGION_SIZE);
    return region_end[region] - size;
}

static char *guarded_copy(const char *bytes, size_t length)
{
    return length > 0 ? memcpy(at_guard(INPUT, length), bytes, length) : at_guard(INPUT, 0);
}

static void new_reader(hipc_reader *reader, size_t capacity, int max_ends, int max_sets,
                       int max_fds)
{
    memset(reader, 0, sizeof(*reader));
    reader->data = at_guard(DATA, capacity);
    reader->capacity = capacity;
    reader->ends = at_guard(ENDS, (size_t)max_ends * sizeof(int32_t));
    reader->sets = at_guard(SETS, (size_t)max_sets * HIPC_SET_FIELDS * sizeof(int32_t));
    reader->fds = at_guard(FDS, (size_t)max_fds * sizeof(int32_t));
    reader->max_ends = max_ends;
    reader->max_sets = max_sets;
    reader->max_fds = max_fds;
}

static void usual_reader(hipc_reader *reader)
{
    new_reader(reader, 4096, 64, 8, 2 * HIPC_READ_FDS);
}

/* -- taking a report, as a caller does ------------------------------------------------------- */

/* The lines taken so far, newlines included. */
typedef struct taken {
    char bytes[512];
    size_t length;
    int lines;
} taken;

static void take_lines(hipc_reader *reader, taken *out)
{
    for (int32_t i = 0; i < reader->n_ends; i++) {
        size_t end = (size_t)reader->ends[i];
        size_t size = end - reader->consumed;

        CHECK(end > reader->consumed && end <= reader->scanned);
        CHECK(reader->data[end - 1] == '\n');
        CHECK(memchr(reader->data + reader->consumed, '\n', size - 1) == NULL);
        CHECK(out->length + size <= sizeof(out->bytes));
        memcpy(out->bytes + out->length, reader->data + reader->consumed, size);
        out->length += size;
        out->lines++;
        reader->consumed = end;
    }
    reader->n_ends = 0;
}

static void close_fds(hipc_reader *reader)
{
    for (int32_t i = 0; i < reader->n_fds; i++)
        CHECK(close(reader->fds[i]) == 0);
    reader->n_fds = reader->n_sets = 0;
}

static void check_set(int line, const hipc_reader *reader, int index, int start, int end,
                      int count, int truncated)
{
    const int32_t *set = reader->sets + index * HIPC_SET_FIELDS;

    check_equal(line, "start of the set", set[0], start);
    check_equal(line, "end of the set", set[1], end);
    check_equal(line, "descriptors of the set", set[2], count);
    check_equal(line, "loss in the set", set[3], truncated);
}

#define CHECK_SET(reader, index, start, end, count, truncated) \
    check_set(__LINE__, reader, index, start, end, count, truncated)

/* -- sockets and descriptors ----------------------------------------------------------------- */

static void make_pair(int pair[2])
{
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
}

static void close_pair(const int pair[2])
{
    CHECK(close(pair[0]) == 0);
    CHECK(close(pair[1]) == 0);
}

static void put(int fd, const char *bytes, size_t length)
{
    CHECK_EQUAL(hipc_send(fd, guarded_copy(bytes, length), 0, length, NULL, 0), length);
}

static void put_with_fds(int fd, const char *bytes, const int *fds, int n_fds)
{
    size_t length = strlen(bytes);
    int32_t *guarded = at_guard(FDS, (size_t)n_fds * sizeof(int32_t));

    /* The region of a reader that holds nothing: the core only reads from it here. */
    memcpy(guarded, fds, (size_t)n_fds * sizeof(int32_t));
    CHECK_EQUAL(hipc_send(fd, guarded_copy(bytes, length), 0, length, guarded, n_fds), length);
}

static int new_file(void)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

static ino_t inode(int fd)
{
    struct stat status;

    CHECK(fstat(fd, &status) == 0);
    return status.st_ino;
}

static void send_buffer(int fd, int size)
{
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)) == 0);
}

static int count_descriptors(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;

    CHECK(directory != NULL);
    while (readdir(directory) != NULL)
        count++;
    closedir(directory);
    return count;
}

/* -- running out of descriptor slots --------------------------------------------------------- */

#define SLOTS 64

static int fillers[SLOTS];
static int n_fillers;
static struct rlimit usual_limit;

/* Leave exactly `free_slots` numbers that the kernel may hand out. */
static void leave_slots(int free_slots)
{
    struct rlimit limit;
    int fd;

    CHECK(getrlimit(RLIMIT_NOFILE, &usual_limit) == 0);
    limit = usual_limit;
    limit.rlim_cur = SLOTS;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    n_fillers = 0;
    while ((fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0)
        fillers[n_fillers++] = fd;
    CHECK_EQUAL(errno, EMFILE);
    CHECK(n_fillers >= free_slots);
    for (int i = 0; i < free_slots; i++)
        CHECK(close(fillers[--n_fillers]) == 0);
}

static void usual_slots(void)
{
    while (n_fillers > 0)
        CHECK(close(fillers[--n_fillers]) == 0);
    CHECK(setrlimit(RLIMIT_NOFILE, &usual_limit) == 0);
}

/* -- hipc_feed, hipc_scan, hipc_compact ------------------------------------------------------ */

static const char STREAM[] = "a\n\nbcd\n\n\nefghij\nk\nrest";
#define STREAM_LENGTH (sizeof(STREAM) - 1)
#define COMPLETE (STREAM_LENGTH - 4)
#define LINES 7
#define LONGEST 7

static void check_stream(const hipc_reader *reader, const taken *out)
{
    CHECK_EQUAL(out->lines, LINES);
    CHECK_EQUAL(out->length, COMPLETE);
    CHECK(memcmp(out->bytes, STREAM, COMPLETE) == 0);
    CHECK_EQUAL(reader->position + reader->consumed, COMPLETE);
    CHECK_EQUAL(reader->position + reader->filled, STREAM_LENGTH);
    CHECK_EQUAL(reader->scanned, reader->filled);
    CHECK(memcmp(reader->data + reader->consumed, "rest", 4) == 0);
}

static void feed_all(hipc_reader *reader, const char *bytes, size_t length, taken *out)
{
    size_t fed = 0;

    do {
        int64_t got = hipc_feed(reader, guarded_copy(bytes + fed, length - fed), length - fed);

        CHECK(got >= 0 && (size_t)got <= length - fed);
        CHECK(reader->filled <= reader->capacity);
        fed += (size_t)got;
        /* With room for the longest line, each call brings bytes or lines. */
        CHECK(got > 0 || reader->n_ends > 0 || fed == length);
        take_lines(reader, out);
    } while (fed < length || reader->scanned < reader->filled);
}

/* The lines are the same however the stream is cut, with every buffer that holds the longest. */
static void test_feed_of_every_split(void)
{
    for (size_t capacity = LONGEST; capacity <= STREAM_LENGTH + 1; capacity++) {
        for (size_t first = 0; first <= STREAM_LENGTH; first++) {
            for (size_t second = first; second <= STREAM_LENGTH; second++) {
                hipc_reader reader;
                taken out = {0};

                new_reader(&reader, capacity, 1 + (int)(first % 4), 1, HIPC_READ_FDS);
                feed_all(&reader, STREAM, first, &out);
                feed_all(&reader, STREAM + first, second - first, &out);
                feed_all(&reader, STREAM + second, STREAM_LENGTH - second, &out);
                check_stream(&reader, &out);
            }
        }
    }
}

/* Bytes that come one by one make the same lines. */
static void test_feed_of_single_bytes(void)
{
    hipc_reader reader;
    taken out = {0};

    new_reader(&reader, LONGEST, 1, 1, HIPC_READ_FDS);
    for (size_t i = 0; i < STREAM_LENGTH; i++)
        feed_all(&reader, STREAM + i, 1, &out);
    check_stream(&reader, &out);
}

/* A buffer smaller than the line takes what fits, then nothing, and writes no byte beyond it. */
static void test_feed_of_line_longer_than_every_small_buffer(void)
{
    for (size_t capacity = 0; capacity < 6; capacity++) {
        hipc_reader reader;

        new_reader(&reader, capacity, 1, 1, HIPC_READ_FDS);
        CHECK_EQUAL(hipc_feed(&reader, guarded_copy("efghij\n", 7), 7), capacity);
        CHECK_EQUAL(hipc_feed(&reader, guarded_copy("x", 1), 1), 0);
        CHECK_EQUAL(reader.n_ends, 0);
        CHECK_EQUAL(reader.filled, capacity);
        CHECK_EQUAL(reader.scanned, capacity);
    }
}

/* A newline in the last byte of the buffer ends a line. */
static void test_feed_with_newline_at_the_last_byte(void)
{
    hipc_reader reader;

    new_reader(&reader, 4, 1, 1, HIPC_READ_FDS);
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("abc\n", 4), 4), 4);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.ends[0], 4);
}

/* Newlines alone are empty lines. */
static void test_feed_of_empty_lines(void)
{
    hipc_reader reader;

    new_reader(&reader, 3, 3, 1, HIPC_READ_FDS);
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("\n\n\n", 3), 3), 3);
    CHECK_EQUAL(reader.n_ends, 3);
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(reader.ends[i], i + 1);
}

/* When `ends` is full the search stops, and goes on from there once the report is taken. */
static void test_feed_resumed_after_ends_were_full(void)
{
    hipc_reader reader;

    new_reader(&reader, 16, 2, 1, HIPC_READ_FDS);
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("a\nb\nc\ndd\ne", 10), 10), 10);
    CHECK_EQUAL(reader.n_ends, 2);
    CHECK_EQUAL(reader.scanned, 4);
    /* Not taken: nothing is added and nothing is lost. */
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("", 0), 0), 0);
    CHECK_EQUAL(reader.n_ends, 2);
    reader.consumed = 4;
    reader.n_ends = 0;
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("", 0), 0), 0);
    CHECK_EQUAL(reader.n_ends, 2);
    CHECK_EQUAL(reader.ends[0], 2);
    CHECK_EQUAL(reader.ends[1], 5);
    CHECK_EQUAL(reader.position, 4);
    reader.consumed = 5;
    reader.n_ends = 0;
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("", 0), 0), 0);
    CHECK_EQUAL(reader.n_ends, 0);
    CHECK_EQUAL(reader.filled, 1);
}

/* A byte that was searched is not looked at again: a newline put there later is not seen. */
static void test_scan_of_bytes_searched_before(void)
{
    hipc_reader reader;

    usual_reader(&reader);
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("abc", 3), 3), 3);
    CHECK_EQUAL(reader.scanned, 3);
    reader.data[1] = '\n';
    hipc_scan(&reader);
    CHECK_EQUAL(hipc_feed(&reader, guarded_copy("d\n", 2), 2), 2);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.ends[0], 5);
}

/* Compacting moves the unfinished line, and what is known about it, to the front. */
static void test_compact_at_every_offset(void)
{
    for (size_t consumed = 0; consumed <= 8; consumed++) {
        hipc_reader reader;

        new_reader(&reader, 8, 1, 1, HIPC_READ_FDS);
        memcpy(reader.data, "12345678", 8);
        reader.position = 100;
        reader.filled = reader.scanned = 8;
        reader.consumed = consumed;
        hipc_compact(&reader);
        CHECK_EQUAL(reader.position, 100 + consumed);
        CHECK_EQUAL(reader.consumed, 0);
        CHECK_EQUAL(reader.filled, 8 - consumed);
        CHECK_EQUAL(reader.scanned, 8 - consumed);
        CHECK(memcmp(reader.data, &"12345678"[consumed], 8 - consumed) == 0);
    }
}

/* -- hipc_receive: bytes --------------------------------------------------------------------- */

#define ALL ((size_t)1 << 30)

/* A stream read through a socket makes the same lines, with every buffer and every cut. */
static void test_receive_of_every_split(void)
{
    for (size_t capacity = LONGEST; capacity <= STREAM_LENGTH + 1; capacity++) {
        for (size_t cut = 1; cut < STREAM_LENGTH; cut++) {
            hipc_reader reader;
            taken out = {0};
            int pair[2], outcome;

            make_pair(pair);
            new_reader(&reader, capacity, 1 + (int)(cut % 4), 1, HIPC_READ_FDS);
            put(pair[0], STREAM, cut);
            while ((outcome = hipc_receive(pair[1], &reader, 1 + cut % 5)) == HIPC_MORE)
                take_lines(&reader, &out);
            CHECK_EQUAL(outcome, HIPC_DRAINED);
            put(pair[0], STREAM + cut, STREAM_LENGTH - cut);
            CHECK(close(pair[0]) == 0);
            take_lines(&reader, &out);
            while ((outcome = hipc_receive(pair[1], &reader, ALL)) == HIPC_MORE)
                take_lines(&reader, &out);
            CHECK_EQUAL(outcome, HIPC_EOF);
            take_lines(&reader, &out);
            check_stream(&reader, &out);
            CHECK(close(pair[1]) == 0);
        }
    }
}

/* An empty socket is drained at once, and so is one whose bytes were all read. */
static void test_receive_until_drained(void)
{
    hipc_reader reader;
    int pair[2];

    make_pair(pair);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 0);
    put(pair[0], "ab\ncd", 5);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.ends[0], 3);
    CHECK_EQUAL(reader.filled, 5);
    CHECK_EQUAL(reader.error, 0);
    close_pair(pair);
}

/* Reading stops when the budget is used up; a budget of nothing reads nothing. */
static void test_receive_with_budget(void)
{
    static char block[3 << 20];
    hipc_reader reader;
    int pair[2];
    int64_t sent;

    make_pair(pair);
    send_buffer(pair[0], 4 << 20);
    new_reader(&reader, 4 << 20, 4, 1, HIPC_READ_FDS);
    sent = hipc_send(pair[0], block, 0, sizeof(block), NULL, 0);
    CHECK(sent > 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, 0), HIPC_MORE);
    CHECK_EQUAL(reader.filled, 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, 1), HIPC_MORE);
    CHECK(reader.filled >= 1 && reader.filled <= 1 << 20);
    while (reader.filled < (size_t)sent)
        CHECK_EQUAL(hipc_receive(pair[1], &reader, 1), HIPC_MORE);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, 1), HIPC_DRAINED);
    close_pair(pair);
}

/* A line that fills the buffer is said to need more room, and continues in a larger one. */
static void test_receive_into_full_buffer(void)
{
    hipc_reader reader;
    int pair[2];

    make_pair(pair);
    new_reader(&reader, 8, 4, 1, HIPC_READ_FDS);
    put(pair[0], "12345678\n", 9);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_FULL);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_FULL);
    CHECK_EQUAL(reader.filled, 8);
    reader.data = memcpy(at_guard(DATA, 16), reader.data, 8);
    reader.capacity = 16;
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.ends[0], 9);
    close_pair(pair);
}

/* A full buffer that holds a complete line has room once the line is taken. */
static void test_receive_into_full_buffer_with_complete_line(void)
{
    hipc_reader reader;
    taken out = {0};
    int pair[2];

    make_pair(pair);
    new_reader(&reader, 8, 4, 1, HIPC_READ_FDS);
    put(pair[0], "123\n5678\n", 9);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    take_lines(&reader, &out);
    CHECK_EQUAL(out.lines, 1);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.position, 4);
    close_pair(pair);
}

/* Lines that are already in the buffer are reported before the socket is read. */
static void test_receive_after_ends_were_full(void)
{
    hipc_reader reader;
    taken out = {0};
    int pair[2];

    make_pair(pair);
    new_reader(&reader, 64, 2, 1, HIPC_READ_FDS);
    put(pair[0], "1\n2\n3\n4\n5\n", 10);
    for (int lines = 2; lines <= 4; lines += 2) {
        CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
        take_lines(&reader, &out);
        CHECK_EQUAL(out.lines, lines);
    }
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    take_lines(&reader, &out);
    CHECK_EQUAL(out.lines, 5);
    close_pair(pair);
}

/* The end of the stream is reported with the lines before it, and again afterwards. */
static void test_receive_at_eof(void)
{
    hipc_reader reader;
    int pair[2];

    make_pair(pair);
    usual_reader(&reader);
    put(pair[0], "last\nhalf", 9);
    CHECK(close(pair[0]) == 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_EOF);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.filled, 9);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_EOF);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK(close(pair[1]) == 0);
}

/* An error is returned if nothing came before it. */
static void test_receive_when_the_first_read_fails(void)
{
    hipc_reader reader;
    int pair[2], pipe_ends[2];

    make_pair(pair);
    usual_reader(&reader);
    put(pair[1], "unread", 6);
    CHECK(close(pair[0]) == 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), -ECONNRESET);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_EOF);
    CHECK(close(pair[1]) == 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), -EBADF);
    CHECK(pipe(pipe_ends) == 0);
    CHECK_EQUAL(hipc_receive(pipe_ends[0], &reader, ALL), -ENOTSOCK);
    close_pair(pipe_ends);
}

/* An error behind lines that an earlier call had no room for does not take them away. */
static void test_receive_when_a_read_fails_behind_buffered_lines(void)
{
    hipc_reader reader;
    taken out = {0};
    int pair[2];

    make_pair(pair);
    new_reader(&reader, 64, 2, 1, HIPC_READ_FDS);
    put(pair[0], "1\n2\n3\n", 6);
    put(pair[1], "unread", 6);
    CHECK(close(pair[0]) == 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    take_lines(&reader, &out);
    CHECK(reader.scanned < reader.filled);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.error, ECONNRESET);
    take_lines(&reader, &out);
    CHECK_EQUAL(out.lines, 3);
    CHECK(close(pair[1]) == 0);
}

/* An error behind data does not take the data away; the next call says so or says EOF. */
static void test_receive_when_a_later_read_fails(void)
{
    hipc_reader reader;
    int pair[2];

    make_pair(pair);
    usual_reader(&reader);
    put(pair[0], "ack\n", 4);
    put(pair[1], "unread", 6);
    CHECK(close(pair[0]) == 0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.error, ECONNRESET);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_EOF);
    CHECK_EQUAL(reader.error, 0);
    CHECK(close(pair[1]) == 0);
}

/* -- hipc_receive: descriptors --------------------------------------------------------------- */

/* Any number of descriptors that one message can carry arrives whole. */
static void test_receive_of_every_number_of_fds(void)
{
    int32_t fds[HIPC_MAX_FDS];
    int file = new_file();

    for (int i = 0; i < HIPC_MAX_FDS; i++)
        fds[i] = file;
    for (int count = 1; count <= HIPC_MAX_FDS; count++) {
        hipc_reader reader;
        int pair[2];

        make_pair(pair);
        put_with_fds(pair[0], "x\n", fds, count);
        new_reader(&reader, 16, 2, 2, 2 * HIPC_READ_FDS);
        CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
        CHECK_EQUAL(reader.n_sets, 1);
        CHECK_EQUAL(reader.n_fds, count);
        CHECK_SET(&reader, 0, 0, 2, count, 0);
        close_fds(&reader);
        close_pair(pair);
    }
    CHECK(close(file) == 0);
}

/* A report with room for one full message takes a full message, and then is used up. */
static void test_receive_of_most_fds_into_smallest_report(void)
{
    int32_t fds[HIPC_MAX_FDS];
    hipc_reader reader;
    int pair[2], file = new_file();

    for (int i = 0; i < HIPC_MAX_FDS; i++)
        fds[i] = file;
    make_pair(pair);
    put_with_fds(pair[0], "x\n", fds, HIPC_MAX_FDS);
    put_with_fds(pair[0], "y\n", fds, 1);
    new_reader(&reader, 16, 2, 2, HIPC_READ_FDS);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.n_fds, HIPC_MAX_FDS);
    /* Nothing is taken: nothing more is read, so nothing can be lost. */
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.n_fds, HIPC_MAX_FDS);
    close_fds(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.n_fds, 1);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* Each read that brings descriptors makes a set, and sets keep the order of the descriptors. */
static void test_receive_of_several_sets(void)
{
    int32_t files[3];
    hipc_reader reader;
    int pair[2];

    make_pair(pair);
    for (int i = 0; i < 3; i++)
        files[i] = new_file();
    put(pair[0], "m1\n", 3);
    put_with_fds(pair[0], "h1\n", files, 1);
    put_with_fds(pair[0], "h2\n", files + 1, 2);
    put(pair[0], "m2\n", 3);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 4);
    CHECK_EQUAL(reader.n_sets, 2);
    CHECK_EQUAL(reader.n_fds, 3);
    /* The plain line in front was joined to the read of the first set; the one behind was not. */
    CHECK_SET(&reader, 0, 0, 6, 1, 0);
    CHECK_SET(&reader, 1, 6, 9, 2, 0);
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(inode(reader.fds[i]), inode(files[i]));
        CHECK(close(files[i]) == 0);
    }
    close_fds(&reader);
    close_pair(pair);
}

/* When the array of sets is full, the rest stays in the socket until the report is taken. */
static void test_receive_when_sets_are_full(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();

    make_pair(pair);
    for (int i = 0; i < 3; i++)
        put_with_fds(pair[0], "h\n", &file, 1);
    new_reader(&reader, 64, 8, 2, 4 * HIPC_READ_FDS);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.n_sets, 2);
    close_fds(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_sets, 1);
    CHECK_SET(&reader, 0, 4, 6, 1, 0);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* A read starts only while the array of descriptors has room for a full message. */
static void test_receive_when_fds_are_nearly_full(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();

    make_pair(pair);
    for (int i = 0; i < 12; i++)
        put_with_fds(pair[0], "h\n", &file, 1);
    new_reader(&reader, 64, 16, 16, HIPC_READ_FDS + 10);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_MORE);
    CHECK_EQUAL(reader.n_fds, 11);
    close_fds(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_fds, 1);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* With a buffer shorter than the line, descriptors come with its first bytes only. */
static void test_receive_of_fds_in_short_reads(void)
{
    static const char LINE[] = "0123456789\n";

    for (size_t capacity = 1; capacity <= sizeof(LINE); capacity++) {
        size_t first = capacity < 11 ? capacity : 11;
        hipc_reader reader;
        int pair[2], files[2] = {new_file(), new_file()};

        make_pair(pair);
        put_with_fds(pair[0], LINE, files, 2);
        new_reader(&reader, capacity, 4, 4, 2 * HIPC_READ_FDS);
        CHECK_EQUAL(hipc_receive(pair[1], &reader, 1), HIPC_MORE);
        CHECK_EQUAL(reader.n_sets, 1);
        CHECK_SET(&reader, 0, 0, (int)first, 2, 0);
        close_fds(&reader);
        reader.data = memcpy(at_guard(DATA, 32), reader.data, reader.filled);
        reader.capacity = 32;
        CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
        CHECK_EQUAL(reader.n_ends, 1);
        CHECK_EQUAL(reader.n_fds, 0);
        CHECK_EQUAL(reader.n_sets, 0);
        close_pair(pair);
        close_pair(files);
    }
}

/* What a short read leaves joins the next message with descriptors in one read. */
static void test_receive_of_remainder_with_the_next_set(void)
{
    hipc_reader reader;
    taken out = {0};
    int pair[2], files[2] = {new_file(), new_file()};

    make_pair(pair);
    put_with_fds(pair[0], "abcd\n", files, 1);
    put_with_fds(pair[0], "efg\n", files + 1, 1);
    new_reader(&reader, 5, 4, 4, 2 * HIPC_READ_FDS);
    reader.filled = reader.scanned = 3; /* as if "xyz" had been left over: room for two bytes */
    memcpy(reader.data, "xyz", 3);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_FULL);
    CHECK_SET(&reader, 0, 3, 5, 1, 0);
    CHECK_EQUAL(inode(reader.fds[0]), inode(files[0]));
    close_fds(&reader);
    reader.data = memcpy(at_guard(DATA, 64), reader.data, 5);
    reader.capacity = 64;
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_sets, 1);
    CHECK_SET(&reader, 0, 5, 12, 1, 0);
    CHECK_EQUAL(inode(reader.fds[0]), inode(files[1]));
    take_lines(&reader, &out);
    CHECK_EQUAL(out.lines, 2);
    CHECK(memcmp(out.bytes, "xyzabcd\nefg\n", 12) == 0);
    close_fds(&reader);
    close_pair(pair);
    close_pair(files);
}

/* With too few free slots the first descriptors arrive, and the set says that some are lost. */
static void test_receive_of_fds_with_some_slots_free(void)
{
    for (int free_slots = 1; free_slots < 5; free_slots++) {
        hipc_reader reader;
        int pair[2], files[5];

        make_pair(pair);
        for (int i = 0; i < 5; i++)
            files[i] = new_file();
        put_with_fds(pair[0], "h\n", files, 5);
        put(pair[0], "m\n", 2);
        usual_reader(&reader);
        leave_slots(free_slots);
        CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
        CHECK_EQUAL(reader.n_ends, 2);
        CHECK_EQUAL(reader.n_sets, 1);
        CHECK_SET(&reader, 0, 0, 2, free_slots, 1);
        CHECK_EQUAL(reader.n_fds, free_slots);
        for (int i = 0; i < free_slots; i++)
            CHECK_EQUAL(inode(reader.fds[i]), inode(files[i]));
        close_fds(&reader);
        usual_slots();
        for (int i = 0; i < 5; i++)
            CHECK(close(files[i]) == 0);
        close_pair(pair);
    }
}

/* With no free slot nothing arrives but the bytes, and a set of no descriptors marks the loss. */
static void test_receive_of_fds_with_no_slot_free(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();

    make_pair(pair);
    put_with_fds(pair[0], "lost\n", &file, 1);
    put_with_fds(pair[0], "also\n", &file, 1);
    usual_reader(&reader);
    leave_slots(0);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    usual_slots();
    CHECK_EQUAL(reader.n_ends, 2);
    CHECK_EQUAL(reader.n_fds, 0);
    CHECK_EQUAL(reader.n_sets, 2);
    CHECK_SET(&reader, 0, 0, 5, 0, 1);
    CHECK_SET(&reader, 1, 5, 10, 0, 1);
    put_with_fds(pair[0], "whole\n", &file, 1);
    reader.n_sets = 0;
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_SET(&reader, 0, 10, 16, 1, 0);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* What arrives is close-on-exec, sockets are non-blocking, others keep their mode, and each has
 * its kind. */
static void test_receive_prepares_fds(void)
{
    hipc_reader reader;
    int pair[2], blocking[2], pipe_ends[2], sent[3];

    make_pair(pair);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, blocking) == 0);
    CHECK(pipe(pipe_ends) == 0);
    sent[0] = blocking[0];
    sent[1] = pipe_ends[0];
    sent[2] = new_file();
    CHECK((fcntl(blocking[0], F_GETFL) & O_NONBLOCK) == 0);
    put_with_fds(pair[0], "h\n", sent, 3);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_fds, 3);
    for (int i = 0; i < 3; i++)
        CHECK_EQUAL(fcntl(reader.fds[i], F_GETFD), FD_CLOEXEC);
    CHECK((fcntl(reader.fds[0], F_GETFL) & O_NONBLOCK) == 0);
    CHECK_EQUAL(hipc_adopt(reader.fds[0]), HIPC_KIND_SOCKET | AF_UNIX << 8 | SOCK_STREAM);
    CHECK_EQUAL(hipc_adopt(reader.fds[1]), HIPC_KIND_FIFO);
    CHECK_EQUAL(hipc_adopt(reader.fds[2]), HIPC_KIND_OTHER);
    CHECK((fcntl(reader.fds[0], F_GETFL) & O_NONBLOCK) != 0);
    CHECK((fcntl(reader.fds[1], F_GETFL) & O_NONBLOCK) == 0);
    CHECK_EQUAL(hipc_adopt(-1), -EBADF);
    close_fds(&reader);
    close_pair(pair);
    close_pair(blocking);
    close_pair(pipe_ends);
    CHECK(close(sent[2]) == 0);
}

/* Control messages that nobody asked for are passed over, beside descriptors and alone. */
static void test_receive_of_other_control_messages(void)
{
    hipc_reader reader;
    int pair[2], on = 1, file = new_file();

    make_pair(pair);
    CHECK(setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) == 0);
    usual_reader(&reader);
    put(pair[0], "m\n", 2);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_sets, 0);
    put_with_fds(pair[0], "h\n", &file, 1);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_sets, 1);
    CHECK_SET(&reader, 0, 2, 4, 1, 0);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* -- what kernels other than Linux may deliver ----------------------------------------------- */

/* The control data of the played kernel, and how much of it the header will say there is. */
static char played_control[2048];
static size_t played_length, played_said;
static int played_flags;

static ssize_t deliver(struct msghdr *header)
{
    size_t room = header->msg_controllen < played_length ? header->msg_controllen : played_length;

    memcpy(header->msg_control, played_control, room);
    header->msg_controllen = played_said;
    header->msg_flags = played_flags;
    memcpy(header->msg_iov->iov_base, "x\n", 2);
    return 2;
}

static void play_nothing(void)
{
    memset(played_control, 0, sizeof(played_control));
    played_length = played_said = 0;
    played_flags = 0;
}

enum { PLAYED_FD = 100000 };

/* Append a control message that says it has `said` ints, of which there are `count`. */
static void play(int level, int type, size_t said, size_t count)
{
    struct cmsghdr header;
    char *at = played_control + played_length;

    memset(&header, 0, sizeof(header));
    header.cmsg_level = level;
    header.cmsg_type = type;
    header.cmsg_len = CMSG_LEN(said * sizeof(int));
    memcpy(at, &header, sizeof(header));
    for (size_t i = 0; i < count; i++) {
        int fd = PLAYED_FD + (int)i;

        memcpy(at + CMSG_LEN(0) + i * sizeof(int), &fd, sizeof(fd));
    }
    played_length += CMSG_SPACE(count * sizeof(int));
    played_said = played_length;
}

/* Receive once from the played kernel, and check that as many descriptors arrived, in order. */
static void check_played(int line, hipc_reader *reader, int count, int truncated)
{
    int before = reader->n_fds;

    played_recvmsg = deliver;
    check_equal(line, "outcome", hipc_receive(-1, reader, 2), HIPC_MORE);
    played_recvmsg = NULL;
    check_equal(line, "descriptors", reader->n_fds - before, count);
    for (int i = 0; i < count; i++)
        CHECK(reader->fds[before + i] >= PLAYED_FD);
    if (count == 0 && !truncated)
        return;
    check_set(line, reader, reader->n_sets - 1, (int)reader->filled - 2, (int)reader->filled,
              count, truncated);
}

#define CHECK_PLAYED(reader, count, truncated) check_played(__LINE__, reader, count, truncated)

/* A message that was cut off may still say how long it was (macOS). */
static void test_receive_of_control_that_was_cut_off(void)
{
    hipc_reader reader;

    usual_reader(&reader);
    play_nothing();
    play(SOL_SOCKET, SCM_RIGHTS, 300, 254);
    played_flags = MSG_CTRUNC;
    CHECK_PLAYED(&reader, 254, 1);
    for (int i = 0; i < 254; i++)
        CHECK_EQUAL(reader.fds[i], 100000 + i);
}

/* One descriptor more than Linux sends fits into the padding, and into the smallest report. */
static void test_receive_of_one_more_than_linux_sends(void)
{
    hipc_reader reader;

    play_nothing();
    play(SOL_SOCKET, SCM_RIGHTS, 254, 254);
    new_reader(&reader, 64, 8, 8, HIPC_READ_FDS);
    CHECK_PLAYED(&reader, 254, 0);
    new_reader(&reader, 64, 8, 8, 2 * HIPC_READ_FDS - 1);
    CHECK_PLAYED(&reader, 254, 0);
    CHECK_EQUAL(hipc_receive(-1, &reader, ALL), HIPC_MORE);
}

/* Lengths that cannot be are not believed, and end the walk. */
static void test_receive_of_impossible_lengths(void)
{
    const size_t lengths[] = {0, 1, CMSG_LEN(0) - 1, SIZE_MAX, SIZE_MAX / 2, INT32_MAX};

    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        struct cmsghdr header;
        hipc_reader reader;
        int whole = lengths[i] >= CMSG_LEN(0);

        usual_reader(&reader);
        play_nothing();
        play(SOL_SOCKET, SCM_RIGHTS, 254, 254);
        memcpy(&header, played_control, sizeof(header));
        header.cmsg_len = lengths[i];
        memcpy(played_control, &header, sizeof(header));
        CHECK_PLAYED(&reader, whole ? 254 : 0, 0);
        reader.n_fds = 0;
        played_said = SIZE_MAX; /* more than there is room for */
        CHECK_PLAYED(&reader, whole ? 254 : 0, 0);
        reader.n_fds = 0;
        played_said = CMSG_LEN(0) - 1;
        CHECK_PLAYED(&reader, 0, 0);
    }
}

/* Several messages of any kind, of which the last is cut off within a descriptor. */
static void test_receive_of_several_control_messages(void)
{
    hipc_reader reader;

    usual_reader(&reader);
    play_nothing();
    play(SOL_SOCKET, SCM_RIGHTS, 3, 3);
    play(SOL_SOCKET, SCM_CREDENTIALS, 3, 3);
    play(SOL_SOCKET, SCM_RIGHTS, 0, 0);
    play(IPPROTO_IP, SCM_RIGHTS, 1, 1);
    play(SOL_SOCKET, SCM_RIGHTS, 4, 4);
    CHECK_PLAYED(&reader, 7, 0);
    played_said -= sizeof(int) + 2;
    CHECK_PLAYED(&reader, 5, 0);
}

/* -- hipc_send ------------------------------------------------------------------------------- */

static char *patterned(size_t length)
{
    char *data = at_guard(INPUT, length);

    for (size_t i = 0; i < length; i++)
        data[i] = (char)('a' + i % 25);
    return data;
}

/* Read what has come and check that it continues the pattern; the descriptors are counted. */
static void drain_pattern(int fd, hipc_reader *reader, size_t *read_so_far, int *n_fds)
{
    int outcome;

    do {
        outcome = hipc_receive(fd, reader, ALL);
        CHECK(outcome == HIPC_DRAINED || outcome == HIPC_FULL || outcome == HIPC_MORE ||
              outcome == HIPC_EOF);
        for (size_t i = reader->consumed; i < reader->filled; i++, ++*read_so_far)
            CHECK(reader->data[i] == (char)('a' + *read_so_far % 25));
        *n_fds += reader->n_fds;
        close_fds(reader);
        reader->consumed = reader->scanned = reader->filled;
    } while (outcome == HIPC_FULL || outcome == HIPC_MORE);
}

/* A large write goes through a small socket buffer in pieces; its descriptors go once. */
static void test_send_of_large_data_with_fds(void)
{
    const size_t length = (size_t)1 << 20;
    size_t sent = 0, received = 0;
    hipc_reader reader;
    int pair[2], n_fds = 0, calls = 0, file = new_file();
    int32_t fds[3] = {file, file, file};
    char *data = patterned(length);

    make_pair(pair);
    send_buffer(pair[0], 4608);
    new_reader(&reader, 3000, 4, 4, 2 * HIPC_READ_FDS);
    while (sent < length) {
        /* The descriptors are given each time, as a careless caller would. */
        int64_t got = hipc_send(pair[0], data, sent, length, fds, 3);

        CHECK(got > 0);
        sent += (size_t)got;
        calls++;
        if (sent < length)
            CHECK_EQUAL(hipc_send(pair[0], data, sent, length, fds, 3), -EAGAIN);
        drain_pattern(pair[1], &reader, &received, &n_fds);
        CHECK_EQUAL(received, sent);
        CHECK_EQUAL(n_fds, 3);
    }
    CHECK(calls > 10);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* A write that went out in part has given all descriptors away, with the first byte. */
static void test_send_in_part_with_fds(void)
{
    const size_t length = 100000;
    hipc_reader reader;
    int pair[2], file = new_file();
    int32_t fds[3] = {file, file, file};
    int64_t sent;

    make_pair(pair);
    send_buffer(pair[0], 4608);
    sent = hipc_send(pair[0], patterned(length), 0, length, fds, 3);
    CHECK(sent > 0 && sent < (int64_t)length);
    new_reader(&reader, 1, 1, 1, HIPC_READ_FDS);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, 1), HIPC_MORE);
    CHECK_SET(&reader, 0, 0, 1, 3, 0);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* A full socket says so, and keeps nothing of the refused write. */
static void test_send_to_full_socket(void)
{
    size_t received = 0;
    hipc_reader reader;
    int pair[2], n_fds = 0, file = new_file();
    int64_t sent;

    make_pair(pair);
    send_buffer(pair[0], 4608);
    sent = hipc_send(pair[0], patterned(REGION_SIZE), 0, REGION_SIZE, NULL, 0);
    CHECK(sent > 0 && sent < (int64_t)REGION_SIZE);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, NULL, 0), -EAGAIN);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, &file, 1), -EAGAIN);
    new_reader(&reader, 3000, 4, 4, 2 * HIPC_READ_FDS);
    drain_pattern(pair[1], &reader, &received, &n_fds);
    CHECK_EQUAL(received, sent);
    CHECK_EQUAL(n_fds, 0);
    close_pair(pair);
    CHECK(close(file) == 0);
}

static volatile sig_atomic_t pipe_signals;

static void on_pipe_signal(int number)
{
    (void)number;
    pipe_signals++;
}

/* Writing to a peer that is gone is an error and no signal. */
static void test_send_to_closed_peer(void)
{
    struct sigaction action = {.sa_handler = on_pipe_signal}, before;
    int pair[2], file = new_file();

    make_pair(pair);
    CHECK(sigaction(SIGPIPE, &action, &before) == 0);
    CHECK(close(pair[1]) == 0);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, NULL, 0), -EPIPE);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, &file, 1), -EPIPE);
    CHECK_EQUAL(pipe_signals, 0);
    CHECK(sigaction(SIGPIPE, &before, NULL) == 0);
    CHECK(close(pair[0]) == 0);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, NULL, 0), -EBADF);
    CHECK(close(file) == 0);
}

/* Descriptors without a byte, or more than one message can carry, are refused and not sent. */
static void test_send_of_impossible_numbers(void)
{
    static int32_t fds[HIPC_MAX_FDS + 1];
    hipc_reader reader;
    int pair[2], file = new_file();

    for (int i = 0; i <= HIPC_MAX_FDS; i++)
        fds[i] = file;
    make_pair(pair);
    CHECK_EQUAL(hipc_send(pair[0], "", 0, 0, fds, 1), -EINVAL);
    CHECK_EQUAL(hipc_send(pair[0], "x", 1, 1, fds, 1), -EINVAL);
    CHECK_EQUAL(hipc_send(pair[0], "x", 2, 1, fds, 1), -EINVAL);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, fds, HIPC_MAX_FDS + 1), -EINVAL);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, fds, -1), -EINVAL);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.filled, 0);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* Writing nothing writes nothing. */
static void test_send_of_no_bytes(void)
{
    int pair[2];

    make_pair(pair);
    CHECK_EQUAL(hipc_send(pair[0], guarded_copy("", 0), 0, 0, NULL, 0), 0);
    CHECK_EQUAL(hipc_send(pair[0], guarded_copy("ab", 2), 2, 2, NULL, 0), 0);
    close_pair(pair);
}

/* A write that does not begin with the first byte carries no descriptors. */
static void test_send_from_offset(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();

    make_pair(pair);
    CHECK_EQUAL(hipc_send(pair[0], guarded_copy("abc\n", 4), 1, 4, &file, 1), 3);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_sets, 0);
    CHECK_EQUAL(reader.n_fds, 0);
    CHECK(memcmp(reader.data, "bc\n", 3) == 0);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* Three parts are one run of bytes, from whichever of them the write begins; no byte beyond. */
static void test_send_of_parts(void)
{
    static const char all[] = "[0,body]\n";
    const size_t length = sizeof(all) - 1;
    int file = new_file();

    for (size_t head = 0; head <= length; head++) {
        for (size_t offset = 0; offset <= length; offset++) {
            size_t body = (length - head) / 2, tail = length - head - body;
            hipc_reader reader;
            int pair[2];
            int64_t sent;

            make_pair(pair);
            memcpy(at_guard(INPUT, head), all, head);
            memcpy(at_guard(LENGTHS, body), all + head, body);
            memcpy(at_guard(TAIL, tail), all + head + body, tail);
            sent = hipc_send_parts(pair[0], at_guard(INPUT, head), head, at_guard(LENGTHS, body),
                                   body, at_guard(TAIL, tail), tail, offset, &file,
                                   offset < length ? 1 : 0);
            CHECK_EQUAL(sent, length - offset);
            usual_reader(&reader);
            CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
            CHECK_EQUAL(reader.filled, length - offset);
            CHECK(memcmp(reader.data, all + offset, length - offset) == 0);
            CHECK_EQUAL(reader.n_fds, offset == 0 ? 1 : 0);
            close_fds(&reader);
            close_pair(pair);
        }
    }
    CHECK(close(file) == 0);
}

/* Parts go through a small socket buffer in pieces; their descriptors go once. */
static void test_send_of_large_parts(void)
{
    const size_t length = (size_t)1 << 20, head = 7, tail = 100001;
    size_t sent = 0, received = 0;
    hipc_reader reader;
    int pair[2], n_fds = 0, file = new_file();
    const char *data = patterned(length);

    make_pair(pair);
    send_buffer(pair[0], 4608);
    new_reader(&reader, 3000, 4, 4, 2 * HIPC_READ_FDS);
    while (sent < length) {
        int64_t got = hipc_send_parts(pair[0], data, head, data + head, length - head - tail,
                                      data + length - tail, tail, sent, &file, 1);

        CHECK(got > 0);
        sent += (size_t)got;
        drain_pattern(pair[1], &reader, &received, &n_fds);
        CHECK_EQUAL(received, sent);
        CHECK_EQUAL(n_fds, 1);
    }
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* A descriptor that is not open is refused before a byte leaves. */
static void test_send_of_closed_fd(void)
{
    hipc_reader reader;
    int pair[2];
    int32_t fds[2] = {new_file(), -1};

    make_pair(pair);
    CHECK_EQUAL(hipc_send(pair[0], "x", 0, 1, fds, 2), -EBADF);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.filled, 0);
    close_pair(pair);
    CHECK(close(fds[0]) == 0);
}

/* Whoever shares the description of the socket may make it blocking: neither call waits. */
static void test_socket_made_blocking_by_a_copy(void)
{
    char data[4096];
    hipc_reader reader;
    int pair[2];
    int64_t sent;

    make_pair(pair);
    for (int i = 0; i < 2; i++)
        CHECK(fcntl(pair[i], F_SETFL, 0) == 0);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    memset(data, 'x', sizeof(data));
    do {
        sent = hipc_send(pair[0], data, 0, sizeof(data), NULL, 0);
    } while (sent > 0);
    CHECK_EQUAL(sent, -EAGAIN);
    close_pair(pair);
}

/* -- hipc_close ------------------------------------------------------------------------------ */

static void linger(int fd, int seconds)
{
    struct linger on = {1, seconds};

    CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &on, sizeof(on)) == 0);
}

/* The option goes from the socket, which a copy still shows, and the descriptor with it. */
static void test_close_clears_linger(void)
{
    struct linger is = {1, 1};
    socklen_t size = sizeof(is);
    int fd = socket(AF_INET, SOCK_STREAM, 0), copy = dup(fd);

    CHECK(fd >= 0 && copy >= 0);
    linger(fd, 3600);
    CHECK_EQUAL(hipc_close(fd), 0);
    CHECK_EQUAL(fcntl(fd, F_GETFD), -1);
    CHECK(getsockopt(copy, SOL_SOCKET, SO_LINGER, &is, &size) == 0);
    CHECK_EQUAL(is.l_onoff, 0);
    CHECK_EQUAL(hipc_close(copy), 0);
}

/* With an hour to linger and a far end that reads nothing, it returns all the same. */
static void test_close_does_not_wait(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), near = socket(AF_INET, SOCK_STREAM, 0), far;
    char data[65536];

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    CHECK(connect(near, (struct sockaddr *)&address, size) == 0);
    CHECK((far = accept(listener, NULL, NULL)) >= 0);
    memset(data, 'x', sizeof(data));
    while (send(near, data, sizeof(data), MSG_DONTWAIT) > 0)
        continue;
    linger(near, 3600);
    CHECK_EQUAL(hipc_close(near), 0);
    CHECK_EQUAL(hipc_close(far), 0);
    CHECK_EQUAL(hipc_close(listener), 0);
}

/* What is no socket is closed just so; what is not open is an error. */
static void test_close_of_other_descriptors(void)
{
    int file = new_file(), path = open("/", O_PATH | O_CLOEXEC);

    CHECK_EQUAL(hipc_close(file), 0);
    CHECK_EQUAL(hipc_close(path), 0);
    CHECK_EQUAL(hipc_close(file), -EBADF);
    CHECK_EQUAL(hipc_close(-1), -EBADF);
}

/* -- hipc_end -------------------------------------------------------------------------------- */

/* Two ends of a TCP connection over loopback; end[0] is the client's. */
static void make_tcp(int ends[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    CHECK((ends[0] = socket(AF_INET, SOCK_STREAM, 0)) >= 0);
    CHECK(connect(ends[0], (struct sockaddr *)&address, size) == 0);
    CHECK((ends[1] = accept(listener, NULL, NULL)) >= 0);
    CHECK(close(listener) == 0);
}

/* All of the data and the FIN go; what the other end has sent is gone, and so it goes on. */
static void test_end_of_a_connection(void)
{
    char got[16];
    int ends[2];

    make_tcp(ends);
    CHECK_EQUAL(send(ends[0], "request", 7, 0), 7);
    CHECK_EQUAL(hipc_end(ends[1], guarded_copy("answer", 6), 6), 6);
    CHECK_EQUAL(recv(ends[0], got, sizeof(got), 0), 6);
    CHECK(memcmp(got, "answer", 6) == 0);
    CHECK_EQUAL(recv(ends[0], got, sizeof(got), 0), 0);
    CHECK_EQUAL(recv(ends[1], got, sizeof(got), MSG_DONTWAIT), -1);
    CHECK_EQUAL(send(ends[0], "more", 4, 0), 4);
    CHECK_EQUAL(hipc_end(ends[1], guarded_copy("", 0), 0), 0);
    CHECK_EQUAL(recv(ends[1], got, sizeof(got), MSG_DONTWAIT), -1);
    CHECK(shutdown(ends[0], SHUT_WR) == 0);
    CHECK_EQUAL(hipc_end(ends[1], guarded_copy("", 0), 0), 1);
    close_pair(ends);
}

/* One byte more says that nothing is left to do: the other end had its FIN behind what it sent. */
static void test_end_after_the_other_end(void)
{
    static char much[65536 - 1];
    int pair[2];

    make_pair(pair);
    CHECK_EQUAL(send(pair[0], much, sizeof(much), 0), sizeof(much));
    CHECK(shutdown(pair[0], SHUT_WR) == 0);
    CHECK_EQUAL(hipc_end(pair[1], guarded_copy("answer", 6), 6), 7);
    close_pair(pair);
}

/* One that goes on sending is read from for 64 KiB, then others have their turn. */
static void test_end_reads_so_much_at_once(void)
{
    static char much[100000];
    int pair[2];

    make_pair(pair);
    CHECK_EQUAL(send(pair[0], much, sizeof(much), 0), sizeof(much));
    CHECK_EQUAL(hipc_end(pair[1], guarded_copy("", 0), 0), 0);
    CHECK_EQUAL(recv(pair[1], much, sizeof(much), MSG_DONTWAIT), 100000 - 65536);
    close_pair(pair);
}

/* A full socket takes a part, and has no FIN behind it; nothing waits, blocking or not. */
static void test_end_of_a_full_socket(void)
{
    static char much[1 << 20], got[1 << 16];
    int64_t written;
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    written = hipc_end(pair[1], much, sizeof(much));
    CHECK(written > 0 && written < (int64_t)sizeof(much));
    CHECK_EQUAL(hipc_end(pair[1], much, sizeof(much)), 0);
    for (int64_t left = written; left > 0;) {
        ssize_t received = recv(pair[0], got, sizeof(got), MSG_DONTWAIT);

        CHECK(received > 0);
        left -= received;
    }
    CHECK_EQUAL(recv(pair[0], got, sizeof(got), MSG_DONTWAIT), -1);
    CHECK_EQUAL(errno, EAGAIN);
    CHECK_EQUAL(hipc_end(pair[1], guarded_copy("rest", 4), 4), 4);
    CHECK_EQUAL(recv(pair[0], got, sizeof(got), MSG_DONTWAIT), 4);
    CHECK_EQUAL(recv(pair[0], got, sizeof(got), MSG_DONTWAIT), 0);
    close_pair(pair);
}

/* A client that has reset the connection: an error to who writes, the end to who does not. */
static void test_end_of_a_reset_connection(void)
{
    int ends[2];

    for (int writes = 0; writes < 2; writes++) {
        make_tcp(ends);
        linger(ends[0], 0);
        CHECK(close(ends[0]) == 0);
        if (writes)
            CHECK_EQUAL(hipc_end(ends[1], guarded_copy("answer", 6), 6), -ECONNRESET);
        CHECK_EQUAL(hipc_end(ends[1], guarded_copy("", 0), 0), 1);
        CHECK(close(ends[1]) == 0);
    }
}

static void test_end_of_no_connection(void)
{
    CHECK_EQUAL(hipc_end(-1, guarded_copy("answer", 6), 6), -EBADF);
    CHECK_EQUAL(hipc_end(-1, guarded_copy("", 0), 0), -EBADF);
}

/* -- interrupted system calls ---------------------------------------------------------------- */

/* A read that signals interrupt again and again goes on until it has its bytes. */
static void test_receive_when_interrupted(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();

    make_pair(pair);
    put_with_fds(pair[1], "here\n", &file, 1);
    usual_reader(&reader);
    interruptions = 20;
    CHECK_EQUAL(hipc_receive(pair[0], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(interruptions, 0);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.n_fds, 1);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* A write that signals interrupt again and again sends all bytes, and its descriptors once. */
static void test_send_when_interrupted(void)
{
    hipc_reader reader;
    int pair[2], file = new_file();
    int32_t fds[2] = {file, file};

    make_pair(pair);
    interruptions = 20;
    put_with_fds(pair[0], "here\n", fds, 2);
    CHECK_EQUAL(interruptions, 0);
    usual_reader(&reader);
    CHECK_EQUAL(hipc_receive(pair[1], &reader, ALL), HIPC_DRAINED);
    CHECK_EQUAL(reader.n_ends, 1);
    CHECK_EQUAL(reader.n_fds, 2);
    close_fds(&reader);
    close_pair(pair);
    CHECK(close(file) == 0);
}

/* -- hipc_accept ----------------------------------------------------------------------------- */

/* Errors that the next calls of accept4 fail with, each once; then the kernel is asked. */
static int planned_errors[16];
static int n_planned;
static int accept_calls;

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    accept_calls++;
    if (n_planned > 0) {
        errno = planned_errors[--n_planned];
        return -1;
    }
    return (int)syscall(SYS_accept4, fd, address, length, flags);
}

/* Where hipc_accept puts its results: arrays with not one element to spare. */
typedef struct accepted {
    int32_t *fds;
    char *addresses;
    int32_t *lengths;
} accepted;

static int accept_some(int listener, int max, accepted *out)
{
    out->fds = at_guard(FDS, (size_t)max * sizeof(int32_t));
    out->addresses = at_guard(DATA, (size_t)max * HIPC_ADDRESS_SIZE);
    out->lengths = at_guard(LENGTHS, (size_t)max * sizeof(int32_t));
    return hipc_accept(listener, max, out->fds, out->addresses, out->lengths);
}

/* Listen on a loopback port that the kernel picks; -1 if the family is not to be had. */
static int listen_inet(int family, struct sockaddr_storage *address, socklen_t *length)
{
    struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -1;
    memset(address, 0, sizeof(*address));
    *length = family == AF_INET ? sizeof(any4) : sizeof(any6);
    memcpy(address, family == AF_INET ? (void *)&any4 : (void *)&any6, *length);
    if (bind(fd, (struct sockaddr *)address, *length) < 0) {
        close(fd);
        return -1;
    }
    CHECK(listen(fd, 16) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)address, length) == 0);
    return fd;
}

/* Abstract, so that no file is left behind. */
static int listen_unix(struct sockaddr_un *address, socklen_t *length)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    CHECK(fd >= 0);
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    /* Bound to its family alone, a socket gets a free abstract name. */
    CHECK(bind(fd, (struct sockaddr *)address, sizeof(sa_family_t)) == 0);
    CHECK(listen(fd, 16) == 0);
    *length = sizeof(*address);
    CHECK(getsockname(fd, (struct sockaddr *)address, length) == 0);
    return fd;
}

static int connect_to(const void *address, socklen_t length)
{
    int fd = socket(((const struct sockaddr *)address)->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    CHECK(fd >= 0);
    CHECK(connect(fd, address, length) == 0);
    return fd;
}

/* All who wait are accepted, at most `max` in one call; then nobody waits. */
static void test_accept_in_batches(void)
{
    struct sockaddr_un address;
    socklen_t length;
    accepted out;
    int listener = listen_unix(&address, &length), clients[5];

    CHECK_EQUAL(accept_some(listener, 3, &out), -EAGAIN);
    for (int i = 0; i < 5; i++)
        clients[i] = connect_to(&address, length);
    CHECK_EQUAL(accept_some(listener, 0, &out), 0);
    for (int wanted = 3; wanted >= 2; wanted--) {
        CHECK_EQUAL(accept_some(listener, 3, &out), wanted);
        for (int i = 0; i < wanted; i++)
            CHECK(close(out.fds[i]) == 0);
    }
    CHECK_EQUAL(accept_some(listener, 3, &out), -EAGAIN);
    for (int i = 0; i < 5; i++)
        CHECK(close(clients[i]) == 0);
    CHECK(close(listener) == 0);
}

/* Each accepted socket comes with the address that its client has, for both IP families. */
static void test_accept_tells_addresses_of_ip(void)
{
    static const int families[] = {AF_INET, AF_INET6};

    for (int f = 0; f < 2; f++) {
        struct sockaddr_storage address, own;
        socklen_t length, own_length;
        accepted out;
        int listener = listen_inet(families[f], &address, &length), clients[3];

        if (listener < 0) {
            CHECK(families[f] == AF_INET6); /* a machine without IPv6 */
            continue;
        }
        for (int i = 0; i < 3; i++)
            clients[i] = connect_to(&address, length);
        CHECK_EQUAL(accept_some(listener, 3, &out), 3);
        for (int i = 0; i < 3; i++) {
            own_length = sizeof(own);
            CHECK(getsockname(clients[i], (struct sockaddr *)&own, &own_length) == 0);
            CHECK_EQUAL(out.lengths[i], own_length);
            CHECK(memcmp(out.addresses + i * HIPC_ADDRESS_SIZE, &own, own_length) == 0);
            CHECK(close(out.fds[i]) == 0);
            CHECK(close(clients[i]) == 0);
        }
        CHECK(close(listener) == 0);
    }
}

/* A client without a name has an address of its family alone; one with a name has the name. */
static void test_accept_tells_addresses_of_unix(void)
{
    struct sockaddr_un address, own = {.sun_family = AF_UNIX};
    socklen_t length, own_length = sizeof(own);
    accepted out;
    int listener = listen_unix(&address, &length);
    int nameless = connect_to(&address, length);
    int named = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    /* The longest name there is, so that the address is as large as a Unix one can be. */
    memset(own.sun_path + 1, 'n', sizeof(own.sun_path) - 1);
    snprintf(own.sun_path + 1, 20, "hipc-%d", (int)getpid());
    CHECK(bind(named, (struct sockaddr *)&own, own_length) == 0);
    CHECK(connect(named, (struct sockaddr *)&address, length) == 0);
    CHECK_EQUAL(accept_some(listener, 2, &out), 2);
    CHECK_EQUAL(out.lengths[0], sizeof(sa_family_t));
    CHECK_EQUAL(((struct sockaddr *)(void *)out.addresses)->sa_family, AF_UNIX);
    CHECK_EQUAL(out.lengths[1], own_length);
    CHECK(memcmp(out.addresses + HIPC_ADDRESS_SIZE, &own, own_length) == 0);
    CHECK(close(out.fds[0]) == 0 && close(out.fds[1]) == 0);
    CHECK(close(nameless) == 0 && close(named) == 0 && close(listener) == 0);
}

/* Accepted sockets are non-blocking and close-on-exec. */
static void test_accept_sets_flags(void)
{
    struct sockaddr_un address;
    socklen_t length;
    accepted out;
    int listener = listen_unix(&address, &length), client = connect_to(&address, length);

    CHECK_EQUAL(accept_some(listener, 1, &out), 1);
    CHECK_EQUAL(fcntl(out.fds[0], F_GETFD), FD_CLOEXEC);
    CHECK((fcntl(out.fds[0], F_GETFL) & O_NONBLOCK) != 0);
    CHECK(close(out.fds[0]) == 0 && close(client) == 0 && close(listener) == 0);
}

/* Without a free slot nothing is accepted; with one, that one is, and the rest waits. */
static void test_accept_with_few_slots_free(void)
{
    struct sockaddr_un address;
    socklen_t length;
    accepted out;
    int listener = listen_unix(&address, &length);
    int clients[2] = {connect_to(&address, length), connect_to(&address, length)};

    leave_slots(0);
    CHECK_EQUAL(accept_some(listener, 2, &out), -EMFILE);
    usual_slots();
    leave_slots(1);
    CHECK_EQUAL(accept_some(listener, 2, &out), 1);
    usual_slots();
    CHECK(close(out.fds[0]) == 0);
    CHECK_EQUAL(accept_some(listener, 2, &out), 1);
    CHECK(close(out.fds[0]) == 0);
    close_pair(clients);
    CHECK(close(listener) == 0);
}

/* A connection that ended while it waited is skipped, and those behind it are accepted. */
static void test_accept_skips_ended_connections(void)
{
    static const int errors[] = {EINTR,        ECONNABORTED, EPROTO,      ENETDOWN, ENOPROTOOPT,
                                 EHOSTDOWN,    EHOSTUNREACH, ENETUNREACH, EPERM};
    struct sockaddr_un address;
    socklen_t length;
    accepted out;
    int listener = listen_unix(&address, &length);
    int clients[2] = {connect_to(&address, length), connect_to(&address, length)};

    memcpy(planned_errors, errors, sizeof(errors));
    n_planned = sizeof(errors) / sizeof(errors[0]);
    CHECK_EQUAL(accept_some(listener, 16, &out), 2);
    CHECK_EQUAL(n_planned, 0);
    CHECK(close(out.fds[0]) == 0 && close(out.fds[1]) == 0);
    close_pair(clients);
    CHECK(close(listener) == 0);
}

/* A listener that only ever fails does not hold the caller. */
static void test_accept_gives_up_after_many_failures(void)
{
    struct sockaddr_un address;
    socklen_t length;
    accepted out;
    int listener = listen_unix(&address, &length);

    for (int i = 0; i < 8; i++)
        planned_errors[i] = ECONNABORTED;
    n_planned = 8;
    accept_calls = 0;
    CHECK_EQUAL(accept_some(listener, 3, &out), -ECONNABORTED);
    CHECK_EQUAL(accept_calls, 4);
    n_planned = 0;
    CHECK(close(listener) == 0);
}

/* What does not listen is refused. */
static void test_accept_on_other_descriptors(void)
{
    accepted out;
    int pair[2], file = new_file();

    make_pair(pair);
    CHECK_EQUAL(accept_some(pair[0], 1, &out), -EINVAL);
    CHECK_EQUAL(accept_some(file, 1, &out), -ENOTSOCK);
    CHECK(close(file) == 0);
    CHECK_EQUAL(accept_some(file, 1, &out), -EBADF);
    close_pair(pair);
}

/* -- hipc_kind ------------------------------------------------------------------------------- */

/* Sockets are told apart by domain, type and whether they listen. */
static void test_kind_of_sockets(void)
{
    static const int cases[][2] = {
        {AF_INET, SOCK_STREAM}, {AF_INET, SOCK_DGRAM},  {AF_INET6, SOCK_STREAM},
        {AF_INET6, SOCK_DGRAM}, {AF_UNIX, SOCK_STREAM}, {AF_UNIX, SOCK_DGRAM},
        {AF_UNIX, SOCK_SEQPACKET},
    };
    struct sockaddr_storage address;
    struct sockaddr_un path;
    socklen_t length;
    int fd;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fd = socket(cases[i][0], cases[i][1], 0);
        if (fd < 0 && cases[i][0] == AF_INET6)
            continue;
        CHECK_EQUAL(hipc_kind(fd), HIPC_KIND_SOCKET | cases[i][0] << 8 | cases[i][1]);
        CHECK(close(fd) == 0);
    }
    fd = listen_inet(AF_INET, &address, &length);
    CHECK_EQUAL(hipc_kind(fd),
                HIPC_KIND_SOCKET | HIPC_KIND_LISTENING | AF_INET << 8 | SOCK_STREAM);
    CHECK(close(fd) == 0);
    fd = listen_unix(&path, &length);
    CHECK_EQUAL(hipc_kind(fd),
                HIPC_KIND_SOCKET | HIPC_KIND_LISTENING | AF_UNIX << 8 | SOCK_STREAM);
    CHECK(close(fd) == 0);
}

/* A pipe is a FIFO; files, directories and epoll are others; a closed number is an error. */
static void test_kind_of_other_descriptors(void)
{
    int pipe_ends[2], fd;

    CHECK(pipe(pipe_ends) == 0);
    CHECK_EQUAL(hipc_kind(pipe_ends[0]), HIPC_KIND_FIFO);
    CHECK_EQUAL(hipc_kind(pipe_ends[1]), HIPC_KIND_FIFO);
    close_pair(pipe_ends);
    CHECK_EQUAL(hipc_kind(pipe_ends[0]), -EBADF);
    CHECK_EQUAL(hipc_kind(-1), -EBADF);
    fd = new_file();
    CHECK_EQUAL(hipc_kind(fd), HIPC_KIND_OTHER);
    CHECK(close(fd) == 0);
    fd = epoll_create1(EPOLL_CLOEXEC);
    CHECK_EQUAL(hipc_kind(fd), HIPC_KIND_OTHER);
    CHECK(close(fd) == 0);
    fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK_EQUAL(hipc_kind(fd), HIPC_KIND_OTHER);
    CHECK(close(fd) == 0);
}

/* A descriptor that only names a file (O_PATH) can be sent, so it is open and has a kind. */
static void test_kind_of_path_descriptor(void)
{
    int fd = open("/", O_PATH | O_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQUAL(hipc_kind(fd), HIPC_KIND_OTHER);
    CHECK(close(fd) == 0);
}

/* -- hipc_exit_with_parent ------------------------------------------------------------------- */

/* A process whose parent ends gets the signal: it would otherwise wait for ever. */
static void test_exit_with_parent(void)
{
    int ends[2], status;
    char byte;
    pid_t parent;

    CHECK(pipe(ends) == 0);
    parent = fork();
    CHECK(parent >= 0);
    if (parent == 0) {
        pid_t self = getpid();

        if (fork() == 0) {
            CHECK_EQUAL(hipc_exit_with_parent(SIGKILL, self), 0);
            CHECK(write(ends[1], "r", 1) == 1);
            for (;;)
                pause();
        }
        /* Ends only once the other is ready, which keeps the writing end until it is killed. */
        CHECK(read(ends[0], &byte, 1) == 1);
        _exit(0);
    }
    CHECK(close(ends[1]) == 0);
    CHECK(waitpid(parent, &status, 0) == parent);
    CHECK_EQUAL(status, 0);
    CHECK_EQUAL(read(ends[0], &byte, 1), 0);
    CHECK(close(ends[0]) == 0);
}

/* A parent that is not the parent any more, or a signal that does not exist, is an error. */
static void test_exit_with_parent_that_has_ended(void)
{
    int status;
    pid_t other = fork();

    CHECK(other >= 0);
    if (other == 0) {
        CHECK_EQUAL(hipc_exit_with_parent(1000, getppid()), -EINVAL);
        CHECK_EQUAL(hipc_exit_with_parent(SIGTERM, getpid()), -ESRCH);
        CHECK_EQUAL(hipc_exit_with_parent(0, getppid()), 0);
        _exit(0);
    }
    CHECK(waitpid(other, &status, 0) == other);
    CHECK_EQUAL(status, 0);
}

/* -- hipc_signals_inherited, hipc_reset_signals ------------------------------------------------ */

/* What an exec would hand on is seen, signal by signal, and gone after the reset. */
static void test_signals(void)
{
    static const int numbers[] = {SIGHUP, SIGINT, SIGTERM, SIGCHLD, SIGUSR1, SIGSEGV};
    int status;
    pid_t other = fork();

    CHECK(other >= 0);
    if (other == 0) {
        sigset_t set;

        hipc_reset_signals();
        CHECK_EQUAL(hipc_signals_inherited(), 0);
        CHECK(signal(SIGPIPE, SIG_IGN) == SIG_DFL);
        CHECK_EQUAL(hipc_signals_inherited(), 0);
        for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
            CHECK(signal(numbers[i], SIG_IGN) == SIG_DFL);
            CHECK_EQUAL(hipc_signals_inherited(), 1);
            CHECK(signal(numbers[i], SIG_DFL) == SIG_IGN);
            CHECK_EQUAL(hipc_signals_inherited(), 0);
            sigemptyset(&set);
            sigaddset(&set, numbers[i]);
            CHECK(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
            CHECK(signal(numbers[i], SIG_IGN) == SIG_DFL);
            CHECK_EQUAL(hipc_signals_inherited(), 1);
            hipc_reset_signals();
            CHECK_EQUAL(hipc_signals_inherited(), 0);
        }
        _exit(0);
    }
    CHECK(waitpid(other, &status, 0) == other);
    CHECK_EQUAL(status, 0);
}

/* -- hipc_shape ------------------------------------------------------------------------------ */

#define MANY 1000000

static int shape(const char *text, int depth, int64_t values)
{
    return hipc_shape(guarded_copy(text, strlen(text)), strlen(text), depth, values);
}

static void test_shape_of_nested_text(void)
{
    CHECK_EQUAL(shape("", 0, 0), 0);
    CHECK_EQUAL(shape("1", 0, 0), 0);
    CHECK_EQUAL(shape("[]", 0, MANY), HIPC_TOO_DEEP);
    CHECK_EQUAL(shape("[]", 1, MANY), 1);
    CHECK_EQUAL(shape("[{}]", 1, MANY), HIPC_TOO_DEEP);
    CHECK_EQUAL(shape("[{},{},[]]", 2, MANY), 2);
    CHECK_EQUAL(shape("[[[]],[]]", 9, MANY), 3);
    CHECK_EQUAL(shape("{\"a\":[{\"b\":[]}]}", 3, MANY), HIPC_TOO_DEEP);
    CHECK_EQUAL(shape("{\"a\":[{\"b\":[]}]}", 4, MANY), 4);
}

/* The least bound that a text is within. */
static int64_t values_of(const char *text)
{
    int64_t values = 0;

    while (shape(text, 128, values) == HIPC_TOO_MANY)
        values++;
    return values;
}

static void test_shape_counts_values(void)
{
    CHECK_EQUAL(values_of("1"), 0);
    CHECK_EQUAL(values_of("[]"), 1);
    CHECK_EQUAL(values_of("[1,2,3]"), 3);
    CHECK_EQUAL(values_of("{\"a\":1,\"b\":{}}"), 3);
    CHECK_EQUAL(values_of("[\",[{\",\"\\\",[\",true,false,null]"), 5);
    CHECK_EQUAL(values_of("[{},[],{}]"), 6);
}

/* A number that takes a reader long counts for several, wherever it stands. */
static void test_shape_counts_numbers_by_their_cost(void)
{
    char text[1024];

    CHECK_EQUAL(values_of("1e99"), 0);
    CHECK_EQUAL(values_of("1e100"), 64);
    CHECK_EQUAL(values_of("[1E+300,true,-1.5e-300]"), 3 + 2 * 64);
    CHECK_EQUAL(values_of("{\"1e300\":1e30,\"x\":false}"), 2);
    CHECK_EQUAL(values_of("1e"), 0);
    CHECK_EQUAL(values_of("1e-"), 0);
    CHECK_EQUAL(values_of("1e-30"), 0);
    CHECK_EQUAL(values_of("e100"), 0);
    memset(text, '7', sizeof(text));
    for (int digits = 1; digits < 200; digits++) {
        text[digits] = '\0';
        CHECK_EQUAL(values_of(text), (digits / 64) * (digits / 64));
        text[digits] = ',';
        text[digits + 1] = '\0';
        CHECK_EQUAL(values_of(text), (digits / 64) * (digits / 64) + 1);
        text[digits] = text[digits + 1] = '7';
    }
    text[0] = '"';
    text[999] = '"';
    text[1000] = '\0';
    CHECK_EQUAL(values_of(text), 0);
    text[1000] = '7';
    text[1001] = '\0';
    CHECK_EQUAL(values_of(text), 0);
}

static void test_shape_of_brackets_in_strings(void)
{
    CHECK_EQUAL(shape("\"[[[[\"", 0, 0), 0);
    CHECK_EQUAL(shape("[\"\\\"[[\",\"{\"]", 1, 2), 1);
    CHECK_EQUAL(shape("[\"\\\\\",[]]", 1, MANY), HIPC_TOO_DEEP);
    CHECK_EQUAL(shape("{\"[\":\"]\",\"}\":[1]}", 1, MANY), HIPC_TOO_DEEP);
}

/* Strings of every length around the one from which they are searched otherwise, with an escaped
 * quote at every place. */
static void test_shape_of_strings_of_every_length(void)
{
    char text[128];

    for (int length = 0; length < 80; length++) {
        for (int escape = -1; escape < length - 1; escape++) {
            memset(text, '[', sizeof(text));
            text[0] = '"';
            if (escape >= 0)
                memcpy(text + 1 + escape, "\\\"", 2);
            memcpy(text + 1 + length, "\"{}", 4);
            CHECK_EQUAL(shape(text, 0, MANY), HIPC_TOO_DEEP);
            CHECK_EQUAL(shape(text, 1, 1), 1);
            CHECK_EQUAL(shape(text, 1, 0), HIPC_TOO_MANY);
            for (int cut = 0; cut <= length; cut++)
                CHECK_EQUAL(hipc_shape(guarded_copy(text, cut), cut, 0, 0), 0);
        }
    }
}

/* A text that ends in the middle of a string or an escape: nothing beyond it is read. */
static void test_shape_of_what_is_no_json(void)
{
    CHECK_EQUAL(shape("\"", 0, 0), 0);
    CHECK_EQUAL(shape("\"abc", 0, 0), 0);
    CHECK_EQUAL(shape("\"abc\\", 0, 0), 0);
    CHECK_EQUAL(shape("]]]][", 0, 1), 0);
    CHECK_EQUAL(shape("[[[[", 3, MANY), HIPC_TOO_DEEP);
    CHECK_EQUAL(shape(",,,,", 0, 3), HIPC_TOO_MANY);
}

/* -- all of them ----------------------------------------------------------------------------- */

#define TEST(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    TEST(test_feed_of_every_split),
    TEST(test_feed_of_single_bytes),
    TEST(test_feed_of_line_longer_than_every_small_buffer),
    TEST(test_feed_with_newline_at_the_last_byte),
    TEST(test_feed_of_empty_lines),
    TEST(test_feed_resumed_after_ends_were_full),
    TEST(test_scan_of_bytes_searched_before),
    TEST(test_compact_at_every_offset),
    TEST(test_receive_of_every_split),
    TEST(test_receive_until_drained),
    TEST(test_receive_with_budget),
    TEST(test_receive_into_full_buffer),
    TEST(test_receive_into_full_buffer_with_complete_line),
    TEST(test_receive_after_ends_were_full),
    TEST(test_receive_at_eof),
    TEST(test_receive_when_the_first_read_fails),
    TEST(test_receive_when_a_later_read_fails),
    TEST(test_receive_when_a_read_fails_behind_buffered_lines),
    TEST(test_receive_of_every_number_of_fds),
    TEST(test_receive_of_most_fds_into_smallest_report),
    TEST(test_receive_of_several_sets),
    TEST(test_receive_when_sets_are_full),
    TEST(test_receive_when_fds_are_nearly_full),
    TEST(test_receive_of_fds_in_short_reads),
    TEST(test_receive_of_remainder_with_the_next_set),
    TEST(test_receive_of_fds_with_some_slots_free),
    TEST(test_receive_of_fds_with_no_slot_free),
    TEST(test_receive_prepares_fds),
    TEST(test_receive_of_other_control_messages),
    TEST(test_receive_of_control_that_was_cut_off),
    TEST(test_receive_of_one_more_than_linux_sends),
    TEST(test_receive_of_impossible_lengths),
    TEST(test_receive_of_several_control_messages),
    TEST(test_send_of_large_data_with_fds),
    TEST(test_send_in_part_with_fds),
    TEST(test_send_to_full_socket),
    TEST(test_send_to_closed_peer),
    TEST(test_send_of_impossible_numbers),
    TEST(test_send_of_no_bytes),
    TEST(test_send_from_offset),
    TEST(test_send_of_parts),
    TEST(test_send_of_large_parts),
    TEST(test_send_of_closed_fd),
    TEST(test_socket_made_blocking_by_a_copy),
    TEST(test_close_clears_linger),
    TEST(test_close_does_not_wait),
    TEST(test_close_of_other_descriptors),
    TEST(test_end_of_a_connection),
    TEST(test_end_after_the_other_end),
    TEST(test_end_reads_so_much_at_once),
    TEST(test_end_of_a_full_socket),
    TEST(test_end_of_a_reset_connection),
    TEST(test_end_of_no_connection),
    TEST(test_receive_when_interrupted),
    TEST(test_send_when_interrupted),
    TEST(test_accept_in_batches),
    TEST(test_accept_tells_addresses_of_ip),
    TEST(test_accept_tells_addresses_of_unix),
    TEST(test_accept_sets_flags),
    TEST(test_accept_with_few_slots_free),
    TEST(test_accept_skips_ended_connections),
    TEST(test_accept_gives_up_after_many_failures),
    TEST(test_accept_on_other_descriptors),
    TEST(test_kind_of_sockets),
    TEST(test_kind_of_other_descriptors),
    TEST(test_kind_of_path_descriptor),
    TEST(test_shape_of_nested_text),
    TEST(test_shape_counts_values),
    TEST(test_shape_counts_numbers_by_their_cost),
    TEST(test_shape_of_brackets_in_strings),
    TEST(test_shape_of_strings_of_every_length),
    TEST(test_shape_of_what_is_no_json),
    TEST(test_exit_with_parent),
    TEST(test_exit_with_parent_that_has_ended),
    TEST(test_signals),
};

/* Runs the test that the argument names, or all of them. */
int main(int argc, char **argv)
{
    size_t count = 0;

    map_regions();
    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        int before = count_descriptors();

        if (argc > 1 && strcmp(argv[1], tests[i].name) != 0)
            continue;
        current_test = tests[i].name;
        tests[i].run();
        CHECK_EQUAL(count_descriptors(), before);
        count++;
    }
    printf("%zu passed\n", count);
    return count > 0 ? 0 : 1;
}
