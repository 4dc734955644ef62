#define _GNU_SOURCE
#include "pack.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "stream.h"
#include "util.h"

#define CHUNK (256U << 10)
#define DEPTH_MOST 512
#define HOLE (1ULL << 63)
#define FRESH ".stockade-new"

static unsigned char chunk[CHUNK];
static char place[PATH_MAX]; /* of the entry at hand */
static size_t top_length;

static int put_entry(char kind, mode_t mode)
{
    const char *below = place + top_length + (place[top_length] == '/');
    const size_t length = kind == 'e' ? 0 : strlen(below);
    /* u8 kind, u8 zero, u16 mode, u16 length */
    int error = stream_put_number((uint64_t)(unsigned char)kind << 40 | (uint64_t)(mode & 0777) << 16 | length, 6);

    if (error == 0)
        error = stream_put(below, length);
    return error;
}

/* A file that grows meanwhile ends where it ended; one that shrinks, at its new end. */
static int put_contents(int fd, off_t size)
{
    off_t next = 0;
    int error = 0;

    while (error == 0) {
        const off_t data = lseek(fd, next, SEEK_DATA);
        const bool known = data >= 0 || errno == ENXIO;
        const off_t begin = data >= 0 ? data : size;
        if (known && next < size && begin > next) {
            error = stream_put_number((uint64_t)(begin - next) | HOLE, 8);
            next = begin;
            continue;
        }
        const off_t hole = data >= 0 ? lseek(fd, next, SEEK_HOLE) : -1;
        const size_t room = hole > next && (uint64_t)(hole - next) < sizeof chunk ? (size_t)(hole - next) : sizeof chunk;
        const ssize_t got = pread(fd, chunk, room, next);
        if (got < 0 && errno != EINTR)
            return errno;
        if (got == 0)
            break;
        if (got < 0)
            continue;
        error = stream_put_number((uint64_t)got, 8);
        if (error == 0)
            error = stream_put(chunk, (size_t)got);
        next += got;
        if (size > 0 && next >= size) /* what proc(5) shows has no size */
            break;
    }
    return error != 0 ? error : stream_put_number(0, 8);
}

static int put_file(const struct stat *status)
{
    /* A pipe or a device that took the file's place would block. */
    const int fd = open(place, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);

    if (fd < 0)
        return errno == ENOENT && place[top_length] != '\0' ? 0 : errno;
    int error = put_entry('f', status->st_mode);
    if (error == 0)
        error = put_contents(fd, status->st_size);
    close(fd);
    return error;
}

static int put_link(const struct stat *status)
{
    char target[PATH_MAX];
    const ssize_t length = readlink(place, target, sizeof target);

    if (length < 0)
        return errno == ENOENT ? 0 : errno;
    int error = put_entry('l', status->st_mode);
    if (error == 0)
        error = stream_put_number((uint64_t)length, 2);
    return error != 0 ? error : stream_put(target, (size_t)length);
}

static int put_tree(dev_t device, int depth);

static int put_directory(const struct stat *status, int depth)
{
    const size_t length = strlen(place);
    struct dirent *entry;
    int error = put_entry('d', status->st_mode);

    if (error != 0)
        return error;
    if (depth > DEPTH_MOST)
        return ENAMETOOLONG;
    DIR *directory = opendir(place);
    if (directory == NULL)
        return errno == ENOENT && depth > 0 ? 0 : errno;
    while (error == 0 && (entry = readdir(directory)) != NULL) {
        const size_t more = strlen(entry->d_name);
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length + 1 + more >= sizeof place) {
            error = ENAMETOOLONG;
            break;
        }
        place[length] = '/';
        memcpy(place + length + 1, entry->d_name, more + 1);
        error = put_tree(status->st_dev, depth + 1);
        if (error == 0)
            place[length] = '\0';
    }
    closedir(directory);
    return error;
}

/* Devices, pipes and sockets are left out, and so is what lies on another file system. */
static int put_tree(dev_t device, int depth)
{
    struct stat status;

    if (lstat(place, &status) != 0)
        return errno == ENOENT && depth > 0 ? 0 : errno;
    if (S_ISREG(status.st_mode))
        return put_file(&status);
    if (S_ISLNK(status.st_mode) && depth > 0)
        return put_link(&status);
    if (S_ISDIR(status.st_mode))
        return depth == 0 || status.st_dev == device ? put_directory(&status, depth)
                                                     : put_entry('d', status.st_mode);
    return depth > 0 ? 0 : ENOTSUP;
}

static int begin(const char *path)
{
    top_length = strlen(path);
    while (top_length > 0 && path[top_length - 1] == '/')
        top_length--;
    if (top_length + 2 >= sizeof place)
        return ENAMETOOLONG;
    memcpy(place, path, top_length);
    place[top_length] = '\0';
    return 0;
}

int pack(const char *path, const char *device)
{
    int error = begin(path[strspn(path, "/")] == '\0' ? "/." : path);

    if (error == 0)
        error = stream_open(device, STDOUT_FILENO, O_WRONLY);
    if (error == 0)
        error = put_tree(0, 0);
    if (error == 0)
        error = put_entry('e', 0);
    if (error == 0)
        error = stream_put_end();
    if (error != 0)
        dprintf(STDERR_FILENO, "%s", place);
    return error;
}

static int take_text(char *text, size_t room)
{
    uint64_t number;
    int error = stream_take_number(&number, 2);
    const size_t length = (size_t)number;

    if (error == 0 && length >= room)
        error = ENAMETOOLONG;
    if (error == 0)
        error = stream_take(text, length);
    if (error == 0)
        text[length] = '\0';
    return error;
}

static int take_contents(int fd)
{
    const unsigned char *bytes;
    off_t end = 0;

    for (;;) {
        uint64_t length;
        int error = stream_take_number(&length, 8);
        if (error != 0)
            return error;
        if (length == 0)
            return ftruncate(fd, end) != 0 ? errno : 0;
        if ((length & ~HOLE) > (uint64_t)(INT64_MAX - end))
            return EFBIG;
        if ((length & HOLE) != 0) {
            end += (off_t)(length & ~HOLE);
            if (lseek(fd, end, SEEK_SET) < 0)
                return errno;
            continue;
        }
        end += (off_t)length;
        while (length > 0) {
            size_t count = length < CHUNK ? (size_t)length : CHUNK;
            if ((error = stream_take_some(&bytes, &count)) != 0)
                return error;
            if (!write_all(fd, (const char *)bytes, count))
                return errno;
            length -= count;
        }
    }
}

static char fresh[PATH_MAX + 32]; /* what becomes `place` once it is whole */

/* Beside it, under a name that is short enough wherever one fits, and this process's own. */
static void begin_fresh(void)
{
    const char *slash = strrchr(place, '/');
    const int length = slash == NULL ? 0 : (int)(slash + 1 - place);

    snprintf(fresh, sizeof fresh, "%.*s" FRESH "-%d", length, place, (int)getpid());
    unlink(fresh);
}

static int take_file(mode_t mode)
{
    begin_fresh();
    const int fd = open(fresh, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    int error = take_contents(fd);
    if (error == 0 && (fchmod(fd, mode) != 0 || rename(fresh, place) != 0))
        error = errno;
    if (error != 0)
        unlink(fresh);
    close(fd);
    return error;
}

static int take_directory(mode_t mode)
{
    if (mkdir(place, 0700) != 0)
        return errno == EEXIST ? 0 : errno;
    return chmod(place, mode) != 0 ? errno : 0;
}

static int take_link(void)
{
    char target[PATH_MAX];
    const int error = take_text(target, sizeof target);

    if (error != 0)
        return error;
    begin_fresh();
    if (symlink(target, fresh) != 0)
        return errno;
    if (rename(fresh, place) == 0)
        return 0;
    const int refused = errno;
    unlink(fresh);
    return refused;
}

static int take_entry(bool *more)
{
    uint64_t head; /* u8 kind, u8 zero, u16 mode */
    int error = stream_take_number(&head, 4);
    const mode_t mode = (mode_t)head & 0777;

    place[top_length] = '/';
    if (error == 0)
        error = take_text(place + top_length + 1, sizeof place - top_length - 1);
    if (place[top_length + 1] == '\0' && top_length > 0)
        place[top_length] = '\0';
    if (error != 0)
        return error;
    *more = head >> 24 != 'e';
    switch (head >> 24) {
    case 'd':
        return take_directory(mode);
    case 'f':
        return take_file(mode);
    case 'l':
        return take_link();
    default:
        return *more ? EBADMSG : 0;
    }
}

int unpack(const char *path, const char *device)
{
    bool more = true;
    int error = begin(path);

    if (error == 0)
        error = stream_open(device, STDIN_FILENO, O_RDONLY);
    while (error == 0 && more)
        error = take_entry(&more);
    if (error != 0)
        dprintf(STDERR_FILENO, "%s", place);
    return error;
}
