/*
 * Clients: `load PORT COUNT AT_ONCE` connects COUNT times, AT_ONCE at a time, reads each answer to its
 * end and closes. One thread and epoll, so that the load costs as little as it can.
 *
 * `load PORT COUNT AT_ONCE RATE` connects RATE times a second instead, however many are open, up to
 * AT_ONCE, and says how long half of the connections took, and all but a hundredth (p50, p99).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

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

static double began[65536]; /* by descriptor */

static int ascending(const void *a, const void *b)
{
    double one = *(const double *)a, two = *(const double *)b;

    return one < two ? -1 : one > two;
}

static void open_one(int epoll, const struct sockaddr_in *to)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    if (fd < 0 || fd >= 65536)
        die("socket");
    began[fd] = now();
    if (connect(fd, (const struct sockaddr *)to, sizeof(*to)) < 0 && errno != EINPROGRESS)
        die("connect");
    event.data.fd = fd;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

int main(int argc, char **argv)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    struct epoll_event events[64];
    int count, opened = 0, done = 0, answered = 0, at_once, epoll = epoll_create1(0);
    char data[256];
    double start, rate = argc == 5 ? atof(argv[4]) : 0, *laps;

    if (argc != 4 && argc != 5)
        return 2;
    to.sin_port = htons((unsigned short)atoi(argv[1]));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    count = atoi(argv[2]);
    at_once = atoi(argv[3]);
    laps = calloc((size_t)count + 1, sizeof(double));
    if (laps == NULL)
        die("calloc");
    start = now();
    while (done < count) {
        int due = rate > 0 ? (int)((now() - start) * rate) + 1 : count, ready;

        while (opened < count && opened < due && opened - done < at_once) {
            open_one(epoll, &to);
            opened++;
        }
        ready = epoll_wait(epoll, events, 64, rate > 0 && opened < count ? 1 : 10000);
        if (ready < 0 || (ready == 0 && rate <= 0))
            die("epoll_wait");
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            ssize_t got = recv(fd, data, sizeof(data), 0);

            if (got < 0 && errno == EAGAIN)
                continue;
            if (got > 0) {
                answered++;
                continue; /* level-triggered: the end comes as the next event */
            }
            if (got < 0)
                die("recv");
            close(fd);
            laps[done++] = now() - began[fd];
        }
    }
    start = now() - start;
    if (answered < count) {
        fprintf(stderr, "%d of %d were answered\n", answered, count);
        return 1;
    }
    qsort(laps, (size_t)count, sizeof(double), ascending);
    printf("{\"count\": %d, \"seconds\": %.9f, \"p50\": %.9f, \"p99\": %.9f}\n", count, start,
           laps[count / 2], laps[count - 1 - count / 100]);
    return 0;
}
