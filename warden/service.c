#define _GNU_SOURCE
#include "service.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "report.h"
#include "sys.h"
#include "util.h"

#define PTY_PEER 0x5441UL /* TIOCGPTPEER */
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define PASS_LIMIT 32

void refuse_directories(const int *fds, size_t count)
{
    char text[24];
    struct stat status;

    for (size_t i = 0; i < count; i++) {
        if (fstat(fds[i], &status) != 0)
            fail("descriptors", decimal((uint64_t)fds[i], text));
        if (S_ISDIR(status.st_mode)) {
            errno = EISDIR;
            fail("descriptors", decimal((uint64_t)fds[i], text));
        }
    }
}

void become_jail_root(const struct settings *settings)
{
    /* The one id is no root, so its capabilities stay (capabilities(7), "Effect of user ID changes"). */
    if (settings->single) {
        if (setresgid(settings->gid, settings->gid, settings->gid) != 0 ||
            setresuid(settings->uid, settings->uid, settings->uid) != 0)
            fail("jail id", "");
        return;
    }
    if (setgroups(0, NULL) != 0)
        fail("groups", "jail root");
    if (setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0)
        fail("jail root", "0");
}

/* The pty comes from the jail's own devpts: with the host's, `tty` says "not a tty". */
static void own_terminal(const struct settings *settings, int channel)
{
    const struct winsize size = {.ws_row = settings->rows, .ws_col = settings->columns};
    int unlock = 0;

    const int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) != 0 || ioctl(master, TIOCSWINSZ, &size) != 0)
        fail("terminal", "/dev/ptmx");
    const int slave = ioctl(master, PTY_PEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0 || fchown(slave, settings->uid, (gid_t)-1) != 0 || ioctl(slave, TIOCSCTTY, 0) != 0)
        fail("terminal", "/dev/pts");
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (dup2(slave, fd) < 0)
            fail("terminal", "/dev/pts");
    channel_send(channel, MESSAGE_TERMINAL, 0, "", 0, &master, 1);
    close(slave);
    close(master);
}

/* In two passes, because the number that one fd goes to may be another's source. Everything else that is still
 * open closes at the exec. */
static void pass_descriptors(const struct plan *plan, int *gate)
{
    const struct record *record = NULL;
    int high[PASS_LIMIT];
    size_t count = 0;

    if (!settings_numbered(plan))
        return;
    if (*gate >= 0) {
        *gate = fcntl(*gate, F_DUPFD_CLOEXEC, PASS_MOST + 1);
        if (*gate < 0)
            fail("descriptors", "gate");
    }
    while ((record = plan_next(plan, OP_PASS, record)) != NULL && count < PASS_LIMIT) {
        high[count] = fcntl((int)record->a, F_DUPFD_CLOEXEC, PASS_MOST + 1);
        if (high[count++] < 0)
            fail("descriptors", "pass");
    }
    record = NULL;
    for (size_t i = 0; i < count; i++) {
        record = plan_next(plan, OP_PASS, record);
        if (dup2(high[i], (int)record->b) < 0)
            fail("descriptors", "pass");
    }
}

static void close_unpassed(const struct plan *plan, int channel, int gate)
{
    int kept[PASS_LIMIT + 5] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO, channel, gate};
    const struct record *record = NULL;
    size_t count = gate < 0 ? 4 : 5;

    while ((record = plan_next(plan, OP_PASS, record)) != NULL && count < PASS_LIMIT + 5)
        kept[count++] = (int)record->b;
    keep_only(kept, count);
}

/* By the words of a spec. */
static const char *limit_name(uint64_t resource)
{
    switch (resource) {
    case RLIMIT_NOFILE:
        return "open_files";
    case RLIMIT_FSIZE:
        return "file_size";
    case RLIMIT_NPROC:
        return "processes";
    default:
        return "core";
    }
}

/* All but a limit of open files that is `held` or less. */
static void limits(const struct plan *plan, uint64_t held)
{
    const struct record *record = NULL;

    while ((record = plan_next(plan, OP_RLIMIT, record)) != NULL) {
        if (record->a == RLIMIT_NOFILE && record->b <= held)
            continue;
        struct rlimit limit = {.rlim_cur = record->b, .rlim_max = record->c}, now;
#ifdef __GLIBC__
        const __rlimit_resource_t resource = (__rlimit_resource_t)record->a;
#else
        const int resource = (int)record->a;
#endif
        /* Whoever may leave no core at all, as under sudo(8), has the stricter limit already. */
        if (record->a == RLIMIT_CORE && getrlimit(resource, &now) == 0 && now.rlim_max < limit.rlim_max)
            limit = now;
        if (setrlimit(resource, &limit) != 0)
            fail("rlimit", limit_name(record->a));
    }
}

/* Rules are gathered while every directory can still be reached, and come into force later. -1: no Landlock. */
static int landlock_rules(const struct plan *plan)
{
    const struct record *record = plan_last(plan, OP_LANDLOCK);

    if (record == NULL)
        return -1;
    const struct landlock_handled handled = {record->a, record->b, record->c};
    const int ruleset = sys_landlock_create(&handled);
    if (ruleset < 0)
        fail("landlock", "create ruleset");
    for (record = NULL; (record = plan_next(plan, OP_LANDLOCK_PATH, record)) != NULL;) {
        const int path = open(record->data, O_PATH | O_CLOEXEC);
        if (path < 0 && errno == ENOENT && record->b != 0)
            continue;
        if (path < 0 || sys_landlock_add_path(ruleset, record->a, path) != 0)
            fail("landlock", record->data);
        close(path);
    }
    for (record = NULL; (record = plan_next(plan, OP_LANDLOCK_PORT, record)) != NULL;) {
        char text[24];
        if (sys_landlock_add_port(ruleset, record->a, record->b) != 0)
            fail("landlock", decimal(record->b, text));
    }
    return ruleset;
}

void capabilities_limit(uint64_t kept, bool inheritable)
{
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0)
        fail("capabilities", "ambient");
    if (sys_capset(kept, inheritable ? kept : 0) != 0)
        fail("capabilities", "capset");
}

static void bounding_limit(uint64_t kept)
{
    char text[24];

    for (unsigned long capability = 0; capability < CAPABILITY_LIMIT; capability++) {
        const int held = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);
        if (held < 0) /* EINVAL: past the kernel's last capability */
            break;
        if (held == 1 && (kept >> capability & 1) == 0 && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0)
            fail("bounding set", decimal(capability, text));
    }
}

static void supplementary_groups(const struct plan *plan)
{
    const struct record *record = plan_last(plan, OP_GROUPS);
    const size_t count = record == NULL ? 0 : record->size / sizeof(gid_t);
    gid_t *groups = calloc(count + 1, sizeof *groups);

    if (groups == NULL)
        fail("memory", "");
    if (count > 0)
        memcpy(groups, record->data, count * sizeof *groups);
    if (setgroups(count, groups) != 0)
        fail("groups", "setgroups");
    free(groups);
}

/* A uid other than 0 gets its capabilities as ambient ones, which must be inheritable (capabilities(7)); uid 0
 * gets what the bounding set leaves. */
static void credentials(const struct plan *plan, const struct settings *settings)
{
    const bool ambient = settings->uid != 0 && settings->capabilities != 0;
    char text[24];

    bounding_limit(settings->capabilities);
    if (!settings->single) /* with one id setgroups is denied for good (user_namespaces(7)) */
        supplementary_groups(plan);
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) != 0)
        fail("capabilities", "keep");
    if (setresgid(settings->gid, settings->gid, settings->gid) != 0)
        fail("gid", decimal(settings->gid, text));
    if (setresuid(settings->uid, settings->uid, settings->uid) != 0)
        fail("uid", decimal(settings->uid, text));
    capabilities_limit(settings->capabilities, ambient);
    for (unsigned long capability = 0; ambient && capability < CAPABILITY_LIMIT; capability++)
        if ((settings->capabilities >> capability & 1) != 0 &&
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0)
            fail("capabilities", decimal(capability, text));
    if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) != 0)
        fail("capabilities", "keep");
    /* A change of ids makes it what fs.suid_dumpable says (proc(5)); others of these ids may be in the jail already. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        fail("dumpable", "service");
}

/* Whoever started the launcher may have ignored or blocked signals; both would outlive the exec. */
static void default_signals(void)
{
    sigset_t none;

    for (int number = 1; number < NSIG; number++)
        if (sys_signal_default(number) != 0 && number != SIGKILL && number != SIGSTOP)
            fail("signals", "sigaction");
    sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) != 0)
        fail("signals", "sigprocmask");
}

static bool byte_comes(int gate)
{
    char byte;
    ssize_t got;

    do
        got = read(gate, &byte, 1);
    while (got < 0 && errno == EINTR);
    return got == 1;
}

/* Nothing is open from 3 on, so the kernel gives them the numbers that they are to have. */
static bool descriptors_come(int gate)
{
    struct message message;

    if (!channel_receive(gate, &message) || message.kind != MESSAGE_GO)
        return false;
    refuse_directories(message.fds, message.fd_count);
    for (size_t i = 0; i < message.fd_count; i++) {
        if (message.fds[i] != STDERR_FILENO + 1 + (int)i) {
            errno = EPROTO;
            fail("gate", "descriptors");
        }
        if (fcntl(message.fds[i], F_SETFD, 0) != 0)
            fail("gate", "descriptors");
    }
    return true;
}

/* Dumpable, or strace of an ordinary user could not attach and `strace -y` would lose its paths. */
static void wait_at_gate(const struct plan *plan, int gate, int channel)
{
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0)
        fail("gate", "dumpable");
    channel_send(channel, MESSAGE_GATED, 0, "", 0, NULL, 0);
    if (!(settings_gate_brings(plan) ? descriptors_come(gate) : byte_comes(gate))) {
        errno = ECANCELED;
        fail("gate", "closed");
    }
    close(gate);
}

static void filters(const struct plan *plan)
{
    const struct record *record = NULL;

    while ((record = plan_next(plan, OP_SECCOMP, record)) != NULL)
        if (sys_seccomp_filter((unsigned)record->a, record->data, (unsigned short)(record->size / 8)) != 0)
            fail("seccomp", "filter");
}

static char *variable(const struct record *record)
{
    char *with_pid = NULL;

    if (record->a == 0)
        return (char *)(uintptr_t)record->data;
    if (asprintf(&with_pid, "%s%d", record->data, (int)getpid()) < 0)
        fail("memory", "");
    return with_pid;
}

/* Later records replace earlier ones of the same name. */
static char **environment(const struct plan *plan)
{
    char **vector = calloc(plan->count + 1, sizeof *vector);
    const struct record *record = NULL;
    size_t count = 0;

    if (vector == NULL)
        fail("memory", "");
    while ((record = plan_next(plan, OP_ENV, record)) != NULL) {
        const size_t name = strcspn(record->data, "=") + 1;
        size_t place = 0;
        while (place < count && strncmp(vector[place], record->data, name) != 0)
            place++;
        vector[place] = variable(record);
        count += place == count;
    }
    return vector;
}

static const char *search_path(char *const *variables)
{
    for (; *variables != NULL; variables++)
        if (strncmp(*variables, "PATH=", 5) == 0)
            return *variables + 5;
    return DEFAULT_PATH;
}

/* As execvpe(3), less the shell for files without an interpreter. Returns with errno. */
static void execute(char *const *argv, char *const *variables)
{
    const char *directory = search_path(variables);
    int error = ENOENT;

    if (strchr(argv[0], '/') != NULL) {
        execve(argv[0], argv, variables);
        return;
    }
    for (size_t length; *argv[0] != '\0'; directory += length + 1) {
        char path[PATH_MAX];
        length = strcspn(directory, ":");
        const int size = snprintf(path, sizeof path, "%.*s%s%s", (int)length, directory, length > 0 ? "/" : "", argv[0]);
        if (size > 0 && (size_t)size < sizeof path) {
            execve(path, argv, variables);
            if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
                return;
            if (errno == EACCES)
                error = EACCES;
        }
        if (directory[length] == '\0')
            break;
    }
    errno = error;
}

static void change_root(const struct settings *settings)
{
    const int base = open(settings->base, O_PATH | O_DIRECTORY | O_CLOEXEC);
    const int root =
        base < 0 ? -1 : sys_openat2(base, settings->chroot, O_PATH | O_DIRECTORY | O_CLOEXEC, RESOLVE_NO_SYMLINKS);

    if (root < 0 || fchdir(root) != 0 || chroot(".") != 0 || chdir("/") != 0)
        fail("chroot", settings->chroot);
    close(root);
    close(base);
}

_Noreturn void service_main(const struct plan *plan, const struct settings *settings, int channel, bool orphan_dies)
{
    const int standard[] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO};
    int gate = settings->gate, passed[PASS_LIMIT];

    channel_send(channel, MESSAGE_SERVICE, 0, "", 0, NULL, 0);
    if (settings->chroot != NULL)
        change_root(settings);
    if (setsid() < 0)
        fail("setsid", "");
    if (settings->terminal)
        own_terminal(settings, channel);
    refuse_directories(standard, 3);
    refuse_directories(passed, settings_passed(plan, passed, PASS_LIMIT));
    pass_descriptors(plan, &gate);
    close_unpassed(plan, channel, gate);
    /* ENOSYS: a kernel without keyrings has none to inherit. */
    if (sys_keyctl_join_session() < 0 && errno != ENOSYS)
        fail("keyring", "session");
    const int ruleset = landlock_rules(plan);
    /* What comes through the gate must fit in: a small limit of open files waits. It is lower than the one in force,
     * which let pass_descriptors use greater numbers than PASS_MOST, so no capability is needed to set it then. */
    limits(plan, settings_gate_brings(plan) ? PASS_MOST : 0);
    char **variables = environment(plan), **argv = plan_strings(plan_last(plan, OP_ARGV));
    credentials(plan, settings);
    if (orphan_dies && prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0) /* a change of ids clears it */
        fail("parent", "death signal");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        fail("no_new_privs", "");
    umask(settings->umask);
    if (chdir(settings->directory == NULL ? "/" : settings->directory) != 0)
        fail("directory", settings->directory == NULL ? "/" : settings->directory);
    default_signals();
    if (ruleset >= 0 && sys_landlock_restrict_self(ruleset) != 0)
        fail("landlock", "restrict");
    if (ruleset >= 0)
        close(ruleset);
    if (gate >= 0)
        wait_at_gate(plan, gate, channel);
    if (settings_gate_brings(plan))
        limits(plan, 0);
    filters(plan);
    execute(argv, variables);
    fail("exec", argv[0]);
}
