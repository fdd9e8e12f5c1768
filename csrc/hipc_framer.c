/*
 * Newline framing over the caller's buffer, and how deep the JSON in a line is nested.
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

/* The quote that ends the string which begins at `text`, or `end`. */
static const char *string_end(const char *text, const char *end)
{
    const char *quote = NULL;
    const char *soon = end - text > 32 ? text + 32 : end;

    /* Most strings are short: two calls of memchr would cost more than they save. */
    while (text < soon && *text != '"')
        text += *text == '\\' ? 2 : 1; /* what is escaped does not end the string */
    if (text < soon)
        return text;
    while (text < end) {
        const char *escape;

        if (quote == NULL || quote < text) {
            quote = memchr(text, '"', (size_t)(end - text));
            if (quote == NULL)
                quote = end;
        }
        escape = memchr(text, '\\', (size_t)(quote - text));
        if (escape == NULL)
            return quote;
        text = escape + 2;
    }
    return end;
}

int hipc_nests_deeper(const char *text, size_t length, int limit)
{
    const char *end = text + length;
    int depth = 0;

    for (; text < end; text++) {
        switch (*text) {
        case '"':
            text = string_end(text + 1, end);
            break;
        case '[':
        case '{':
            if (++depth > limit)
                return 1;
            break;
        case ']':
        case '}':
            depth--;
            break;
        default:
            break;
        }
    }
    return 0;
}
