/*
 * The system calls: bytes with descriptors out, bytes with descriptors in, connections accepted.
 *
 * Decides nothing about them: which descriptors belong to which line, and what to do about lost
 * ones, is said in Python (handleipc/protocol). Kernel facts are noted where they bite.
 */
#include "hipc.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* macOS has neither flag; there close-on-exec is set after the fact and SO_NOSIGPIPE is the
 * caller's to set. */
#ifndef MSG_CMSG_CLOEXEC
#define MSG_CMSG_CLOEXEC 0
#define HIPC_SET_CLOEXEC 1
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif
#ifndef MSG_MORE
#define MSG_MORE 0
#endif

/* MSG_DONTWAIT on every read and write of ours: O_NONBLOCK belongs to the open file description,
 * and whoever else holds a copy of this end may clear it. */

/* One read asks for this much at most: more does not come from a socket buffer of usual size. */
#define READ_SIZE ((size_t)1 << 20)

/* Room for the most descriptors the kernel delivers. A union, since a bare char array need not be
 * aligned for a cmsghdr. CMSG_SPACE and not CMSG_LEN: the padding must be inside, or a kernel that
 * fills it truncates. */
typedef union control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int) * HIPC_MAX_FDS)];
} control;

/* A BSD sender may fill the padding with a descriptor more. */
_Static_assert(sizeof(control) - CMSG_LEN(0) <= sizeof(int) * HIPC_READ_FDS, "HIPC_READ_FDS");
_Static_assert(sizeof(int) == sizeof(int32_t), "descriptors are reported as int32");
_Static_assert(sizeof(struct sockaddr_storage) == HIPC_ADDRESS_SIZE, "address size");

int32_t hipc_kind(int fd)
{
    int domain = 0, type = 0, listening = 0;
    socklen_t size = sizeof(int);
    struct stat status;

#ifdef SO_DOMAIN
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0) {
#else
    struct sockaddr_storage address;
    socklen_t length = sizeof(address);

    if (getsockname(fd, (struct sockaddr *)&address, &length) == 0) {
        domain = address.ss_family;
#endif
        size = sizeof(int);
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0)
            return -errno;
        size = sizeof(int);
        /* BSD knows no SO_ACCEPTCONN on some families: then it is not a listener. */
        if (type == SOCK_STREAM)
            (void)getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size);
        return HIPC_KIND_SOCKET | (domain & 0xff) << 8 | (type & 0xff) |
               (listening ? HIPC_KIND_LISTENING : 0);
    }
    if (errno != ENOTSOCK && errno != EBADF)
        return -errno; /* a socket of which the system will not tell */
    /* EBADF is what an open O_PATH descriptor answers too: fstat knows. */
    if (fstat(fd, &status) < 0)
        return -errno;
    if (S_ISSOCK(status.st_mode))
        return -EBADF; /* by its path, or not told again */
    return S_ISFIFO(status.st_mode) ? HIPC_KIND_FIFO : HIPC_KIND_OTHER;
}

int32_t hipc_adopt(int fd)
{
    int32_t kind = hipc_kind(fd);
    int on = 1;

    if (kind > 0 && (kind & HIPC_KIND_SOCKET))
        (void)ioctl(fd, FIONBIO, &on);
    return kind;
}

int hipc_close(int fd)
{
    const struct linger none = {0, 0};

    /* No socket, or a kind that does not linger: nothing to clear. */
    (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
    /* After EINTR the descriptor is gone, and its number perhaps somebody else's (close(2)). */
    return close(fd) == 0 || errno == EINTR ? 0 : -errno;
}

/* Read and drop what has come. Returns 1 at the other end's FIN or if it is gone, else 0. */
static int drop_received(int fd)
{
    char dropped[16384];

    for (size_t budget = 65536; budget > 0;) {
        ssize_t received = recv(fd, dropped, sizeof(dropped), MSG_DONTWAIT);

        if (received < 0 && errno == EINTR)
            continue;
        if (received <= 0)
            return received == 0 || (errno != EAGAIN && errno != EWOULDBLOCK);
        budget -= (size_t)received < budget ? (size_t)received : budget;
    }
    return 0;
}

int64_t hipc_end(int fd, const char *data, size_t length)
{
    size_t written = 0;

    while (written < length) {
        ssize_t sent = send(fd, data + written, length - written,
                            MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK ? (int64_t)written : -errno;
        written += (size_t)sent;
    }
    if (shutdown(fd, SHUT_WR) < 0)
        /* One that was reset meanwhile has no use for a FIN (ENOTCONN). */
        return errno == EBADF ? -EBADF : (int64_t)length + 1;
    return (int64_t)length + drop_received(fd);
}

/* Take the descriptors in these bytes of a control message and report them. */
static int32_t take_fds(hipc_reader *reader, const char *data, size_t bytes)
{
    int32_t count = (int32_t)(bytes / sizeof(int));

    /* memcpy and not a cast: the data of a control message is not aligned for int everywhere. */
    memcpy(reader->fds + reader->n_fds, data, (size_t)count * sizeof(int));
#ifdef HIPC_SET_CLOEXEC
    for (int32_t i = 0; i < count; i++)
        (void)fcntl(reader->fds[reader->n_fds + i], F_SETFD, FD_CLOEXEC);
#endif
    reader->n_fds += count;
    return count;
}

/*
 * Walk `length` bytes of control messages and take all descriptors. Kinds we never asked for are
 * skipped, and a second SCM_RIGHTS (Linux joins them, others need not) must not be leaked.
 *
 * By hand and not with CMSG_NXTHDR: a message that was cut off may give the length it had before
 * (macOS), and what lies behind `length` is not ours to read.
 */
static int32_t take_control(hipc_reader *reader, const char *bytes, size_t length)
{
    int32_t count = 0;

    while (length >= CMSG_LEN(0)) {
        struct cmsghdr header;
        size_t size, step;

        memcpy(&header, bytes, sizeof(header));
        size = header.cmsg_len < length ? header.cmsg_len : length;
        if (size < CMSG_LEN(0))
            break;
        if (header.cmsg_level == SOL_SOCKET && header.cmsg_type == SCM_RIGHTS)
            count += take_fds(reader, bytes + CMSG_LEN(0), size - CMSG_LEN(0));
        step = CMSG_SPACE(size - CMSG_LEN(0));
        if (step >= length)
            break;
        bytes += step;
        length -= step;
    }
    return count;
}

/* Record the descriptors and the loss, if any, of one read that put bytes [start, filled). */
static void report_set(hipc_reader *reader, const control *room, const struct msghdr *header,
                       size_t start)
{
    int32_t *set = reader->sets + (size_t)reader->n_sets * HIPC_SET_FIELDS;
    size_t length = header->msg_controllen;
    int truncated = (header->msg_flags & MSG_CTRUNC) != 0;
    int32_t count =
        take_control(reader, room->bytes, length < sizeof(*room) ? length : sizeof(*room));

    /* With no free descriptor slot the kernel delivers the bytes, no control message at all, and
     * only this flag: a set of zero descriptors keeps the loss in its place. */
    if (count == 0 && !truncated)
        return;
    set[0] = (int32_t)start;
    set[1] = (int32_t)reader->filled;
    set[2] = count;
    set[3] = truncated;
    reader->n_sets++;
}

/* One recvmsg into the free part of the buffer: bytes read, 0 at EOF, -errno. */
static ssize_t receive_once(int fd, hipc_reader *reader, size_t limit)
{
    control room;
    size_t free_bytes = reader->capacity - reader->filled;
    struct iovec part = {reader->data + reader->filled, free_bytes < limit ? free_bytes : limit};
    struct msghdr header;
    size_t start = reader->filled;
    ssize_t got;

    do {
        memset(&header, 0, sizeof(header));
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        header.msg_control = &room;
        header.msg_controllen = sizeof(room);
        got = recvmsg(fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return -errno;
    reader->filled += (size_t)got;
    report_set(reader, &room, &header, start);
    return got;
}

int hipc_receive(int fd, hipc_reader *reader, size_t budget)
{
    size_t received = 0;

    reader->error = 0;
    hipc_compact(reader);
    hipc_scan(reader);
    for (;;) {
        ssize_t got;

        /* A full report alone is no reason to stop: what the socket holds besides may be nothing,
         * and to learn that in a turn of its own costs as much as the turn that read the lines. */
        if (received >= budget || reader->scanned < reader->filled ||
            reader->n_sets == reader->max_sets || reader->max_fds - reader->n_fds < HIPC_READ_FDS)
            return HIPC_MORE;
        if (reader->filled == reader->capacity)
            return reader->n_ends > 0 ? HIPC_MORE : HIPC_FULL;
        got = receive_once(fd, reader, READ_SIZE);
        if (got == 0)
            return HIPC_EOF;
        if (got == -EAGAIN || got == -EWOULDBLOCK)
            return HIPC_DRAINED;
        if (got < 0) {
            if (received == 0 && reader->n_ends == 0)
                return (int)got;
            reader->error = (int32_t)-got;
            return HIPC_MORE;
        }
        received += (size_t)got;
        hipc_scan(reader);
    }
}

/* One sendmsg of these parts with the descriptors: bytes written or -errno. */
static ssize_t send_once(int fd, struct iovec *parts, size_t n_parts, const int32_t *fds,
                         int32_t n_fds)
{
    control room;
    struct msghdr header;
    ssize_t sent;

    memset(&header, 0, sizeof(header));
    header.msg_iov = parts;
    header.msg_iovlen = n_parts;
    if (n_fds > 0) {
        size_t bytes = (size_t)n_fds * sizeof(int);

        header.msg_control = &room;
        header.msg_controllen = CMSG_SPACE(bytes);
        memset(&room, 0, CMSG_SPACE(bytes));
        room.align.cmsg_level = SOL_SOCKET;
        room.align.cmsg_type = SCM_RIGHTS;
        room.align.cmsg_len = CMSG_LEN(bytes);
        memcpy(CMSG_DATA(&room.align), fds, bytes);
    }
    do {
        sent = sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

/* Drop the first `count` bytes of the parts. Returns how many bytes are left in them. */
static size_t skip(struct iovec *parts, size_t n_parts, size_t count)
{
    size_t left = 0;

    for (size_t i = 0; i < n_parts; i++) {
        size_t gone = count < parts[i].iov_len ? count : parts[i].iov_len;

        parts[i].iov_base = (char *)parts[i].iov_base + gone;
        parts[i].iov_len -= gone;
        count -= gone;
        left += parts[i].iov_len;
    }
    return left;
}

/* Write the parts from `offset` on, until all is written or the kernel takes no more. */
static int64_t send_all(int fd, struct iovec *parts, size_t n_parts, size_t offset,
                        const int32_t *fds, int32_t n_fds)
{
    int64_t written = 0;
    size_t left = skip(parts, n_parts, offset);

    if (n_fds < 0 || n_fds > HIPC_MAX_FDS)
        return -EINVAL;
    /* Linux drops the descriptors of an empty stream write without a word. */
    if (left == 0)
        return n_fds > 0 ? -EINVAL : 0;
    if (offset > 0)
        n_fds = 0;
    while (left > 0) {
        ssize_t sent = send_once(fd, parts, n_parts, fds, n_fds);

        if (sent < 0)
            return written > 0 ? written : sent; /* the next call meets the same error */
        /* All descriptors leave with the first byte, however short the write was. */
        n_fds = 0;
        written += sent;
        left = skip(parts, n_parts, (size_t)sent);
    }
    return written;
}

/* sendmsg reads what it is given, though iovec cannot say so. */
static struct iovec part_of(const char *data, size_t length)
{
    struct iovec part = {(char *)(uintptr_t)data, length};

    return part;
}

int64_t hipc_send(int fd, const char *data, size_t offset, size_t length,
                  const int32_t *fds, int32_t n_fds)
{
    struct iovec part = part_of(data, length);

    return send_all(fd, &part, 1, offset, fds, n_fds);
}

int64_t hipc_send_parts(int fd, const char *head, size_t head_length, const char *body,
                        size_t body_length, const char *tail, size_t tail_length, size_t offset,
                        const int32_t *fds, int32_t n_fds)
{
    struct iovec parts[3] = {part_of(head, head_length), part_of(body, body_length),
                             part_of(tail, tail_length)};

    return send_all(fd, parts, 3, offset, fds, n_fds);
}

/* Errors of accept that belong to the one connection, not to the listener (accept(2)). */
static int is_of_the_connection(int error)
{
    return error == EINTR || error == ECONNABORTED || error == EPROTO || error == ENETDOWN ||
           error == ENOPROTOOPT || error == EHOSTDOWN || error == EHOSTUNREACH ||
           error == ENETUNREACH || error == EPERM;
}

static int accept_one(int fd, struct sockaddr *address, socklen_t *length)
{
#if defined(__linux__) || defined(__FreeBSD__)
    return accept4(fd, address, length, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
    int on = 1;
    int connection = accept(fd, address, length);

    if (connection >= 0) {
        (void)fcntl(connection, F_SETFD, FD_CLOEXEC);
        (void)ioctl(connection, FIONBIO, &on);
    }
    return connection;
#endif
}

int hipc_accept(int fd, int32_t max, int32_t *fds, char *addresses, int32_t *lengths)
{
    int32_t count = 0;
    int failures = 0;

    while (count < max) {
        struct sockaddr_storage address;
        socklen_t length = sizeof(address);
        int connection = accept_one(fd, (struct sockaddr *)&address, &length);

        if (connection < 0) {
            int error = errno;

            /* Bounded, so that a listener which only ever fails cannot hold the event loop. */
            if (is_of_the_connection(error) && ++failures <= max)
                continue;
            return count > 0 ? count : -error;
        }
        if (length > sizeof(address))
            length = sizeof(address);
        fds[count] = connection;
        memcpy(addresses + (size_t)count * HIPC_ADDRESS_SIZE, &address, length);
        lengths[count] = (int32_t)length;
        count++;
    }
    return count;
}
