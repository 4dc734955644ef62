#define _GNU_SOURCE
#include "log.h"

#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "report.h"
#include "util.h"

static struct {
    const char *path;
    int fd;
    uint64_t size, most;
    unsigned keep;
    bool in_line; /* what was written last did not end its line */
} file = {.fd = -1};

static bool reopen(void)
{
    struct stat status;

    file.fd = open(file.path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
    file.size = file.fd >= 0 && fstat(file.fd, &status) == 0 ? (uint64_t)status.st_size : 0;
    return file.fd >= 0;
}

bool log_open(const struct plan *plan)
{
    const struct record *record = plan_last(plan, OP_LOG);

    if (record == NULL)
        return false;
    file.path = record->data;
    file.most = record->a;
    file.keep = (unsigned)record->b;
    if (!reopen())
        fail("log", file.path);
    return true;
}

/* log → log.1 → … → log.KEEP; the oldest is written over. */
static void rotate(void)
{
    char from[PATH_MAX], to[PATH_MAX];

    for (unsigned number = file.keep; number > 0; number--) {
        snprintf(to, sizeof to, "%s.%u", file.path, number);
        if (number > 1)
            snprintf(from, sizeof from, "%s.%u", file.path, number - 1);
        else
            snprintf(from, sizeof from, "%s", file.path);
        rename(from, to); /* ENOENT: there are not that many yet */
    }
    if (file.keep == 0)
        unlink(file.path);
    close(file.fd);
    reopen();
}

void log_write(const char *bytes, size_t length)
{
    if (file.path == NULL || (file.fd < 0 && !reopen()))
        return;
    if (file.most > 0 && file.size > 0 && file.size + length > file.most)
        rotate();
    if (file.fd >= 0 && write_all(file.fd, bytes, length))
        file.size += length;
    file.in_line = length > 0 && bytes[length - 1] != '\n';
}

void log_line(const char *format, ...)
{
    char line[4096];
    const time_t seconds = time(NULL);
    struct tm utc;
    va_list arguments;

    if (gmtime_r(&seconds, &utc) == NULL)
        return;
    size_t used = file.in_line ? 1 : 0;
    line[0] = '\n';
    used += strftime(line + used, 64, "%Y-%m-%dT%H:%M:%SZ stockade: ", &utc);
    va_start(arguments, format);
    const int size = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    va_end(arguments);
    if (size > 0)
        used += (size_t)size < sizeof line - used - 1 ? (size_t)size : sizeof line - used - 2;
    line[used++] = '\n';
    log_write(line, used);
}

void log_datagram(const char *bytes, size_t length)
{
    char line[8194];
    size_t used = 0, at = 0;

    /* "<PRI>" in front (RFC 3164) says nothing to a reader. */
    if (length > 0 && bytes[0] == '<') {
        const char *end = memchr(bytes, '>', length < 6 ? length : 6);
        at = end == NULL ? 0 : (size_t)(end - bytes) + 1;
    }
    for (; at < length && used < sizeof line - 1; at++) {
        const unsigned char byte = (unsigned char)bytes[at];
        if (byte != '\0' && byte != '\n')
            line[used++] = byte < ' ' && byte != '\t' ? '?' : (char)byte; /* no escape sequences for a terminal */
    }
    line[used++] = '\n';
    if (file.path != NULL)
        log_write(line, used);
    else
        write_all(STDERR_FILENO, line, used);
}
