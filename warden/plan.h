/*
 * The plan: what to do, in records. The warden reads nothing else and decides nothing else.
 *
 * A plan is a header (8 bytes of magic, u32 version, u32 count) and `count` records: u32 op, u32 size,
 * u64 a, b, c, d, then `size` bytes of payload, padded with zeros to a multiple of 8. All numbers are
 * in the machine's byte order. A second plan, the fragment, may follow with what differs from launch
 * to launch; of settings that can be given once the last wins, lists go on.
 */
#ifndef WARDEN_PLAN_H
#define WARDEN_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLAN_MAGIC "STKPLAN\n"
#define PLAN_VERSION 1U
#define PLAN_LIMIT (16U << 20) /* bytes */
#define RECORD_LIMIT 65536U
#define PASS_MOST 255U /* greatest number of a descriptor that is passed on */

enum op {
    OP_NAMESPACES = 1,    /* a: CLONE_NEW… flags */
    OP_MAP = 2,           /* a: 0 uid, 1 gid; b: id inside; c: id outside; d: count */
    OP_MAP_WAY = 3,       /* a: enum map_way */
    OP_MAP_HELPERS = 4,   /* paths of newuidmap and newgidmap */
    OP_HOSTNAME = 5,      /* name */
    OP_LOOPBACK = 6,      /* bring the interface lo up */
    OP_RLIMIT = 7,        /* a: resource; b: soft; c: hard */
    OP_IDS = 8,           /* a: uid; b: gid of the service */
    OP_GROUPS = 9,        /* payload: u32 gids */
    OP_CAPABILITIES = 10, /* a: mask of what the service may have */
    OP_UMASK = 11,        /* a */
    OP_DIRECTORY = 12,    /* working directory */
    OP_ARGV = 13,         /* the command */
    OP_ENV = 14,          /* one NAME=VALUE; a: 1 when the service's own pid is to follow it */
    OP_FORKS = 15,        /* the jail lives while any process does */
    OP_LIFELINE = 16,     /* the jail ends with its supervisor */
    OP_TERMINAL = 17,     /* a: rows; b: columns of a pty of the jail's own */
    OP_GATE = 18,         /* a: fd; wait for one byte before the exec; b: 1 when it is a socket, on which a message
                             MESSAGE_GO brings descriptors, for the service's numbers from 3 on, in place of OP_PASS */
    OP_STATUS = 19,       /* a: fd that gets the report lines */
    OP_STATE = 20,        /* a: fd of a file that keeps the report lines; its lock is held */
    OP_LOG = 21,          /* log file; a: size at which it is rotated; b: old ones kept */
    OP_PASS = 22,         /* a: fd outside; b: its number in the service */
    OP_CHROOT = 23,       /* directory: a plain chroot, no namespaces */
    OP_DETACH = 24,       /* go on in the background */
    OP_LEASH = 25,        /* a: fd of a pipe; the jail ends when its other end closes */
    OP_ON_FAILURE = 26,   /* command to become when the launch fails; the report line is added */
    OP_ENTER = 27,        /* a: pidfd of a process in the running jail whose namespaces are joined */
    OP_BASE = 28,         /* directory that relative sources start from; default: the plan's own */
    OP_EPHEMERAL = 29,    /* a: bytes; what is written to volumes goes to a tmpfs of that size */
    OP_CGROUP_DIR = 30,   /* directory to make; removed at the end unless a is 1 */
    OP_WRITE = 31,        /* file, value: written outside before the clone */
    OP_CGROUP_JOIN = 32,  /* cgroup.procs file that gets the pid of PID 1 */
    OP_REMOVE = 33,       /* file or empty directory to remove at the end */
    OP_HELPER = 34,       /* command run outside once the namespaces stand; `{pid}` is PID 1 */
    OP_SYSCTL = 35,       /* file, value: written by the jail's root before its mounts */
    OP_LANDLOCK = 36,     /* a: handled file access; b: network; c: scopes */
    OP_LANDLOCK_PATH = 37, /* path in the jail; a: access; b: 1 when it may be missing */
    OP_LANDLOCK_PORT = 38, /* a: access; b: port */
    OP_SECCOMP = 39,      /* a: flags; payload: struct sock_filter[] */
    OP_ROOT = 40,         /* source of `/`; a: enum tree_flag; b: MOUNT_ATTR_… */
    OP_BIND = 41,         /* source, target; a: enum tree_flag; b: MOUNT_ATTR_… */
    OP_MOUNT = 42,        /* type, target, options…; a: MOUNT_ATTR_…; b: enum tree_flag */
    OP_MKDIR = 43,        /* path; a: mode; b: uid; c: gid */
    OP_MKFILE = 44,       /* path of an empty file, to bind over */
    OP_SYMLINK = 45,      /* target, path */
    OP_READONLY = 46,     /* path to remount read-only; a: enum tree_flag */
    OP_LOG_SOCKET = 47,   /* path of a datagram socket that feeds the log */
    OP_HELPER_FD = 48,    /* a: fd that the helpers get; the jail does not */
    OP_RESTART = 49,      /* a: enum restart_when; b: first delay; c: longest; d: a life after which it is the first
                             again, all in ms; only for what goes on in the background */
    OP_AGAIN = 50,        /* a: restarts so far; b: delay before this one, in ms; c: where the state file's own lines
                             begin. From a supervisor to itself */
    OP_KEEP = 51,         /* a: fd that the supervisor holds as long as it lives; without a lifeline PID 1 as well */
    OP_INSTANCE = 52,     /* what `{instance}` in paths of control groups stands for; default: the supervisor's pid */
};

enum map_way { MAP_DIRECT = 0, MAP_HELPERS = 1, MAP_SINGLE = 2 };

enum restart_when { RESTART_ON_FAILURE = 1, RESTART_ALWAYS = 2 };

enum tree_flag {
    TREE_OWN = 1,       /* no symlink may lie on the source */
    TREE_IDMAP = 2,     /* idmapped through the jail's user namespace */
    TREE_SUBMOUNTS = 4, /* with what is mounted below */
    TREE_OPTIONAL = 8,  /* skip when source or target does not exist */
    TREE_VOLUME = 16,   /* state: may be made ephemeral; a directory, or a regular file with an ext4 file system in it */
    TREE_SIZED = 32,    /* a volume that must be such a file, for the sake of its size */
};

struct record {
    enum op op;
    uint32_t size;
    uint64_t a, b, c, d;
    const char *data;
};

struct plan {
    struct record *records;
    size_t count;
};

/* Appends the records in `bytes`, which must stay. Returns NULL, or what is wrong; errno is EINVAL or ENOMEM. */
const char *plan_parse(struct plan *plan, const char *bytes, size_t length);

/* The last record of that op, or NULL. */
const struct record *plan_last(const struct plan *plan, enum op op);

/* The next record of that op after `previous` (NULL: the first), or NULL. */
const struct record *plan_next(const struct plan *plan, enum op op, const struct record *previous);

/* The string after `string` in the record's payload, or NULL after the last. */
const char *plan_string(const struct record *record, const char *string);

/* Puts `value` for every `mark` in the records that name paths outside; exits through fail() without memory. */
void plan_fill(struct plan *plan, const char *mark, const char *value);

/* The payload's strings as a NULL-terminated vector; exits through fail() without memory. */
char **plan_strings(const struct record *record);

#endif
