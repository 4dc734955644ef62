#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jail.h"
#include "log.h"
#include "mounts.h"
#include "report.h"
#include "service.h"
#include "supervise.h"
#include "sys.h"
#include "util.h"

#define MAP_LINES 340 /* the kernel's limit (user_namespaces(7)) */
#define BATCH 60
#define JOINED_MOST 16

static const int standard[] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO};

static int tell_channel = -1; /* in a child: where its failures go */

/* The child's ends; -1: none. `drain` is the other end of `output`, for when nobody else reads it any more. */
struct ends {
    int channel, lifeline, output, drain;
};

static void child_failed(int error, const char *step, const char *object)
{
    char text[MESSAGE_TEXT];
    const int size = snprintf(text, sizeof text, "%.120s%c%.4000s", step, '\0', object);

    channel_send(tell_channel, MESSAGE_FAILED, error, text, (size_t)size + 1, NULL, 0);
}

/* What a child of the launcher keeps: standard streams, its ends of the sockets, what the service is to get. */
static void become_child(const struct plan *plan, const struct settings *settings, const struct ends *ends)
{
    int kept[MESSAGE_FDS] = {STDIN_FILENO,   STDOUT_FILENO,  STDERR_FILENO, ends->channel,
                             ends->lifeline, settings->gate, ends->drain};

    tell_channel = ends->channel;
    failure_hook = child_failed;
    if (ends->output >= 0 && (dup2(ends->output, STDOUT_FILENO) < 0 || dup2(ends->output, STDERR_FILENO) < 0))
        fail("descriptors", "output");
    size_t count = 7 + settings_passed(plan, kept + 7, MESSAGE_FDS - 7);
    if (!settings->lifeline)
        count += settings_kept(plan, kept + count, MESSAGE_FDS - count);
    keep_only(kept, count);
}

/* What only the service and the helpers need; a jail that is started anew gives it to each life. */
static void close_given(const struct plan *plan, const struct settings *settings)
{
    int fds[MESSAGE_FDS];
    size_t count = settings_passed(plan, fds, MESSAGE_FDS);

    if (settings->gate >= 0)
        close(settings->gate);
    if (settings->restart != NULL)
        return;
    count += settings_helpers(plan, fds + count, MESSAGE_FDS - count);
    for (size_t i = 0; i < count; i++)
        close(fds[i]);
}

/* One that is this jail's alone must not bring limits along that a killed supervisor left. */
static void make_cgroup(const struct record *record)
{
    if (mkdir(record->data, 0755) == 0 || (errno == EEXIST && !is_removed(record)))
        return;
    if (errno != EEXIST || rmdir(record->data) != 0 || mkdir(record->data, 0755) != 0)
        fail("cgroup", record->data);
}

/* A cgroup hands no controller on while a process is in it, as the one that this supervisor left in the foreground is
 * for a moment. */
static bool write_settled(const char *path, const char *value)
{
    for (int tries = 0; tries < 1000; tries++) {
        if (write_file(path, value))
            return true;
        if (errno != EBUSY)
            return false;
        usleep(2000);
    }
    return false;
}

static void prepare_outside(const struct plan *plan)
{
    for (const struct record *record = plan->records; record < plan->records + plan->count; record++) {
        if (record->op == OP_CGROUP_DIR)
            make_cgroup(record);
        if (record->op == OP_WRITE && !write_settled(record->data, plan_string(record, record->data)))
            fail("write", record->data);
        if (is_removed(record))
            note("remove %s", record->data);
    }
}

static void join_cgroups(const struct plan *plan, pid_t pid)
{
    const struct record *record = NULL;
    char text[24];

    while ((record = plan_next(plan, OP_CGROUP_JOIN, record)) != NULL)
        if (!write_file(record->data, decimal((uint64_t)pid, text)))
            fail("cgroup", record->data);
}

static void write_map(const struct plan *plan, pid_t pid, uint64_t kind, const char *file)
{
    char path[64], lines[MAP_LINES * 36];
    const struct record *record = NULL;
    size_t used = 0;

    while ((record = plan_next(plan, OP_MAP, record)) != NULL)
        if (record->a == kind && used + 36 < sizeof lines)
            used += (size_t)snprintf(lines + used, sizeof lines - used, "%u %u %u\n", (unsigned)record->b,
                                     (unsigned)record->c, (unsigned)record->d);
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, file);
    if (used == 0)
        errno = EINVAL;
    if (used == 0 || !write_file(path, lines))
        fail("id map", file);
}

/* Never host 0: whatever the plan says, a jail whose root is the host's is none. */
static void refuse_host_root(const struct plan *plan)
{
    const struct record *record = NULL;

    while ((record = plan_next(plan, OP_MAP, record)) != NULL)
        if (record->c == 0 || record->d == 0 || record->c + record->d > UINT32_MAX) {
            errno = EPERM;
            fail("id map", "host root");
        }
}

/* The command keeps the standard streams and `kept`: with the state file it would hold the jail's lock after its end. */
static void run(char *const *argv, const char *step, const int *kept, size_t count)
{
    int status;
    const pid_t pid = fork();

    if (pid < 0)
        fail(step, argv[0]);
    if (pid == 0) {
        sigset_t none;
        failure_hook = NULL;
        keep_only(kept, count);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGPIPE, SIG_DFL);
        execve(argv[0], argv, environ);
        _exit(EXIT_NOT_FOUND);
    }
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            fail(step, argv[0]);
    if (status != 0) {
        errno = WIFEXITED(status) && WEXITSTATUS(status) == EXIT_NOT_FOUND ? ENOENT : EPERM;
        fail(step, argv[0]);
    }
}

/* newuidmap(1) and newgidmap(1) are setuid and check the caller's range. */
static void run_map_helper(const struct plan *plan, pid_t pid, uint64_t kind, const char *helper)
{
    char *argv[3 + 3 * MAP_LINES], texts[3 * MAP_LINES + 1][24];
    const struct record *record = NULL;
    size_t texts_used = 0, used = 0;

    argv[used++] = (char *)(uintptr_t)helper;
    argv[used++] = (char *)(uintptr_t)decimal((uint64_t)pid, texts[texts_used++]);
    while ((record = plan_next(plan, OP_MAP, record)) != NULL) {
        const uint64_t numbers[3] = {record->b, record->c, record->d};
        for (int i = 0; record->a == kind && i < 3 && used < sizeof argv / sizeof *argv - 1; i++)
            argv[used++] = (char *)(uintptr_t)decimal(numbers[i], texts[texts_used++]);
    }
    argv[used] = NULL;
    run(argv, "id map", standard, 3);
}

static void map_ids(const struct plan *plan, const struct settings *settings, pid_t pid)
{
    const struct record *helpers = plan_last(plan, OP_MAP_HELPERS);
    char path[64];

    refuse_host_root(plan);
    switch (settings->map_way) {
    case MAP_SINGLE: /* an ordinary user may map groups only once setgroups is denied (user_namespaces(7)) */
        snprintf(path, sizeof path, "/proc/%d/setgroups", (int)pid);
        if (!write_file(path, "deny"))
            fail("id map", "setgroups");
        /* fall through */
    case MAP_DIRECT:
        write_map(plan, pid, 0, "uid_map");
        write_map(plan, pid, 1, "gid_map");
        break;
    case MAP_HELPERS:
        if (helpers == NULL) {
            errno = EINVAL;
            fail("id map", "no helpers");
        }
        run_map_helper(plan, pid, 0, helpers->data);
        run_map_helper(plan, pid, 1, plan_string(helpers, helpers->data));
        break;
    }
}

static void send_trees(const struct plan *plan, const struct settings *settings, pid_t pid, int channel)
{
    char path[64];
    size_t count;

    snprintf(path, sizeof path, "/proc/%d/ns/user", (int)pid);
    const int userns = open(path, O_RDONLY | O_CLOEXEC);
    if (userns < 0)
        fail("user namespace", path);
    int *trees = trees_open(plan, settings->base, userns, &count);
    close(userns);
    for (size_t at = 0; at < count;) {
        int32_t present[BATCH];
        int fds[BATCH];
        size_t numbers = 0, fd_count = 0;
        for (; at < count && numbers < BATCH; at++, numbers++) {
            present[numbers] = trees[at] >= 0;
            if (trees[at] >= 0)
                fds[fd_count++] = trees[at];
        }
        channel_send(channel, MESSAGE_TREES, 0, present, numbers * sizeof *present, fds, fd_count);
        for (size_t i = 0; i < fd_count; i++)
            close(fds[i]);
    }
    free(trees);
}

/* Where the caller is root of the host a limit of its own does not bind the jail; elsewhere the jail says so. */
static void raise_limits(const struct plan *plan, pid_t pid)
{
    const struct record *record = NULL;

    while ((record = plan_next(plan, OP_RLIMIT, record)) != NULL) {
        struct rlimit now;
#ifdef __GLIBC__
        const __rlimit_resource_t resource = (__rlimit_resource_t)record->a;
#else
        const int resource = (int)record->a;
#endif
        if (prlimit(pid, resource, NULL, &now) != 0 || now.rlim_max >= record->c)
            continue;
        now.rlim_max = record->c;
        if (prlimit(pid, resource, &now, NULL) != 0 && errno != EPERM)
            fail("rlimit", "raise");
    }
}

/* Things outside that need the new namespaces, as a network helper does; `{pid}` stands for PID 1. */
static void run_helpers(const struct plan *plan, pid_t pid)
{
    int kept[MESSAGE_FDS] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO};
    const size_t count = 3 + settings_helpers(plan, kept + 3, MESSAGE_FDS - 3);
    const struct record *record = NULL;

    /* What a helper leaves in the background becomes the supervisor's child, which sees it end. */
    if (plan_next(plan, OP_HELPER, NULL) != NULL && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
        fail("helper", "subreaper");
    while ((record = plan_next(plan, OP_HELPER, record)) != NULL) {
        char **argv = plan_strings(record);
        for (size_t i = 0; argv[i] != NULL; i++) {
            const char *mark = strstr(argv[i], "{pid}");
            char *filled = NULL;
            if (mark == NULL)
                continue;
            if (asprintf(&filled, "%.*s%d%s", (int)(mark - argv[i]), argv[i], (int)pid, mark + 5) < 0)
                fail("memory", "");
            argv[i] = filled;
        }
        run(argv, "helper", kept, count);
    }
}

/* The launch's sockets and the log's pipe; the ends for the child are given back through the arguments. */
static struct child open_channels(const struct plan *plan, bool own_pid1, struct ends *theirs)
{
    struct child child = {.lifeline = -1, .output = -1};
    const int yes = 1;
    int ends[2];

    *theirs = (struct ends){-1, -1, -1, -1};
    channel_pair(ends);
    child.channel = ends[0];
    theirs->channel = ends[1];
    /* Out of the way of the numbers that passed descriptors get: until the exec failures go through it. */
    if (settings_numbered(plan)) {
        theirs->channel = fcntl(ends[1], F_DUPFD_CLOEXEC, PASS_MOST + 1);
        if (theirs->channel < 0)
            fail("descriptors", "channel");
        close(ends[1]);
    }
    if (setsockopt(child.channel, SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) != 0)
        fail("channel", "SO_PASSCRED");
    if (own_pid1) {
        channel_pair(ends);
        child.lifeline = ends[0];
        theirs->lifeline = ends[1];
    }
    if (log_open(plan)) {
        if (pipe2(ends, O_CLOEXEC) != 0 || fcntl(ends[0], F_SETFL, O_NONBLOCK) != 0)
            fail("log", "pipe");
        child.output = ends[0];
        theirs->output = ends[1];
        theirs->drain = own_pid1 ? ends[0] : -1;
    }
    return child;
}

static void close_ends(const struct ends *theirs)
{
    close(theirs->channel);
    if (theirs->lifeline >= 0)
        close(theirs->lifeline);
    if (theirs->output >= 0)
        close(theirs->output);
}

/* The parent leaves at once, so whoever started it has no zombie to wait for. */
static void go_to_background(void)
{
    const pid_t pid = fork();

    if (pid < 0)
        fail("detach", "fork");
    if (pid > 0)
        _exit(0);
    if (setsid() < 0)
        fail("detach", "setsid");
}

/* Two instances of a jail share no control group: each has a number in its name. */
static void name_instance(struct plan *plan, const struct settings *settings)
{
    char text[24];
    const char *instance = settings->instance != NULL ? settings->instance : decimal((uint64_t)getpid(), text);

    plan_fill(plan, "{instance}", instance);
    note("instance %s", instance);
}

/* Where one id is mapped setgroups is denied inside, and root's groups must not go along. */
static void drop_groups(const struct settings *settings)
{
    if (settings->single && geteuid() == 0 && setgroups(0, NULL) != 0)
        fail("groups", "");
}

int launch(struct plan *plan, const struct settings *settings)
{
    const bool jail = settings->chroot == NULL;
    const struct record *again = plan_last(plan, OP_AGAIN);
    struct ends ends;

    if (settings->detach && again == NULL)
        go_to_background();
    supervisor_begin(plan, settings);
    note_process("supervisor", getpid());
    if (settings->restart != NULL && again == NULL)
        note("restarts 0");
    name_instance(plan, settings);
    struct child child = open_channels(plan, jail, &ends);
    prepare_outside(plan);
    drop_groups(settings);

    child.pid = jail ? sys_clone(settings->namespaces & ~NEW_CGROUP) : fork();
    if (child.pid < 0)
        fail("namespaces", "clone");
    if (child.pid == 0) {
        become_child(plan, settings, &ends);
        if (jail)
            jail_main(plan, settings, ends.channel, ends.lifeline, ends.drain);
        service_main(plan, settings, ends.channel, true);
    }
    supervisor_owns(&child);
    close_ends(&ends);
    note_process("init", child.pid);
    join_cgroups(plan, child.pid);
    if (jail) {
        raise_limits(plan, child.pid);
        map_ids(plan, settings, child.pid);
        run_helpers(plan, child.pid);
        channel_send(child.channel, MESSAGE_GO, 0, "", 0, NULL, 0);
        if (settings->map_way == MAP_DIRECT)
            send_trees(plan, settings, child.pid, child.channel);
    }
    close_given(plan, settings);
    if (settings->detach)
        close_standard();
    return supervise(&child);
}

int enter(struct plan *plan, const struct settings *settings)
{
    int joined[JOINED_MOST];
    struct ends ends;
    const struct record *record = NULL;
    struct message go;
    size_t count = 0;
    char text[24];

    supervisor_begin(plan, settings);
    note_process("supervisor", getpid());
    name_instance(plan, settings);
    struct child child = open_channels(plan, false, &ends);
    /* Opened while the host's tree can still be reached. */
    while ((record = plan_next(plan, OP_CGROUP_JOIN, record)) != NULL) {
        errno = EMFILE;
        joined[count] = count < JOINED_MOST - 1 ? open(record->data, O_WRONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
        if (joined[count++] < 0)
            fail("cgroup", record->data);
    }
    drop_groups(settings);
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        fail("dumpable", "enter");
    if (sys_setns(settings->enter, settings->namespaces) != 0)
        fail("setns", "running jail");

    child.pid = fork();
    if (child.pid < 0)
        fail("fork", "command");
    if (child.pid == 0) {
        become_child(plan, settings, &ends);
        if (!channel_receive(ends.channel, &go))
            _exit(EXIT_WALLS);
        become_jail_root(settings);
        service_main(plan, settings, ends.channel, true);
    }
    supervisor_owns(&child);
    close_ends(&ends);
    close_given(plan, settings);
    for (size_t i = 0; i < count; i++) {
        if (!write_all(joined[i], text, strlen(decimal((uint64_t)child.pid, text))))
            fail("cgroup", "join");
        close(joined[i]);
    }
    channel_send(child.channel, MESSAGE_GO, 0, "", 0, NULL, 0);
    return supervise(&child);
}
