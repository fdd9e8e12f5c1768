/*
 * Newline framing over the caller's buffer, and what the JSON in a line will cost who reads it.
 *
 * Knows where lines end, and how far it has looked. Does not know what a line means, reads no
 * socket and never moves a byte that the caller has not declared consumed, except in compact.
 */
#include "hipc.h"

#include <string.h>

void hipc_scan(hipc_reader *reader)
{
    while (reader->n_ends < reader->max_ends && reader->scanned < reader->filled) {
        const char *from = reader->data + reader->scanned;
        const char *newline = memchr(from, '\n', reader->filled - reader->scanned);

        if (newline == NULL) {
            reader->scanned = reader->filled;
            return;
        }
        reader->scanned = (size_t)(newline - reader->data) + 1;
        reader->ends[reader->n_ends++] = (int32_t)reader->scanned;
    }
}

void hipc_compact(hipc_reader *reader)
{
    size_t gone = reader->consumed;

    if (gone == 0)
        return;
    /* The tail is at most one unfinished line: moved once per call, not once per line. */
    if (reader->filled > gone)
        memmove(reader->data, reader->data + gone, reader->filled - gone);
    reader->filled -= gone;
    reader->scanned -= gone;
    reader->position += gone;
    reader->consumed = 0;
}

int64_t hipc_feed(hipc_reader *reader, const char *bytes, size_t length)
{
    size_t room;

    hipc_compact(reader);
    room = reader->capacity - reader->filled;
    if (length > room)
        length = room;
    if (length > 0)
        memcpy(reader->data + reader->filled, bytes, length);
    reader->filled += length;
    hipc_scan(reader);
    return (int64_t)length;
}

/* Where the string ends whose first byte is at `at`: the index of its quote, or `length`. */
static size_t string_end(const char *text, size_t at, size_t length)
{
    size_t quote = 0;
    size_t soon = length - at > 32 ? at + 32 : length;

    /* Most strings are short: two calls of memchr would cost more than they save. */
    while (at < soon && text[at] != '"')
        at += text[at] == '\\' ? 2 : 1; /* what is escaped does not end the string */
    if (at < soon)
        return at;
    while (at < length) {
        const char *found;

        if (quote < at) {
            found = memchr(text + at, '"', length - at);
            quote = found != NULL ? (size_t)(found - text) : length;
        }
        found = memchr(text + at, '\\', quote - at);
        if (found == NULL)
            return quote;
        at = (size_t)(found - text) + 2;
    }
    return length;
}

static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Whether the 'e' at this index is that of a number with an exponent of three digits or more. */
static int is_far_exponent(const char *text, size_t at, size_t length)
{
    if (at == 0 || !is_digit(text[at - 1]))
        return 0; /* `true` and `false` have one too */
    at++;
    if (at < length && (text[at] == '+' || text[at] == '-'))
        at++;
    return length > at && length - at >= 3 && is_digit(text[at]) && is_digit(text[at + 1]) &&
           is_digit(text[at + 2]);
}

/* What a number of this length counts beside the comma before it. */
static int64_t length_weight(size_t length)
{
    int64_t units = (int64_t)(length / HIPC_LONG_NUMBER);

    return units * units;
}

int hipc_shape(const char *text, size_t length, int max_depth, int64_t max_values)
{
    int depth = 0, deepest = 0;
    int64_t values = 0;
    size_t from = 0; /* one past the last string or structural byte */

    for (size_t at = 0; at < length; at++) {
        switch (text[at]) {
        case '"':
            at = string_end(text, at + 1, length);
            from = at + 1;
            continue;
        case 'e':
        case 'E':
            if (is_far_exponent(text, at, length))
                values += HIPC_FAR_EXPONENT;
            continue;
        case '[':
        case '{':
            values++;
            if (++depth > deepest)
                deepest = depth;
            if (deepest > max_depth)
                return HIPC_TOO_DEEP;
            break;
        case ',':
            values++;
            break;
        case ']':
        case '}':
            depth--;
            break;
        default:
            continue;
        }
        if (at - from >= HIPC_LONG_NUMBER)
            values += length_weight(at - from);
        if (values > max_values)
            return HIPC_TOO_MANY;
        from = at + 1;
    }
    if (from < length)
        values += length_weight(length - from);
    return values > max_values ? HIPC_TOO_MANY : deepest;
}
