#define _GNU_SOURCE
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "image.h"
#include "report.h"
#include "sys.h"
#include "util.h"

static bool is_tree(const struct record *record)
{
    return record->op == OP_ROOT || record->op == OP_BIND;
}

/* A volume with a size is a file system in a file. One that has no such file must not be mounted without its limit. */
static bool is_image(const struct record *record, int path)
{
    struct stat status;

    if ((record->a & TREE_VOLUME) == 0)
        return false;
    if (fstat(path, &status) != 0)
        fail("volume", record->data);
    if (S_ISREG(status.st_mode))
        return true;
    if ((record->a & TREE_SIZED) != 0) {
        errno = EISDIR;
        fail("volume", record->data);
    }
    return false;
}

static int tree_open(const struct record *record, int base, int userns)
{
    const char *source = record->data;
    const bool submounts = (record->a & TREE_SUBMOUNTS) != 0;
    const uint64_t resolve = (record->a & TREE_OWN) != 0 ? RESOLVE_NO_SYMLINKS : 0;
    struct mount_attributes attributes = {.set = record->b, .propagation = PROPAGATION_PRIVATE};

    const int path = sys_openat2(base, source, O_PATH | O_CLOEXEC, resolve);
    if (path < 0 && errno == ENOENT && (record->a & TREE_OPTIONAL) != 0)
        return -1;
    if (path < 0)
        fail("source", source);
    if (is_image(record, path)) {
        const int mounted = image_mount(path, source, record->b);
        close(path);
        return mounted;
    }
    const int tree = sys_open_tree(path, "", TREE_CLONE | TREE_CLOEXEC | (submounts ? TREE_RECURSIVE : 0U));
    if (tree < 0)
        fail("open_tree", source);
    if ((record->b & ATTR_NOATIME) != 0)
        attributes.clear = ATTR_ATIME;
    if ((record->a & TREE_IDMAP) != 0) {
        attributes.set |= ATTR_IDMAP;
        attributes.userns = (uint64_t)userns; /* -1 is EBADF: never mounted without the map */
    }
    if (sys_mount_setattr(tree, submounts, &attributes) != 0)
        fail((record->a & TREE_IDMAP) != 0 ? "idmap" : "mount_setattr", source);
    close(path);
    return tree;
}

int *trees_open(const struct plan *plan, const char *base, int userns, size_t *count)
{
    const int start = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int *trees = calloc(plan->count + 1, sizeof *trees);

    if (trees == NULL)
        fail("memory", "");
    if (start < 0)
        fail("source", base);
    *count = 0;
    for (size_t i = 0; i < plan->count; i++)
        if (is_tree(&plan->records[i]))
            trees[(*count)++] = tree_open(&plan->records[i], start, userns);
    close(start);
    return trees;
}

/* Every name is resolved inside the new root: a symlink in it, absolute or with `..`, cannot lead out. */
static int inside(int root, const char *path, int flags)
{
    return sys_openat2(root, path, flags | O_CLOEXEC, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
}

static int need_inside(int root, const char *step, const char *path, int flags)
{
    const int fd = inside(root, path, flags);

    if (fd < 0)
        fail(step, path);
    return fd;
}

/* The directory that holds `path`, and the last component's name. */
static int parent_of(int root, const char *step, const char *path, const char **name)
{
    char directory[PATH_MAX];
    const char *slash = strrchr(path, '/');

    if (slash == NULL || slash[1] == '\0' || (size_t)(slash - path) + 2 > sizeof directory) {
        errno = EINVAL;
        fail(step, path);
    }
    *name = slash + 1;
    memcpy(directory, path, (size_t)(slash - path) + 1);
    directory[slash - path + 1] = '\0';
    return need_inside(root, step, directory, O_PATH | O_DIRECTORY);
}

static void attach(int tree, int target, const char *path)
{
    if (sys_move_mount(tree, target) != 0)
        fail("mount", path);
}

static void option(int context, const char *text, const char *path)
{
    char key[64];
    const char *equals = strchr(text, '=');
    const size_t length = equals == NULL ? strlen(text) : (size_t)(equals - text);

    if (length >= sizeof key) {
        errno = EINVAL;
        fail("mount", path);
    }
    memcpy(key, text, length);
    key[length] = '\0';
    if (sys_fsconfig(context, key, equals == NULL ? NULL : equals + 1) != 0)
        fail("mount", path);
}

static int filesystem(const char *type, const char *const *options, unsigned attributes, const char *path)
{
    const int context = sys_fsopen(type);

    if (context < 0)
        fail("mount", path);
    for (; *options != NULL; options++)
        option(context, *options, path);
    if (sys_fsconfig(context, NULL, NULL) != 0)
        fail("mount", path);
    const int tree = sys_fsmount(context, attributes);
    if (tree < 0)
        fail("mount", path);
    close(context);
    return tree;
}

static void make_mount(int root, const struct record *record)
{
    const char *type = record->data, *path = plan_string(record, type);
    char **strings = plan_strings(record);
    const int target = inside(root, path, O_PATH);

    if (target < 0 && errno == ENOENT && (record->b & TREE_OPTIONAL) != 0) {
        free(strings);
        return;
    }
    if (target < 0)
        fail("mount", path);
    const int tree = filesystem(type, (const char *const *)strings + 2, (unsigned)record->a, path);

    attach(tree, target, path);
    close(tree);
    close(target);
    free(strings);
}

/* The lower layer must be mounted in this namespace while the overlay is made (clone_private_mount in the kernel),
 * so it stands for that moment on the scratch tmpfs that keeps what is written. */
static int overlay(int scratch, int lower, uint64_t size, const char *path)
{
    char limit[40], layers[3][64];
    const char *const none[] = {limit, "mode=0700", NULL};
    const char *const options[] = {layers[0], layers[1], layers[2], "userxattr", NULL};
    struct stat status;

    snprintf(limit, sizeof limit, "size=%llu", (unsigned long long)size);
    const int store = filesystem("tmpfs", none, ATTR_NOSUID | ATTR_NODEV, path);
    attach(store, scratch, path);
    if (mkdirat(store, "lower", 0700) != 0 || mkdirat(store, "upper", 0700) != 0 || mkdirat(store, "work", 0700) != 0)
        fail("overlay", path);
    const int place = openat(store, "lower", O_PATH | O_CLOEXEC);
    const int upper = openat(store, "upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const int work = openat(store, "work", O_PATH | O_CLOEXEC);
    if (place < 0 || upper < 0 || work < 0 || fstat(lower, &status) != 0 ||
        fchown(upper, status.st_uid, status.st_gid) != 0 || fchmod(upper, status.st_mode & 07777) != 0)
        fail("overlay", path);
    attach(lower, place, path);
    snprintf(layers[0], sizeof layers[0], "lowerdir=/proc/self/fd/%d", lower);
    snprintf(layers[1], sizeof layers[1], "upperdir=/proc/self/fd/%d", upper);
    snprintf(layers[2], sizeof layers[2], "workdir=/proc/self/fd/%d", work);
    const int tree = filesystem("overlay", options, ATTR_NOSUID | ATTR_NODEV, path);
    close(work);
    close(upper);
    close(place);
    close(store);
    return tree;
}

static void make_bind(int root, const struct record *record, int tree, uint64_t ephemeral)
{
    const char *path = plan_string(record, record->data);

    if (tree < 0)
        return;
    const int target = inside(root, path, O_PATH);
    if (target < 0 && errno == ENOENT && (record->a & TREE_OPTIONAL) != 0) {
        close(tree);
        return;
    }
    if (target < 0)
        fail("mount", path);
    if ((record->a & TREE_VOLUME) != 0 && ephemeral > 0) {
        const int merged = overlay(target, tree, ephemeral, path);
        attach(merged, target, path);
        close(merged);
    } else {
        attach(tree, target, path);
    }
    close(tree);
    close(target);
}

static void make_directory(int root, const struct record *record)
{
    const char *name;
    const int parent = parent_of(root, "mkdir", record->data, &name);

    if (mkdirat(parent, name, 0700) != 0 && errno != EEXIST)
        fail("mkdir", record->data);
    const int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    /* chown clears setgid, so the mode comes after it. */
    if (fd < 0 || fchown(fd, (uid_t)record->b, (gid_t)record->c) != 0 || fchmod(fd, (mode_t)record->a) != 0)
        fail("mkdir", record->data);
    close(fd);
    close(parent);
}

static void make_file(int root, const struct record *record)
{
    const char *name;
    const int parent = parent_of(root, "mkfile", record->data, &name);
    const int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0444);

    if (fd < 0)
        fail("mkfile", record->data);
    close(fd);
    close(parent);
}

static void make_symlink(int root, const struct record *record)
{
    const char *path = plan_string(record, record->data), *name;
    const int parent = parent_of(root, "symlink", path, &name);

    if (symlinkat(record->data, parent, name) != 0)
        fail("symlink", path);
    close(parent);
}

static void make_readonly(int root, const struct record *record)
{
    const struct mount_attributes attributes = {.set = ATTR_RDONLY};
    const int target = inside(root, record->data, O_PATH);

    if (target < 0 && errno == ENOENT && (record->a & TREE_OPTIONAL) != 0)
        return;
    if (target < 0)
        fail("read-only", record->data);
    if (sys_mount_setattr(target, false, &attributes) != 0) {
        /* EINVAL: no mount's root, so it becomes one. */
        const int tree = errno == EINVAL ? sys_open_tree(target, "", TREE_CLONE | TREE_CLOEXEC) : -1;
        if (tree < 0 || sys_mount_setattr(tree, false, &attributes) != 0 || sys_move_mount(tree, target) != 0)
            fail("read-only", record->data);
        close(tree);
    }
    close(target);
}

static void make_log_socket(int root, const struct record *record, int channel)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *name;
    const int parent = parent_of(root, "log socket", record->data, &name);
    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (strlen(name) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        fail("log socket", record->data);
    }
    memcpy(address.sun_path, name, strlen(name) + 1);
    /* Any uid of the jail may log; the umask is 0 here. */
    if (fd < 0 || fchdir(parent) != 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0)
        fail("log socket", record->data);
    channel_send(channel, MESSAGE_LOG_SOCKET, 0, "", 0, &fd, 1);
    close(fd);
    close(parent);
}

static int make_root(const struct record *record, int tree)
{
    const int slash = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);

    if (slash < 0)
        fail("root", record->data);
    attach(tree, slash, record->data);
    close(slash);
    return tree;
}

static void pivot(int root)
{
    char place[PATH_MAX];

    if (fchdir(root) != 0 || sys_pivot_root(".", ".") != 0)
        fail("pivot_root", "/");
    if (sys_umount2(".", UMOUNT_DETACH) != 0)
        fail("umount", "old root");
    if (chdir("/") != 0)
        fail("chdir", "/");
    /* A directory outside of the root reads as "(unreachable)" (getcwd(2)). */
    errno = EXDEV;
    if (getcwd(place, sizeof place) == NULL || strcmp(place, "/") != 0)
        fail("getcwd", "/");
    close(root);
}

void mounts_make(const struct plan *plan, const int *trees, uint64_t ephemeral, int channel)
{
    int root = -1;
    size_t tree = 0;

    umask(0);
    if (sys_mount_propagation("/", PROPAGATION_RECURSIVE | PROPAGATION_PRIVATE) != 0)
        fail("propagation", "/");
    for (const struct record *record = plan->records; record < plan->records + plan->count; record++) {
        switch (record->op) {
        case OP_ROOT:
            root = make_root(record, trees[tree++]);
            break;
        case OP_BIND:
            make_bind(root, record, trees[tree++], ephemeral);
            break;
        case OP_MOUNT:
            make_mount(root, record);
            break;
        case OP_MKDIR:
            make_directory(root, record);
            break;
        case OP_MKFILE:
            make_file(root, record);
            break;
        case OP_SYMLINK:
            make_symlink(root, record);
            break;
        case OP_READONLY:
            make_readonly(root, record);
            break;
        case OP_LOG_SOCKET:
            make_log_socket(root, record, channel);
            break;
        default:
            break;
        }
    }
    pivot(root);
}

void mounts_add(const struct plan *plan, int root)
{
    const mode_t mask = umask(0);

    for (const struct record *record = plan->records; record < plan->records + plan->count; record++)
        switch (record->op) {
        case OP_MOUNT:
            make_mount(root, record);
            break;
        case OP_MKDIR:
            make_directory(root, record);
            break;
        case OP_SYMLINK:
            make_symlink(root, record);
            break;
        case OP_READONLY:
            make_readonly(root, record);
            break;
        default:
            break;
        }
    umask(mask);
}
