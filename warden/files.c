#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pack.h"
#include "util.h"

#define CHUNK 65536
#define DEPTH_MOST 64

bool is_files_command(const char *name)
{
    return strcmp(name, "@read") == 0 || strcmp(name, "@list") == 0 || strcmp(name, "@sync") == 0 ||
           strcmp(name, "@pack") == 0 || strcmp(name, "@unpack") == 0;
}

static int copy(int from, int to)
{
    char bytes[CHUNK];
    ssize_t got;

    while ((got = read(from, bytes, sizeof bytes)) != 0) {
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 || !write_all(to, bytes, (size_t)got))
            return errno;
    }
    return 0;
}

/* A pipe or a device would block or never end. */
static int read_file(const char *path)
{
    struct stat status;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0 || fstat(fd, &status) != 0)
        return errno;
    if (!S_ISREG(status.st_mode))
        return S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    return copy(fd, STDOUT_FILENO);
}

/* One record, ended by a NUL: `TYPE MODE UID GID BYTES PATH`, and a second one with the target of a link. BYTES are
 * those of its contents that are no hole. */
static void print_entry(const char *path, const struct stat *status)
{
    const char type = S_ISREG(status->st_mode)   ? 'f'
                      : S_ISDIR(status->st_mode) ? 'd'
                      : S_ISLNK(status->st_mode) ? 'l'
                                                 : 'o';
    const unsigned long long held = (unsigned long long)status->st_blocks * 512U,
                             size = (unsigned long long)status->st_size;
    char target[PATH_MAX] = "";

    if (type == 'l' && readlink(path, target, sizeof target - 1) < 0)
        target[0] = '\0';
    printf("%c %o %u %u %llu %s%c%s%c", type, status->st_mode & 07777, status->st_uid, status->st_gid,
           held < size ? held : size, path, '\0', target, '\0');
}

static int list(const char *path, dev_t device, int depth)
{
    struct stat status;
    struct dirent *entry;
    int error = 0;

    if (lstat(path, &status) != 0)
        return errno;
    print_entry(path, &status);
    if (!S_ISDIR(status.st_mode) || status.st_dev != device || depth > DEPTH_MOST)
        return 0;
    DIR *directory = opendir(path);
    if (directory == NULL)
        return errno;
    while (error == 0 && (entry = readdir(directory)) != NULL) {
        char below[PATH_MAX];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        const char *between = path[strlen(path) - 1] == '/' ? "" : "/";
        const int length = snprintf(below, sizeof below, "%s%s%s", path, between, entry->d_name);
        if (length > 0 && (size_t)length < sizeof below)
            error = list(below, device, depth + 1);
        if (error == ENOENT) /* gone since readdir() */
            error = 0;
    }
    closedir(directory);
    return error;
}

int files_command(char *const *argv)
{
    struct stat status;
    int error = EINVAL;

    if (strcmp(argv[0], "@sync") == 0) {
        sync();
        return 0;
    }
    if (argv[1] == NULL)
        return EINVAL;
    if (strcmp(argv[0], "@read") == 0)
        error = read_file(argv[1]);
    else if (strcmp(argv[0], "@pack") == 0)
        error = pack(argv[1], argv[2]);
    else if (strcmp(argv[0], "@unpack") == 0)
        error = unpack(argv[1], argv[2]);
    else if (strcmp(argv[0], "@list") == 0)
        error = lstat(argv[1], &status) != 0 ? errno : list(argv[1], status.st_dev, 0);
    if (fflush(stdout) != 0 && error == 0)
        error = errno;
    return error;
}
