#define _GNU_SOURCE
#include "attend.h"

#include "report.h"
#include "sys.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define TUN "/dev/net/tun"
#define TUN_MAJOR 10
#define TUN_MINOR 200

struct target {
    long pid;
    int pidfd, net;
};

/* The jail's ids may not open a 0600 node; where root started the jail, its helper sees one that they may. */
static void open_tun_to_all(void)
{
    struct stat status;

    if (geteuid() != 0 || stat(TUN, &status) != 0 || (status.st_mode & 0006) == 0006)
        return;
    if (sys_unshare(NEW_NS) != 0 || sys_mount_propagation("/", PROPAGATION_RECURSIVE | PROPAGATION_PRIVATE) != 0)
        fail("attend mount namespace", "/");
    umask(0);
    if (mount("none", "/dev/net", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,nr_inodes=4,size=4k") != 0 ||
        mknod(TUN, S_IFCHR | 0666, makedev(TUN_MAJOR, TUN_MINOR)) != 0)
        fail("attend tun", TUN);
    umask(022);
}

/* The first id that the namespace has: root's, or the only one. */
static uint32_t first_id(long pid, const char *map)
{
    char path[64], text[64] = "";

    snprintf(path, sizeof path, "/proc/%ld/%s", pid, map);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
        fail("attend ids", path);
    close(fd);
    return (uint32_t)strtoul(text, NULL, 10);
}

static void become_first_of(int pidfd, long pid)
{
    const uid_t uid = first_id(pid, "uid_map");
    const gid_t gid = first_id(pid, "gid_map");

    if (geteuid() == 0 && setgroups(0, NULL) != 0)
        fail("attend setgroups", "");
    if (sys_setns(pidfd, NEW_USER) != 0)
        fail("attend setns user", "");
    if (setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0)
        fail("attend ids", "");
    if (uid == 0)
        return;
    /* With one id there is no root in there: the capabilities of the namespace go on as ambient ones. */
    if (sys_capset(UINT64_MAX >> 23, UINT64_MAX >> 23) != 0)
        fail("attend capset", "");
    for (unsigned long capability = 0; capability < CAPABILITY_LIMIT; capability++)
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0)
            break;
}

/* Reaps. True once no other process is left in this namespace. */
static bool is_alone(void)
{
    pid_t pid;

    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        continue;
    return pid < 0;
}

static void woken(int number)
{
    (void)number; /* it only interrupts the wait */
}

static _Noreturn void keep(int pidfd, int ready, char **command)
{
    const struct sigaction wake = {.sa_handler = woken};
    struct pollfd watched = {.fd = pidfd, .events = POLLIN};
    sigset_t child, before;
    int status = 0;
    const pid_t pid = fork();

    if (pid < 0)
        fail("attend fork", command[0]);
    if (pid == 0) {
        execvp(command[0], command);
        fail("exec", command[0]);
    }
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            fail("attend wait", command[0]);
    const unsigned char code = (unsigned char)(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    if (write(ready, &code, 1) != 1 || code != 0)
        _exit(code);
    /* What it left in the background is this namespace's to reap, and the kernel's to end when this ends. Once nothing
     * is left, this ends too: whoever started the attendant is to see it. */
    setsid();
    keep_only(&pidfd, 1);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, &before);
    sigdelset(&before, SIGCHLD);
    sigaction(SIGCHLD, &wake, NULL);
    while (!is_alone() && ppoll(&watched, 1, NULL, &before) < 0)
        continue;
    _exit(0);
}

/* The jail's first process by its number, and its network namespace, which the caller may open only as it is now. */
static struct target target_of(int argc, char **argv)
{
    char net[32], *end;

    if (argc < 2) {
        errno = EINVAL;
        fail("attend arguments", "");
    }
    const long pid = strtol(argv[0], &end, 10);
    const int pidfd = (int)syscall(SYS_pidfd_open, pid, 0U);
    if (*end != '\0' || pidfd < 0)
        fail("attend pidfd_open", argv[0]);
    snprintf(net, sizeof net, "/proc/%ld/ns/net", pid);
    const int namespace = open(net, O_RDONLY); /* a command that is kept gets it */
    if (namespace < 0)
        fail("attend network namespace", net);
    return (struct target){pid, pidfd, namespace};
}

int within(int argc, char **argv)
{
    const struct target target = target_of(argc, argv);

    become_first_of(target.pidfd, target.pid);
    if (sys_setns(target.net, NEW_NET) != 0)
        fail("attend setns net", "");
    close(target.net);
    execvp(argv[1], argv + 1);
    fail("exec", argv[1]);
}

int attend(int argc, char **argv)
{
    const struct target target = target_of(argc, argv);
    char net[32];
    int ready[2];
    unsigned char code = EXIT_WALLS;

    if (pipe2(ready, O_CLOEXEC) != 0)
        fail("attend pipe", "");
    snprintf(net, sizeof net, "/proc/self/fd/%d", target.net);
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "{net}") == 0)
            argv[i] = net;
    open_tun_to_all();
    become_first_of(target.pidfd, target.pid);
    if (sys_unshare(NEW_PID) != 0)
        fail("attend pid namespace", "");
    const pid_t keeper = fork();
    if (keeper < 0)
        fail("attend fork", argv[1]);
    if (keeper == 0)
        keep(target.pidfd, ready[1], argv + 1);
    close(ready[1]);
    if (read(ready[0], &code, 1) != 1)
        code = EXIT_WALLS;
    return code;
}
