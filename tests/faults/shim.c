/*
 * Preloaded into a test process: makes one system call fail, at its k-th use or from then on.
 *
 * Instead of failing it can go half way: pass on a single byte, or lose the descriptors.
 * Counts only while armed, only in the process that armed it, and only calls of which the hook, a
 * function of the test's, says that they are the library's own. Knows no scenario.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The order is that of fault_names(). */
#define CALLS(X)                                                                                  \
    X(sendmsg) X(recvmsg) X(send) X(recv) X(accept4) X(getsockopt) X(setsockopt) X(getsockname)   \
    X(getpeername) X(shutdown) X(close) X(fcntl) X(ioctl) X(fstat) X(dup) X(open) X(socketpair)   \
    X(socket) X(bind) X(listen) X(pipe2) X(epoll_create1) X(epoll_ctl) X(poll) X(pidfd_open)      \
    X(fork) X(execve) X(waitpid) X(kill) X(unlink) X(stat) X(mmap)

enum {
#define NUMBER(name) CALL_##name,
    CALLS(NUMBER)
#undef NUMBER
    CALL_COUNT
};

static const char *const names[] = {
#define NAME(name) #name,
    CALLS(NAME)
#undef NAME
    NULL};

typedef int (*hook_function)(int call, int fd);

/* What stands in the place of an errno: the call succeeds, but with one byte only; or it succeeds,
 * and the descriptors found no room. */
enum { SHORT = 1001, TRUNCATED = 1002 };

/* Shared with forked copies: execve fails in the child, and the parent wants to know. */
struct state {
    pid_t pid;
    int call, sticky, error, fired;
    long at, counts[CALL_COUNT];
    int lose; /* so many receptions of descriptors lose them, whatever is armed */
};

static struct state *state;
static hook_function hook;
static __thread int inside;

const char *const *fault_names(void)
{
    return names;
}

/* Begin to count; with `at` > 0 the at-th use of `call` fails with `error`, and with `sticky` all
 * later ones. A null hook counts everything. */
void fault_arm(int call, long at, int error, int sticky, hook_function is_ours)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);

    if (!real)
        real = dlsym(RTLD_NEXT, "mmap");
    if (!state)
        state = real(NULL, sizeof(*state), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(state, 0, sizeof(*state));
    state->call = call;
    state->at = at;
    state->error = error;
    state->sticky = sticky;
    hook = is_ours;
    state->pid = getpid();
}

void fault_disarm(void)
{
    if (state)
        state->pid = 0;
}

void fault_lose(int receptions)
{
    if (state)
        state->lose = receptions;
}

int fault_fired(void)
{
    return state ? state->fired : 0;
}

long fault_count(int call)
{
    return state ? state->counts[call] : 0;
}

/* Whether this use of a call is to fail; then errno is set. */
static int fails(int call, int fd)
{
    int saved = errno, ours = 1;

    if (!state || state->pid == 0 || inside)
        return 0;
    /* In a child only what becomes of it may fail: it is not the process under test. */
    if (call != CALL_execve && state->pid != getpid())
        return 0;
    if (hook && call != CALL_execve) {
        inside = 1;
        ours = hook(call, fd);
        inside = 0;
    }
    errno = saved;
    if (!ours)
        return 0;
    state->counts[call]++;
    if (state->call != call || state->at == 0 ||
        (state->sticky ? state->counts[call] < state->at : state->counts[call] != state->at))
        return 0;
    state->fired++;
    errno = state->error;
    return 1;
}

#define REAL(type, name, ...)                                                                     \
    static type (*real)(__VA_ARGS__);                                                             \
    if (!real)                                                                                    \
    real = dlsym(RTLD_NEXT, #name)

#define WRAP(type, name, call, fd, parameters, arguments)                                         \
    type name parameters                                                                          \
    {                                                                                             \
        static type(*real) parameters;                                                            \
        if (!real)                                                                                \
            real = dlsym(RTLD_NEXT, #name);                                                       \
        if (fails(CALL_##call, fd))                                                               \
            return (type)-1;                                                                      \
        return real arguments;                                                                    \
    }

WRAP(ssize_t, recv, recv, fd, (int fd, void *p, size_t n, int f), (fd, p, n, f))
WRAP(ssize_t, __recv_chk, recv, fd, (int fd, void *p, size_t n, size_t s, int f), (fd, p, n, s, f))
WRAP(int, accept4, accept4, fd, (int fd, struct sockaddr *a, socklen_t *l, int f), (fd, a, l, f))
WRAP(int, getsockopt, getsockopt, fd, (int fd, int v, int o, void *p, socklen_t *l), (fd, v, o, p, l))
WRAP(int, setsockopt, setsockopt, fd, (int fd, int v, int o, const void *p, socklen_t l),
     (fd, v, o, p, l))
WRAP(int, getsockname, getsockname, fd, (int fd, struct sockaddr *a, socklen_t *l), (fd, a, l))
WRAP(int, getpeername, getpeername, fd, (int fd, struct sockaddr *a, socklen_t *l), (fd, a, l))
WRAP(int, shutdown, shutdown, fd, (int fd, int how), (fd, how))
WRAP(int, fstat, fstat, fd, (int fd, struct stat *s), (fd, s))
WRAP(int, fstat64, fstat, fd, (int fd, struct stat64 *s), (fd, s))
WRAP(int, dup, dup, fd, (int fd), (fd))
WRAP(int, socketpair, socketpair, -1, (int d, int t, int p, int pair[2]), (d, t, p, pair))
WRAP(int, socket, socket, -1, (int d, int t, int p), (d, t, p))
WRAP(int, bind, bind, fd, (int fd, const struct sockaddr *a, socklen_t l), (fd, a, l))
WRAP(int, listen, listen, fd, (int fd, int backlog), (fd, backlog))
WRAP(int, pipe2, pipe2, -1, (int p[2], int f), (p, f))
WRAP(int, epoll_create1, epoll_create1, -1, (int f), (f))
WRAP(int, poll, poll, -1, (struct pollfd *p, nfds_t n, int t), (p, n, t))
WRAP(int, __poll_chk, poll, -1, (struct pollfd *p, nfds_t n, int t, size_t s), (p, n, t, s))
WRAP(pid_t, fork, fork, -1, (void), ())
WRAP(int, execve, execve, -1, (const char *p, char *const v[], char *const e[]), (p, v, e))
WRAP(int, kill, kill, -1, (pid_t pid, int s), (pid, s))
WRAP(int, unlink, unlink, -1, (const char *p), (p))
WRAP(int, stat, stat, -1, (const char *restrict p, struct stat *restrict s), (p, s))
WRAP(int, stat64, stat, -1, (const char *restrict p, struct stat64 *restrict s), (p, s))

/* To remove takes no room, so it does not fail for want of any. */
int epoll_ctl(int e, int op, int fd, struct epoll_event *v)
{
    REAL(int, epoll_ctl, int, int, int, struct epoll_event *);
    return op != EPOLL_CTL_DEL && fails(CALL_epoll_ctl, fd) ? -1 : real(e, op, fd, v);
}

static int only_a_byte(struct msghdr *m, struct iovec *one)
{
    for (size_t i = 0; i < m->msg_iovlen; i++) {
        if (m->msg_iov[i].iov_len > 0) {
            *one = m->msg_iov[i];
            one->iov_len = 1;
            m->msg_iov = one;
            m->msg_iovlen = 1;
            return 1;
        }
    }
    return 0;
}

ssize_t sendmsg(int fd, const struct msghdr *m, int f)
{
    REAL(ssize_t, sendmsg, int, const struct msghdr *, int);
    struct msghdr part = *m;
    struct iovec one;

    if (!fails(CALL_sendmsg, fd))
        return real(fd, m, f);
    /* The kernel says this of descriptors alone. */
    if (errno == ETOOMANYREFS && m->msg_controllen == 0)
        return real(fd, m, f);
    if (errno == SHORT && only_a_byte(&part, &one))
        return real(fd, &part, f);
    return -1;
}

ssize_t recvmsg(int fd, struct msghdr *m, int f)
{
    REAL(ssize_t, recvmsg, int, struct msghdr *, int);
    struct msghdr part = *m;
    struct iovec one;
    ssize_t got;

    if (!fails(CALL_recvmsg, fd)) {
        if (!state || state->pid != getpid() || state->lose <= 0 || !m->msg_control)
            return real(fd, m, f);
        errno = TRUNCATED;
    }
    if (errno == SHORT && only_a_byte(&part, &one)) {
        got = real(fd, &part, f);
    } else if (errno == TRUNCATED) {
        part.msg_control = NULL;
        part.msg_controllen = 0;
        got = real(fd, &part, f); /* the kernel drops them, and says MSG_CTRUNC */
        if (got > 0 && (part.msg_flags & MSG_CTRUNC) && state->lose > 0)
            state->lose--;
    } else {
        return -1;
    }
    m->msg_flags = part.msg_flags;
    m->msg_controllen = part.msg_controllen;
    return got;
}

ssize_t send(int fd, const void *p, size_t n, int f)
{
    REAL(ssize_t, send, int, const void *, size_t, int);
    if (!fails(CALL_send, fd))
        return real(fd, p, n, f);
    return errno == SHORT && n > 0 ? real(fd, p, 1, f) : -1;
}

/* Linux has closed the descriptor whatever close says, EBADF excepted. */
int close(int fd)
{
    REAL(int, close, int);
    if (fails(CALL_close, fd)) {
        int error = errno;

        real(fd);
        errno = error;
        return -1;
    }
    return real(fd);
}

/* Somebody else has reaped it. */
pid_t waitpid(pid_t pid, int *status, int options)
{
    REAL(pid_t, waitpid, pid_t, int *, int);
    if (fails(CALL_waitpid, -1)) {
        int error = errno, unwanted;

        if (error == ECHILD && real(pid, &unwanted, options) == 0)
            return 0;
        errno = error;
        return -1;
    }
    return real(pid, status, options);
}

/* A wrapper of vfork cannot return twice from its caller's frame; fork serves as well. */
pid_t vfork(void)
{
    REAL(pid_t, fork, void);
    return fails(CALL_fork, -1) ? -1 : real();
}

long syscall(long number, ...)
{
    REAL(long, syscall, long, long, long, long, long, long, long);
    va_list arguments;
    long x[6];

    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        x[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_pidfd_open && fails(CALL_pidfd_open, -1))
        return -1;
    return real(number, x[0], x[1], x[2], x[3], x[4], x[5]);
}

#define WITH_ONE_MORE(name, call, first, second)                                                  \
    int name(int fd, second number, ...)                                                          \
    {                                                                                             \
        REAL(int, name, int, second, void *);                                                     \
        va_list arguments;                                                                        \
        void *last;                                                                               \
                                                                                                  \
        va_start(arguments, number);                                                              \
        last = va_arg(arguments, void *);                                                         \
        va_end(arguments);                                                                        \
        return fails(CALL_##call, fd) ? -1 : real(fd, number, last);                              \
    }

WITH_ONE_MORE(fcntl, fcntl, int, int)
WITH_ONE_MORE(fcntl64, fcntl, int, int)
WITH_ONE_MORE(ioctl, ioctl, int, unsigned long)

#define OPEN(name)                                                                                \
    int name(const char *path, int flags, ...)                                                    \
    {                                                                                             \
        REAL(int, name, const char *, int, mode_t);                                               \
        va_list arguments;                                                                        \
        mode_t mode;                                                                              \
                                                                                                  \
        va_start(arguments, flags);                                                               \
        mode = va_arg(arguments, mode_t);                                                         \
        va_end(arguments);                                                                        \
        return fails(CALL_open, -1) ? -1 : real(path, flags, mode);                               \
    }

OPEN(open)
OPEN(open64)

/* Whether this may be a buffer. The interpreter's arenas have one MiB, and the hook, which runs
 * Python, must not be called while one is made. */
static int is_buffer(size_t n, int flags)
{
    return n >= (size_t)128 << 10 && n != (size_t)1 << 20 && !(flags & MAP_STACK);
}

void *mmap(void *a, size_t n, int p, int f, int fd, off_t o)
{
    REAL(void *, mmap, void *, size_t, int, int, int, off_t);
    return is_buffer(n, f) && fails(CALL_mmap, fd) ? MAP_FAILED : real(a, n, p, f, fd, o);
}

void *mmap64(void *a, size_t n, int p, int f, int fd, off64_t o)
{
    REAL(void *, mmap64, void *, size_t, int, int, int, off64_t);
    return is_buffer(n, f) && fails(CALL_mmap, fd) ? MAP_FAILED : real(a, n, p, f, fd, o);
}

void *mremap(void *a, size_t n, size_t m, int f, ...)
{
    REAL(void *, mremap, void *, size_t, size_t, int, void *);
    va_list arguments;
    void *where;

    va_start(arguments, f);
    where = va_arg(arguments, void *);
    va_end(arguments);
    return fails(CALL_mmap, -1) ? MAP_FAILED : real(a, n, m, f, where);
}
