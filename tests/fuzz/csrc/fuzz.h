/* What the libFuzzer targets share: an input that is read byte by byte, and a check. */
#ifndef FUZZ_H
#define FUZZ_H

#include "hipc.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
    ((condition) ? (void)0 : (fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, \
                                      #condition, errno), abort()))

typedef struct input {
    const uint8_t *next;
    size_t left;
} input;

/* The next byte, or 0 when there is none. */
static inline unsigned take(input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->next++;
}

/* A block of exactly this size, so that one byte too far is seen. */
static inline void *block(size_t size)
{
    void *memory = calloc(1, size > 0 ? size : 1);

    CHECK(memory != NULL);
    return memory;
}

/* A copy of the next bytes, at most `size` of them, in a block of exactly their number. */
static inline char *take_bytes(input *in, size_t size, size_t *length)
{
    char *bytes;

    *length = size < in->left ? size : in->left;
    bytes = malloc(*length > 0 ? *length : 1);
    CHECK(bytes != NULL);
    memcpy(bytes, in->next, *length);
    in->next += *length;
    in->left -= *length;
    return bytes;
}

static inline void new_reader(hipc_reader *reader, size_t capacity, int32_t max_ends,
                              int32_t max_sets, int32_t max_fds)
{
    memset(reader, 0, sizeof(*reader));
    reader->data = block(capacity);
    reader->capacity = capacity;
    reader->ends = block((size_t)max_ends * sizeof(int32_t));
    reader->sets = block((size_t)max_sets * HIPC_SET_FIELDS * sizeof(int32_t));
    reader->fds = block((size_t)max_fds * sizeof(int32_t));
    reader->max_ends = max_ends;
    reader->max_sets = max_sets;
    reader->max_fds = max_fds;
}

static inline void free_reader(hipc_reader *reader)
{
    free(reader->data);
    free(reader->ends);
    free(reader->sets);
    free(reader->fds);
}

/* As framing.py does when the buffer is full of one unfinished line. */
static inline void grow(hipc_reader *reader)
{
    char *larger = block(2 * reader->capacity);

    memcpy(larger, reader->data, reader->filled);
    free(reader->data);
    reader->data = larger;
    reader->capacity *= 2;
}

/* Check the lines of a report against the bytes before them, and take them. Returns their number,
 * and in `sum` the sum of their bytes. */
static inline int take_lines(hipc_reader *reader, uint64_t *sum)
{
    int lines = reader->n_ends;

    CHECK(reader->consumed <= reader->scanned && reader->scanned <= reader->filled);
    CHECK(reader->filled <= reader->capacity);
    CHECK(lines >= 0 && lines <= reader->max_ends);
    for (int i = 0; i < lines; i++) {
        size_t end = (size_t)reader->ends[i];

        CHECK(end > reader->consumed && end <= reader->scanned);
        CHECK(memchr(reader->data + reader->consumed, '\n', end - reader->consumed) ==
              reader->data + end - 1);
        for (; reader->consumed < end; reader->consumed++)
            *sum += (uint8_t)reader->data[reader->consumed];
    }
    /* Only a report that is full may leave a line behind. */
    if (lines < reader->max_ends)
        CHECK(memchr(reader->data + reader->consumed, '\n',
                     reader->filled - reader->consumed) == NULL);
    reader->n_ends = 0;
    return lines;
}

/* Check the descriptor sets of a report; the caller takes the descriptors. */
static inline void check_sets(const hipc_reader *reader)
{
    int32_t in_sets = 0;

    CHECK(reader->n_sets >= 0 && reader->n_sets <= reader->max_sets);
    CHECK(reader->n_fds >= 0 && reader->n_fds <= reader->max_fds);
    for (int i = 0; i < reader->n_sets; i++) {
        const int32_t *set = reader->sets + i * HIPC_SET_FIELDS;

        CHECK(set[0] >= 0 && set[0] < set[1] && (size_t)set[1] <= reader->filled);
        CHECK(i == 0 || set[0] >= set[1 - HIPC_SET_FIELDS]);
        CHECK(set[2] >= 0 && set[2] <= HIPC_READ_FDS && (set[3] == 0 || set[3] == 1));
        CHECK(set[2] > 0 || set[3] == 1);
        in_sets += set[2];
    }
    CHECK(in_sets == reader->n_fds);
}

#endif
