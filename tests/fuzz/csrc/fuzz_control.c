/*
 * libFuzzer target: control messages of a kernel that the input plays, in place of recvmsg.
 *
 * It delivers what Linux does, what BSD kernels do (a message that was cut off keeps its length,
 * one descriptor more than 253, several messages) and what no kernel does (lengths out of the
 * air). Whatever it is: no descriptor may be taken that the kernel did not deliver.
 */
#include "fuzz.h"

#include <sys/socket.h>

/* Descriptor numbers of the played kernel: none of them is open. */
#define FIRST 100000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
ssize_t __wrap_recvmsg(int fd, struct msghdr *header, int flags);

static input in;
/* Whether the kernel has said what no kernel says, and whether it has cut a message off. */
static int lied, cut;

/* Write one control message into the room that is left. Returns the bytes it takes there. */
static size_t deliver(char *at, size_t room)
{
    struct cmsghdr message;
    unsigned what = take(&in);
    size_t ints = what & 1 ? take(&in) : take(&in) % 5, fits;

    if (room < CMSG_LEN(0))
        return room;
    memset(&message, 0, sizeof(message));
    message.cmsg_level = what & 2 && what & 4 ? 0 : SOL_SOCKET;
    message.cmsg_type = what & 2 && what & 8 ? SCM_CREDENTIALS : SCM_RIGHTS;
    message.cmsg_len = CMSG_LEN(ints * sizeof(int));
    fits = (room - CMSG_LEN(0)) / sizeof(int);
    if (ints < fits)
        fits = ints;
    if ((what & 0xf0) == 0xf0) {
        lied = 1;
        message.cmsg_len = (size_t)take(&in) * (take(&in) & 1 ? SIZE_MAX / 255 : 1);
    }
    memcpy(at, &message, sizeof(message));
    for (size_t i = 0; i < fits; i++) {
        int fd = FIRST + (int)i;

        memcpy(at + CMSG_LEN(0) + i * sizeof(int), &fd, sizeof(fd));
    }
    if ((what & 0x30) == 0x10) { /* within a descriptor, perhaps */
        cut = 1;
        return CMSG_LEN(fits * sizeof(int)) - (fits > 0 ? take(&in) % sizeof(int) : 0);
    }
    return CMSG_SPACE(fits * sizeof(int)) < room ? CMSG_SPACE(fits * sizeof(int)) : room;
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *header, int flags)
{
    size_t size = header->msg_iov->iov_len, used = 0;
    unsigned messages = take(&in) % 4, more = take(&in);

    (void)fd;
    (void)flags;
    if (in.left == 0) {
        header->msg_controllen = 0;
        return 0;
    }
    if (more == 255) {
        errno = take(&in) & 1 ? ENOMEM : EINTR;
        return -1;
    }
    /* What was not delivered must not be taken for a descriptor. */
    memset(header->msg_control, 0xff, header->msg_controllen);
    cut = 0;
    for (unsigned i = 0; i < messages && used < header->msg_controllen && !cut; i++)
        used += deliver((char *)header->msg_control + used, header->msg_controllen - used);
    header->msg_flags = more & 1 ? MSG_CTRUNC : 0;
    header->msg_controllen = used;
    size = 1 + more % size;
    memset(header->msg_iov->iov_base, 'x', size);
    if (more & 2)
        ((char *)header->msg_iov->iov_base)[size - 1] = '\n';
    return (ssize_t)size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    hipc_reader reader;
    uint64_t sum = 0;
    int outcome;

    in = (input){data, size};
    lied = 0;
    new_reader(&reader, 16 + take(&in), 1 + (int)(take(&in) % 8), 1 + (int)(take(&in) % 4),
               HIPC_READ_FDS + (int)take(&in) * 2);
    do {
        outcome = hipc_receive(-1, &reader, 1 + take(&in));
        check_sets(&reader);
        for (int i = 0; i < reader.n_fds; i++)
            CHECK(lied || (reader.fds[i] >= FIRST && reader.fds[i] < FIRST + 256));
        reader.n_fds = reader.n_sets = 0;
        take_lines(&reader, &sum);
        if (outcome == HIPC_FULL)
            grow(&reader);
        CHECK(outcome >= 0 || outcome == -ENOMEM);
    } while (outcome != HIPC_EOF && reader.capacity < 1 << 16);
    free_reader(&reader);
    return 0;
}
