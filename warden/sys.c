#define _GNU_SOURCE
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Generic call numbers, the same on every architecture since Linux 5.1; musl 1.2.3 lacks some names. */
#define NR_OPEN_TREE 428
#define NR_MOVE_MOUNT 429
#define NR_FSOPEN 430
#define NR_FSCONFIG 431
#define NR_FSMOUNT 432
#define NR_CLOSE_RANGE 436
#define NR_OPENAT2 437
#define NR_MOUNT_SETATTR 442
#define NR_LANDLOCK_CREATE 444
#define NR_LANDLOCK_ADD 445
#define NR_LANDLOCK_RESTRICT 446

#define MOVE_EMPTY_PATHS (0x04U | 0x40U) /* MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH */
#define FSCONFIG_FLAG 0U
#define FSCONFIG_STRING 1U
#define FSCONFIG_CREATE 6U
#define KEYCTL_JOIN 1
#define SECCOMP_FILTER_MODE 1U
#define LANDLOCK_PATH_BENEATH 1
#define LANDLOCK_NET_PORT 2
#define MEMFD_CLOEXEC 1U
#define MEMFD_SEALABLE 2U
#define MEMFD_EXECUTABLE 0x10U

int sys_openat2(int directory, const char *path, int flags, uint64_t resolve)
{
    const struct { uint64_t flags, mode, resolve; } how = {(uint64_t)flags, 0, resolve};
    int fd;

    /* EAGAIN: a rename elsewhere raced with the walk (openat2(2)). */
    do
        fd = (int)syscall(NR_OPENAT2, directory, path, &how, sizeof how);
    while (fd < 0 && (errno == EAGAIN || errno == EINTR));
    return fd;
}

int sys_open_tree(int directory, const char *path, unsigned flags)
{
    return (int)syscall(NR_OPEN_TREE, directory, path, flags | (*path == '\0' ? (unsigned)AT_EMPTY_PATH : 0U));
}

int sys_move_mount(int from, int to)
{
    return (int)syscall(NR_MOVE_MOUNT, from, "", to, "", MOVE_EMPTY_PATHS);
}

int sys_mount_setattr(int tree, bool recursive, const struct mount_attributes *attributes)
{
    const unsigned flags = (unsigned)AT_EMPTY_PATH | (recursive ? TREE_RECURSIVE : 0U);

    return (int)syscall(NR_MOUNT_SETATTR, tree, "", flags, attributes, sizeof *attributes);
}

int sys_fsopen(const char *type)
{
    return (int)syscall(NR_FSOPEN, type, 1U /* FSOPEN_CLOEXEC */);
}

/* No key: create the superblock. No value: a flag. */
int sys_fsconfig(int context, const char *key, const char *value)
{
    const unsigned command = key == NULL ? FSCONFIG_CREATE : value == NULL ? FSCONFIG_FLAG : FSCONFIG_STRING;

    return (int)syscall(NR_FSCONFIG, context, command, key, value, 0);
}

int sys_fsmount(int context, unsigned attributes)
{
    return (int)syscall(NR_FSMOUNT, context, 1U /* FSMOUNT_CLOEXEC */, attributes);
}

int sys_pivot_root(const char *new_root, const char *put_old)
{
    return (int)syscall(SYS_pivot_root, new_root, put_old);
}

int sys_umount2(const char *path, int flags)
{
    return (int)syscall(SYS_umount2, path, flags);
}

int sys_mount_propagation(const char *path, unsigned long flags)
{
    return (int)syscall(SYS_mount, NULL, path, NULL, flags, NULL);
}

int sys_close_range(unsigned first, unsigned last)
{
    return (int)syscall(NR_CLOSE_RANGE, first, last, 0U);
}

/* As fork(2), into new namespaces. The zeros stand for stack, tids and tls in every argument order. */
pid_t sys_clone(unsigned flags)
{
    return (pid_t)syscall(SYS_clone, (unsigned long)flags | (unsigned long)SIGCHLD, 0UL, 0UL, 0UL, 0UL);
}

int sys_setns(int fd, unsigned flags)
{
    return (int)syscall(SYS_setns, fd, flags);
}

int sys_unshare(unsigned flags)
{
    return (int)syscall(SYS_unshare, flags);
}

int sys_memfd_create(const char *name)
{
    int fd = (int)syscall(SYS_memfd_create, name, MEMFD_CLOEXEC | MEMFD_SEALABLE | MEMFD_EXECUTABLE);

    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 every memfd is executable */
        fd = (int)syscall(SYS_memfd_create, name, MEMFD_CLOEXEC | MEMFD_SEALABLE);
    return fd;
}

int sys_execveat(int fd, char *const *argv, char *const *environment)
{
    return (int)syscall(SYS_execveat, fd, "", argv, environment, AT_EMPTY_PATH);
}

int sys_keyctl_join_session(void)
{
    return (int)syscall(SYS_keyctl, KEYCTL_JOIN, NULL, 0, 0, 0);
}

/* libc keeps some signals to itself and refuses to reset them. */
int sys_signal_default(int number)
{
    const struct { unsigned long handler, flags, restorer; uint64_t mask; } action = {0, 0, 0, 0};

    return (int)syscall(SYS_rt_sigaction, number, &action, NULL, sizeof action.mask);
}

int sys_capset(uint64_t permitted, uint64_t inheritable)
{
    struct { uint32_t version; int pid; } header = {0x20080522U, 0}; /* _LINUX_CAPABILITY_VERSION_3 */
    struct { uint32_t effective, permitted, inheritable; } data[2];

    for (unsigned half = 0; half < 2; half++) {
        data[half].effective = data[half].permitted = (uint32_t)(permitted >> (32 * half));
        data[half].inheritable = (uint32_t)(inheritable >> (32 * half));
    }
    return (int)syscall(SYS_capset, &header, data);
}

/* The shortest structure that says it all: older kernels refuse a longer one only where it is not zero. */
int sys_landlock_create(const struct landlock_handled *handled)
{
    const size_t fields = handled->scoped != 0 ? 3 : handled->net != 0 ? 2 : 1;

    return (int)syscall(NR_LANDLOCK_CREATE, handled, fields * sizeof(uint64_t), 0U);
}

int sys_landlock_add_path(int ruleset, uint64_t access, int path)
{
    const struct { uint64_t access; int32_t fd; } __attribute__((packed)) rule = {access, path};

    return (int)syscall(NR_LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, &rule, 0U);
}

int sys_landlock_add_port(int ruleset, uint64_t access, uint64_t port)
{
    const struct { uint64_t access, port; } rule = {access, port};

    return (int)syscall(NR_LANDLOCK_ADD, ruleset, LANDLOCK_NET_PORT, &rule, 0U);
}

int sys_landlock_restrict_self(int ruleset)
{
    return (int)syscall(NR_LANDLOCK_RESTRICT, ruleset, 0U);
}

int sys_seccomp_filter(unsigned flags, const void *program, unsigned short instructions)
{
    const struct { unsigned short length; const void *filter; } filter = {instructions, program};

    return (int)syscall(SYS_seccomp, SECCOMP_FILTER_MODE, flags, &filter);
}
