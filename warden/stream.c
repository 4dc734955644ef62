#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

#define BUFFER (256U << 10)
#define BLOCK 4096U       /* what direct transfers of a device are aligned to */
#define SIGN (4ULL << 20) /* bytes between two signs of life */

static int stream;
static bool on_device;
static _Alignas(BLOCK) unsigned char buffer[BUFFER];
static size_t at, held; /* in the buffer */
static uint64_t unsigned_bytes;

int stream_open(const char *device, int otherwise, int flags)
{
    at = held = 0;
    on_device = device != NULL;
    stream = on_device ? open(device, flags | O_DIRECT | O_CLOEXEC) : otherwise;
    return stream < 0 ? errno : 0;
}

/* Whoever waits for the end of this hears that it goes on. */
static void sign(size_t count)
{
    unsigned_bytes += count;
    if (on_device && unsigned_bytes >= SIGN) {
        unsigned_bytes = 0;
        write_all(STDOUT_FILENO, ".", 1);
    }
}

static int flush(size_t count)
{
    if (!write_all(stream, (const char *)buffer, count))
        return errno;
    sign(count);
    at = 0;
    return 0;
}

int stream_put(const void *bytes, size_t length)
{
    const unsigned char *next = bytes;

    while (length > 0) {
        const size_t count = length < BUFFER - at ? length : BUFFER - at;
        memcpy(buffer + at, next, count);
        at += count;
        next += count;
        length -= count;
        if (at == BUFFER) {
            const int error = flush(BUFFER);
            if (error != 0)
                return error;
        }
    }
    return 0;
}

/* What is left; a device takes whole blocks. */
int stream_put_end(void)
{
    const size_t count = on_device ? (at + BLOCK - 1) & ~(size_t)(BLOCK - 1) : at;

    memset(buffer + at, 0, count - at);
    return flush(count);
}

static int fill(void)
{
    ssize_t got;

    do
        got = read(stream, buffer, BUFFER);
    while (got < 0 && errno == EINTR);
    at = 0;
    held = got > 0 ? (size_t)got : 0;
    sign(held);
    return got < 0 ? errno : got == 0 ? EBADMSG : 0;
}

int stream_take(void *bytes, size_t length)
{
    unsigned char *next = bytes;

    while (length > 0) {
        if (at == held) {
            const int error = fill();
            if (error != 0)
                return error;
        }
        const size_t count = length < held - at ? length : held - at;
        memcpy(next, buffer + at, count);
        at += count;
        next += count;
        length -= count;
    }
    return 0;
}

int stream_put_number(uint64_t value, size_t length)
{
    unsigned char bytes[sizeof value];

    for (size_t i = 0; i < length; i++)
        bytes[i] = (unsigned char)(value >> (8 * (length - 1 - i)));
    return stream_put(bytes, length);
}

int stream_take_number(uint64_t *value, size_t length)
{
    unsigned char bytes[sizeof *value];
    const int error = stream_take(bytes, length);

    *value = 0;
    for (size_t i = 0; error == 0 && i < length; i++)
        *value = *value << 8 | bytes[i];
    return error;
}

int stream_take_some(const unsigned char **bytes, size_t *length)
{
    const int error = at == held ? fill() : 0;

    *bytes = buffer + at;
    if (*length > held - at)
        *length = held - at;
    at += *length;
    return error;
}
