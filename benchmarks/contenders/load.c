/*
 * Clients: `load PORT COUNT AT_ONCE` connects COUNT times, AT_ONCE at a time, reads each answer to its
 * end and closes. One thread and epoll, so that the load costs as little as it can.
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

static void open_one(int epoll, const struct sockaddr_in *to)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    if (fd < 0)
        die("socket");
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
    double start;

    if (argc != 4)
        return 2;
    to.sin_port = htons((unsigned short)atoi(argv[1]));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    count = atoi(argv[2]);
    at_once = atoi(argv[3]);
    start = now();
    while (opened < count && opened < at_once) {
        open_one(epoll, &to);
        opened++;
    }
    while (done < count) {
        int ready = epoll_wait(epoll, events, 64, 10000);

        if (ready <= 0)
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
            done++;
            if (opened < count) {
                open_one(epoll, &to);
                opened++;
            }
        }
    }
    start = now() - start;
    if (answered < count) {
        fprintf(stderr, "%d of %d were answered\n", answered, count);
        return 1;
    }
    printf("{\"count\": %d, \"seconds\": %.9f}\n", count, start);
    return 0;
}
