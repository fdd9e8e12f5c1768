/*
 * What a new process does about its parent, and about what it has inherited from it. What is called
 * between fork and exec is async-signal-safe.
 */
#include "hipc.h"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#endif

int hipc_exit_with_parent(int signal, int parent)
{
#ifdef __linux__
    if (prctl(PR_SET_PDEATHSIG, signal) < 0)
        return -errno;
    /* It may have ended before the call: then no signal will come. */
    return getppid() == parent ? 0 : -ESRCH;
#else
    (void)signal;
    (void)parent;
    return -ENOSYS;
#endif
}

int hipc_signals_inherited(void)
{
    sigset_t blocked;
    if (pthread_sigmask(SIG_SETMASK, NULL, &blocked) != 0)
        return 1;
    for (int number = 1; number < NSIG; number++) {
        /* Fails for the numbers that the C library keeps for itself: they are nobody's to block. */
        if (sigismember(&blocked, number) == 1)
            return 1;
        if (number == SIGPIPE || number == SIGXFSZ)
            continue;
        struct sigaction action;
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN)
            return 1;
    }
    return 0;
}

void hipc_reset_signals(void)
{
    /* The handlers first: they are the parent's code, and what is blocked may be pending. */
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL); /* refused for SIGKILL, SIGSTOP and the C library's own */
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
}
