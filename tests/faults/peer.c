/*
 * A child that starts in a millisecond: echoes messages, answers "hi" on every connection it is
 * handed, and exits with 7 at EOF. Speaks native if its first argument says so, node otherwise.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 253, BUFFER = 1 << 20 };

static int channel, native, parent_native;
static int fds[4 * MOST], n_fds;
static char buffer[BUFFER];

static void say(const char *text, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(channel, text, length, MSG_NOSIGNAL);

        if (sent < 0)
            exit(errno == EPIPE || errno == ECONNRESET ? 7 : 1);
        text += sent;
        length -= (size_t)sent;
    }
}

static void say_text(const char *text)
{
    say(text, strlen(text));
}

static int answer(int count)
{
    int done = 0;

    for (; done < count && n_fds > 0; done++) {
        ssize_t unused = send(fds[0], "hi", 2, MSG_NOSIGNAL);

        (void)unused;
        close(fds[0]);
        memmove(fds, fds + 1, sizeof(int) * (size_t)--n_fds);
    }
    return done;
}

/* How many messages the array of a run has; types hold no brackets here. */
static long run_length(const char *line)
{
    long count = 1;
    int depth = 0, quoted = 0;

    for (const char *at = strchr(line + 1, '['); *at; at++) {
        if (quoted && *at == '\\')
            at++;
        else if (*at == '"')
            quoted = !quoted;
        else if (!quoted && (*at == '[' || *at == '{'))
            depth++;
        else if (!quoted && (*at == ']' || *at == '}') && --depth == 0)
            break;
        else if (!quoted && *at == ',' && depth == 1)
            count++;
    }
    return count;
}

static void take(char *line, size_t length)
{
    char text[200];
    long sequence = 0, count = 0;

    if (strstr(line, "\"NODE_HANDLEIPC\"")) {
        parent_native |= strstr(line, "\"native\"") != NULL;
        return;
    }
    if (strstr(line, "\"NODE_HANDLE_"))
        return;
    if (strstr(line, "\"NODE_HANDLE\"")) {
        say_text(answer(1) ? "{\"cmd\":\"NODE_HANDLE_ACK\"}\n" : "{\"cmd\":\"NODE_HANDLE_NACK\"}\n");
        return;
    }
    if (parent_native && sscanf(line, "[4,%ld,", &sequence) == 1) {
        count = run_length(line);
        sequence += count - 1;
    }
    if (count || (parent_native && sscanf(line, "[2,%ld,%ld,", &sequence, &count) == 2)) {
        answer((int)count);
        snprintf(text, sizeof(text),
                 "{\"cmd\":\"NODE_HANDLEIPC\",\"ack\":%ld,\"handles\":%ld,\"descriptors\":%ld,"
                 "\"bytes\":1073741824}\n", sequence, sequence + 128, sequence + 128);
        say_text(text);
        return;
    }
    if (parent_native && strncmp(line, "[1,", 3) == 0)
        return;
    if (native && !parent_native) {
        say_text("[0,");
        say(line, length);
        say_text("]\n");
        return;
    }
    line[length] = '\n';
    say(line, length + 1);
}

int main(int argc, char **argv)
{
    const char *number = getenv("NODE_CHANNEL_FD");
    size_t filled = 0;

    if (!number)
        return 2;
    channel = atoi(number);
    native = argc > 1 && strcmp(argv[1], "native") == 0;
    if (native)
        say_text("{\"cmd\":\"NODE_HANDLEIPC\",\"native\":2,\"ack\":0,\"handles\":128,"
                 "\"descriptors\":128,\"bytes\":1073741824}\n");
    for (;;) {
        union {
            struct cmsghdr align;
            char room[CMSG_SPACE(sizeof(int) * MOST)];
        } control;
        struct iovec part = {buffer + filled, sizeof(buffer) - 1 - filled};
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                                .msg_controllen = sizeof(control)};
        ssize_t got = recvmsg(channel, &header, MSG_CMSG_CLOEXEC);
        char *start = buffer, *end;

        if (got < 0 && (errno == EINTR || errno == EAGAIN)) /* the parent may share the flag */
            continue;
        if (got <= 0)
            return 7;
        for (struct cmsghdr *m = CMSG_FIRSTHDR(&header); m; m = CMSG_NXTHDR(&header, m)) {
            int count = (int)((m->cmsg_len - CMSG_LEN(0)) / sizeof(int));

            memcpy(fds + n_fds, CMSG_DATA(m), sizeof(int) * (size_t)count);
            n_fds += count;
        }
        filled += (size_t)got;
        while ((end = memchr(start, '\n', filled - (size_t)(start - buffer)))) {
            *end = 0;
            take(start, (size_t)(end - start));
            start = end + 1;
        }
        filled -= (size_t)(start - buffer);
        memmove(buffer, start, filled);
    }
}
