#define _GNU_SOURCE
#include "image.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "report.h"
#include "sys.h"

#define DEVICES "/sys/block"
#define CONTROL "/dev/loop-control"
#define ATTEMPTS 64 /* somebody else may take the free device first */

/* include/uapi/linux/loop.h; musl ships without the kernel's headers. */
#define LOOP_GET_STATUS64 0x4C05
#define LOOP_CONFIGURE 0x4C0A
#define LOOP_CTL_GET_FREE 0x4C82
#define LO_FLAGS_AUTOCLEAR 4U

struct loop_info64 {
    uint64_t device, inode, rdevice, offset, sizelimit;
    uint32_t number, encrypt_type, encrypt_key_size, flags;
    char file_name[64], crypt_name[64], encrypt_key[32];
    uint64_t init[2];
};

struct loop_config {
    uint32_t fd, block_size;
    struct loop_info64 info;
    uint64_t reserved[8];
};

struct loop {
    int fd;
    char name[32];
};

/* A descriptor of its own: the loop device keeps the one that it was given, with any lock on it. */
static int reopened(int path, const char *source, int flags)
{
    char name[40];

    snprintf(name, sizeof name, "/proc/self/fd/%d", path);
    const int fd = open(name, flags | O_CLOEXEC);
    if (fd < 0)
        fail("volume", source);
    return fd;
}

/* Whether the loop device is bound to that file. Once it is open it stays so: the last close lets go. */
static bool is_bound_to(int fd, const struct stat *file)
{
    struct loop_info64 info;

    memset(&info, 0, sizeof info);
    return ioctl(fd, LOOP_GET_STATUS64, &info) == 0 && info.inode == file->st_ino &&
           info.device == (uint64_t)file->st_dev;
}

/* The device that some other mount of the file has; two devices on one file would destroy what is in it. */
static bool find_bound(struct loop *loop, const struct stat *file)
{
    DIR *devices = opendir(DEVICES);
    const struct dirent *entry;
    char bound[sizeof DEVICES + 300];
    bool found = false;

    if (devices == NULL)
        fail("loop device", DEVICES);
    while (!found && (entry = readdir(devices)) != NULL) {
        if (strncmp(entry->d_name, "loop", 4) != 0 || strlen(entry->d_name) > 16)
            continue;
        snprintf(bound, sizeof bound, DEVICES "/%s/loop/backing_file", entry->d_name);
        if (access(bound, F_OK) != 0)
            continue;
        snprintf(loop->name, sizeof loop->name, "/dev/%.16s", entry->d_name);
        loop->fd = open(loop->name, O_RDONLY | O_CLOEXEC);
        if (loop->fd < 0)
            continue;
        found = is_bound_to(loop->fd, file);
        if (!found)
            close(loop->fd);
    }
    closedir(devices);
    return found;
}

static void bind_free(struct loop *loop, int path, const char *source)
{
    const int control = open(CONTROL, O_RDWR | O_CLOEXEC);
    struct loop_config config;

    if (control < 0)
        fail("loop device", CONTROL);
    memset(&config, 0, sizeof config);
    config.fd = (uint32_t)reopened(path, source, O_RDWR);
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    snprintf(config.info.file_name, sizeof config.info.file_name, "%s", source);
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        const int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0)
            fail("loop device", CONTROL);
        snprintf(loop->name, sizeof loop->name, "/dev/loop%d", number);
        loop->fd = open(loop->name, O_RDWR | O_CLOEXEC);
        if (loop->fd < 0)
            fail("loop device", loop->name);
        if (ioctl(loop->fd, LOOP_CONFIGURE, &config) == 0) {
            close((int)config.fd);
            close(control);
            return;
        }
        if (errno != EBUSY)
            fail("loop device", loop->name);
        close(loop->fd);
    }
    errno = EBUSY;
    fail("loop device", CONTROL);
}

static int mount_ext4(const char *device, const char *source, uint64_t attributes)
{
    const int context = sys_fsopen("ext4");

    if (context < 0 || sys_fsconfig(context, "source", device) != 0 ||
        sys_fsconfig(context, "errors", "remount-ro") != 0 || sys_fsconfig(context, NULL, NULL) != 0)
        fail("volume", source);
    const int tree = sys_fsmount(context, (unsigned)attributes);
    if (tree < 0)
        fail("volume", source);
    close(context);
    return tree;
}

int image_mount(int path, const char *source, uint64_t attributes)
{
    struct loop loop;
    struct stat file;
    const int lock = reopened(path, source, O_RDONLY);

    if (fstat(lock, &file) != 0)
        fail("volume", source);
    /* Between looking for a device and having the file mounted nobody else may do the same. */
    while (flock(lock, LOCK_EX) != 0)
        if (errno != EINTR)
            fail("volume", source);
    if (!find_bound(&loop, &file))
        bind_free(&loop, path, source);
    const int tree = mount_ext4(loop.name, source, attributes);
    close(loop.fd);
    close(lock);
    return tree;
}
