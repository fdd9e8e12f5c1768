/*
 * libFuzzer target: lines out of bytes however they are cut, and the shape of a JSON text.
 *
 * Both against the obvious way of doing it: a line ends at each newline, and a text is walked byte
 * by byte.
 */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* hipc_shape, by looking at each byte with no hurry. */
static int obvious_shape(const char *text, size_t length, int max_depth, int64_t max_values)
{
    int depth = 0, deepest = 0, in_string = 0;
    int64_t values = 0, run = 0;

    for (size_t i = 0; i < length; i++) {
        char c = text[i];

        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = 0;
            run = 0;
            continue;
        }
        if ((c == 'e' || c == 'E') && i > 0 && is_digit(text[i - 1])) {
            size_t at = i + 1;

            if (at < length && (text[at] == '+' || text[at] == '-'))
                at++;
            if (at + 2 < length && is_digit(text[at]) && is_digit(text[at + 1]) &&
                is_digit(text[at + 2]))
                values += HIPC_FAR_EXPONENT;
        }
        if (c == '"') {
            in_string = 1;
            run = 0;
        } else if (strchr("[]{},", c) != NULL && c != '\0') {
            if (c == '[' || c == '{') {
                depth++;
                if (depth > deepest)
                    deepest = depth;
                if (deepest > max_depth)
                    return HIPC_TOO_DEEP;
            }
            values += c == '[' || c == '{' || c == ',';
            values += (run / HIPC_LONG_NUMBER) * (run / HIPC_LONG_NUMBER);
            if (values > max_values)
                return HIPC_TOO_MANY;
            depth -= c == ']' || c == '}';
            run = 0;
        } else {
            run++;
        }
    }
    values += (run / HIPC_LONG_NUMBER) * (run / HIPC_LONG_NUMBER);
    return values > max_values ? HIPC_TOO_MANY : deepest;
}

static void check_shape(const char *text, size_t length, int max_depth, int64_t max_values)
{
    CHECK(hipc_shape(text, length, max_depth, max_values) ==
          obvious_shape(text, length, max_depth, max_values));
}

/* Feed the text in pieces of `piece` bytes, and compare what comes out with the text itself. */
static void check_lines(const char *text, size_t length, size_t capacity, int max_ends,
                        size_t piece)
{
    hipc_reader reader;
    uint64_t sum = 0, wanted = 0;
    size_t given = 0, rest = length;
    int lines = 0, newlines = 0;

    for (size_t i = 0; i < length; i++)
        newlines += text[i] == '\n';
    while (rest > 0 && text[rest - 1] != '\n')
        rest--;
    for (size_t i = 0; i < rest; i++)
        wanted += (uint8_t)text[i];
    new_reader(&reader, capacity, max_ends, 1, HIPC_READ_FDS);
    for (;;) {
        size_t size = length - given < piece ? length - given : piece;
        char *bytes = block(size);
        int64_t took;
        int found;

        memcpy(bytes, text + given, size);
        took = hipc_feed(&reader, bytes, size);
        free(bytes);
        CHECK(took >= 0 && (size_t)took <= size);
        given += (size_t)took;
        CHECK(reader.consumed == 0 && reader.position + reader.filled == given);
        CHECK(memcmp(reader.data, text + reader.position, reader.filled) == 0);
        found = take_lines(&reader, &sum);
        lines += found;
        if (given == length && reader.scanned == reader.filled)
            break;
        if (found == 0 && reader.filled == reader.capacity)
            grow(&reader);
    }
    CHECK(lines == newlines && sum == wanted);
    free_reader(&reader);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    size_t capacity = 1 + take(&in), piece = 1 + take(&in), length;
    int max_ends = 1 + (int)(take(&in) % 16), depth = (int)take(&in);
    int64_t values = take(&in) * 4;
    char *text = take_bytes(&in, in.left, &length);

    check_shape(text, length, depth, values);
    check_shape(text, length, 0, values);
    check_shape(text, length, depth, INT64_MAX);
    check_lines(text, length, capacity, max_ends, piece);
    free(text);
    return 0;
}
