/*
 * What a new process does about its parent. Called between fork and exec: async-signal-safe.
 */
#include "hipc.h"

#include <errno.h>
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
