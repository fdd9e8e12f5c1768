/*
 * The limit: what the kernel takes to pass descriptors, without JSON, acknowledgements or owners.
 *
 *     fdpass stream N BATCH    N descriptors, BATCH for each sendmsg, received and closed
 *     fdpass pingpong N        N times one descriptor there and one byte back
 *     fdpass apart N           the same, each process on a CPU of its own
 *     fdpass distinct N        N accepted connections, one for each sendmsg, closed by both
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 2000 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void send_fds(int sock, int fd, int count)
{
    char line[64 * 40];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * 253)];
    } room;
    struct iovec part = {line, (size_t)count * 40};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &room};
    int *fds;

    memset(line, 'x', sizeof(line));
    header.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
    room.align.cmsg_level = SOL_SOCKET;
    room.align.cmsg_type = SCM_RIGHTS;
    room.align.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
    fds = (int *)(void *)CMSG_DATA(&room.align);
    for (int i = 0; i < count; i++)
        fds[i] = fd;
    if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        die("sendmsg");
}

static int recv_fds(int sock)
{
    char line[64 * 40];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * 253)];
    } room;
    struct iovec part = {line, sizeof(line)};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &room,
                            .msg_controllen = sizeof(room)};
    ssize_t got = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    struct cmsghdr *message;
    int count;
    int *fds;

    if (got <= 0 || (header.msg_flags & MSG_CTRUNC))
        die("recvmsg");
    message = CMSG_FIRSTHDR(&header);
    count = (int)((message->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    fds = (int *)(void *)CMSG_DATA(message);
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return count;
}

/* Accept up to `count` connections whose clients are kept in `clients`. */
static void accept_some(int *accepted, int *clients, int count)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof(name);
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    if (listener < 0 || bind(listener, (struct sockaddr *)&name, size) < 0 ||
        listen(listener, 1024) < 0 || getsockname(listener, (struct sockaddr *)&name, &size) < 0)
        die("listen");
    for (int i = 0; i < count; i++) {
        clients[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(clients[i], (struct sockaddr *)&name, size) < 0)
            die("connect");
        accepted[i] = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (accepted[i] < 0)
            die("accept");
    }
    close(listener);
}

/* Hand over n accepted connections for good, one per sendmsg, and have the other process close them.
 * They are made in chunks, while the clock stands still. */
static void distinct(int sock, int n)
{
    static int accepted[CHUNK], clients[CHUNK];
    double seconds = 0;
    char byte;

    for (int done = 0; done < n;) {
        int count = n - done < CHUNK ? n - done : CHUNK;
        double start;

        accept_some(accepted, clients, count);
        start = now();
        for (int i = 0; i < count; i++) {
            send_fds(sock, accepted[i], 1);
            close(accepted[i]);
        }
        done += count;
        if (read(sock, &byte, 1) != 1)
            die("read");
        seconds += now() - start;
        for (int i = 0; i < count; i++)
            close(clients[i]);
    }
    printf("{\"seconds\": %.9f, \"count\": %d}\n", seconds, n);
}

/* With one CPU, or less than two allowed, both stay where they are. */
static void stay_on(int nth)
{
    cpu_set_t all, one;

    if (sched_getaffinity(0, sizeof(all), &all) < 0)
        die("sched_getaffinity");
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &all) || nth-- > 0)
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        (void)sched_setaffinity(0, sizeof(one), &one);
        return;
    }
}

int main(int argc, char **argv)
{
    int pair[2], n = argc > 2 ? atoi(argv[2]) : 0, batch = argc > 3 ? atoi(argv[3]) : 1;
    int stream = argc > 1 && strcmp(argv[1], "stream") == 0;
    int apart = argc > 1 && strcmp(argv[1], "apart") == 0;
    int is_distinct = argc > 1 && strcmp(argv[1], "distinct") == 0;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    double start, *laps = calloc((size_t)n + 1, sizeof(double));
    char byte = 0;

    if (n < 1 || batch < 1 || batch > 64 || laps == NULL)
        return 2;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        die("socketpair");
    if (fork() == 0) {
        close(pair[0]);
        if (apart)
            stay_on(1);
        if (write(pair[1], &byte, 1) != 1)
            die("write");
        for (int done = 0; done < n;) {
            done += recv_fds(pair[1]);
            if (is_distinct ? done % CHUNK && done < n : stream)
                continue;
            if (write(pair[1], &byte, 1) != 1)
                die("write");
        }
        if (stream && write(pair[1], &byte, 1) != 1)
            die("write");
        _exit(0);
    }
    close(pair[1]);
    if (apart)
        stay_on(0);
    if (read(pair[0], &byte, 1) != 1)
        die("read");
    if (is_distinct) {
        distinct(pair[0], n);
        wait(NULL);
        return 0;
    }
    start = now();
    for (int done = 0; done < n; done += batch) {
        double lap = now();
        send_fds(pair[0], fd, n - done < batch ? n - done : batch);
        if (!stream && read(pair[0], &byte, 1) != 1)
            die("read");
        laps[done] = now() - lap;
    }
    if (stream && read(pair[0], &byte, 1) != 1)
        die("read");
    start = now() - start;
    wait(NULL);
    printf("{\"seconds\": %.9f, \"count\": %d, \"laps\": [", start, n);
    if (!stream)
        for (int i = 0; i < n; i++)
            printf("%s%.9f", i ? ", " : "", laps[i]);
    printf("]}\n");
    return 0;
}
