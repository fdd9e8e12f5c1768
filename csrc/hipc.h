/* What every C file of the core includes: system headers, then the declarations. */
#ifndef HIPC_H
#define HIPC_H

#ifdef _WIN32
#error "handleipc hands over POSIX descriptors: Windows is not supported"
#endif

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* accept4 */
#endif

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "hipc_api.h"

/* Find the newlines in what is not yet scanned and report them; stops when `ends` is full. */
void hipc_scan(hipc_reader *reader);

/* Drop consumed bytes, so that the buffer begins with the unfinished line. */
void hipc_compact(hipc_reader *reader);

#endif
