/*
 * One thin wrapper for each system call that libc has no function for, named as in man(2). Nothing
 * here knows what a jail is. The constants stand here because musl ships without the kernel's headers.
 */
#ifndef WARDEN_SYS_H
#define WARDEN_SYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define NEW_NS 0x00020000U
#define NEW_CGROUP 0x02000000U
#define NEW_UTS 0x04000000U
#define NEW_IPC 0x08000000U
#define NEW_USER 0x10000000U
#define NEW_PID 0x20000000U
#define NEW_NET 0x40000000U

#define RESOLVE_NO_MAGICLINKS 0x02U
#define RESOLVE_NO_SYMLINKS 0x04U
#define RESOLVE_IN_ROOT 0x10U

#define TREE_CLONE 1U
#define TREE_CLOEXEC 02000000U
#define TREE_RECURSIVE 0x8000U

#define ATTR_RDONLY 0x01U
#define ATTR_NOSUID 0x02U
#define ATTR_NODEV 0x04U
#define ATTR_NOEXEC 0x08U
#define ATTR_NOATIME 0x10U
#define ATTR_ATIME 0x70U /* cleared where one of the ways to keep times of access is set (mount_setattr(2)) */
#define ATTR_IDMAP 0x00100000U

#define PROPAGATION_RECURSIVE 0x4000UL
#define PROPAGATION_PRIVATE 0x40000UL
#define UMOUNT_DETACH 2

#define CAPABILITY_KILL 5
#define CAPABILITY_LIMIT 64

struct mount_attributes {
    uint64_t set, clear, propagation, userns;
};

struct landlock_handled {
    uint64_t fs, net, scoped;
};

int sys_openat2(int directory, const char *path, int flags, uint64_t resolve);
int sys_open_tree(int directory, const char *path, unsigned flags);
int sys_move_mount(int from, int to);
int sys_mount_setattr(int tree, bool recursive, const struct mount_attributes *attributes);
int sys_fsopen(const char *type);
int sys_fsconfig(int context, const char *key, const char *value);
int sys_fsmount(int context, unsigned attributes);
int sys_pivot_root(const char *new_root, const char *put_old);
int sys_umount2(const char *path, int flags);
int sys_mount_propagation(const char *path, unsigned long flags);
int sys_close_range(unsigned first, unsigned last);
pid_t sys_clone(unsigned flags);
int sys_setns(int fd, unsigned flags);
int sys_unshare(unsigned flags);
int sys_memfd_create(const char *name);
int sys_execveat(int fd, char *const *argv, char *const *environment);
int sys_keyctl_join_session(void);
int sys_signal_default(int number);
int sys_capset(uint64_t permitted, uint64_t inheritable);
int sys_landlock_create(const struct landlock_handled *handled);
int sys_landlock_add_path(int ruleset, uint64_t access, int path);
int sys_landlock_add_port(int ruleset, uint64_t access, uint64_t port);
int sys_landlock_restrict_self(int ruleset);
int sys_seccomp_filter(unsigned flags, const void *program, unsigned short instructions);

#endif
