#define _GNU_SOURCE
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mounts.h"
#include "report.h"
#include "service.h"
#include "sys.h"
#include "util.h"

const int forwarded_signals[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGCONT, SIGWINCH};
const size_t forwarded_count = sizeof forwarded_signals / sizeof *forwarded_signals;

static volatile sig_atomic_t pending[NSIG];

static void note_signal(int number)
{
    pending[number] = 1;
}

static void wait_for_launcher(int channel)
{
    struct message message;

    if (!channel_receive(channel, &message))
        _exit(EXIT_WALLS); /* the launcher is gone: nobody wants this jail */
    if (message.kind != MESSAGE_GO) {
        errno = EPROTO;
        fail("channel", "go");
    }
}

/* As root the launcher makes the trees, because only it may idmap them; their numbers come along. */
static int *receive_trees(int channel, size_t expected)
{
    int *trees = malloc((expected + 1) * sizeof *trees);
    struct message message;
    size_t seen = 0;

    if (trees == NULL)
        fail("memory", "");
    memset(trees, 0xff, (expected + 1) * sizeof *trees); /* all -1 */
    while (seen < expected) {
        if (!channel_receive(channel, &message))
            _exit(EXIT_WALLS);
        const size_t numbers = message.length / sizeof(int32_t);
        if (message.kind != MESSAGE_TREES || numbers == 0 || numbers > expected - seen) {
            errno = EPROTO;
            fail("channel", "trees");
        }
        for (size_t i = 0, fd = 0; i < numbers; i++, seen++) {
            int32_t present;
            memcpy(&present, message.text + i * sizeof present, sizeof present);
            if (present != 0 && fd < message.fd_count)
                trees[seen] = message.fds[fd++];
        }
    }
    return trees;
}

static size_t tree_count(const struct plan *plan)
{
    size_t count = 0;

    for (size_t i = 0; i < plan->count; i++)
        count += plan->records[i].op == OP_ROOT || plan->records[i].op == OP_BIND;
    return count;
}

static void write_sysctls(const struct plan *plan)
{
    const struct record *record = NULL;

    while ((record = plan_next(plan, OP_SYSCTL, record)) != NULL)
        if (!write_file(record->data, plan_string(record, record->data)))
            fail("sysctl", record->data);
}

static void loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request) != 0)
        fail("loopback", "lo");
    request.ifr_flags = (short)(request.ifr_flags | IFF_UP);
    if (ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        fail("loopback", "lo");
    close(fd);
}

static void name_host(const struct plan *plan)
{
    const struct record *record = plan_last(plan, OP_HOSTNAME);

    if (record != NULL && sethostname(record->data, strlen(record->data)) != 0)
        fail("hostname", record->data);
}

/* Handlers only note the signal, and everything stays blocked outside of ppoll(): nothing is lost between. */
static void install_handlers(sigset_t *open)
{
    const struct sigaction action = {.sa_handler = note_signal};

    sigprocmask(SIG_SETMASK, NULL, open);
    sigdelset(open, SIGCHLD);
    sigaction(SIGCHLD, &action, NULL);
    for (size_t i = 0; i < forwarded_count; i++) {
        sigaction(forwarded_signals[i], &action, NULL);
        sigdelset(open, forwarded_signals[i]);
    }
}

/* To the service, or to every process of a service that went into the background. */
static void forward_signals(pid_t target)
{
    for (size_t i = 0; i < forwarded_count; i++) {
        const int number = forwarded_signals[i];
        if (pending[number] != 0) {
            pending[number] = 0;
            kill(target, number);
        }
    }
}

/* Reaps whoever died. True once the jail's life is over. */
static bool reap(pid_t service, bool forks, bool *ended, int *status)
{
    int one;
    pid_t pid;

    while ((pid = waitpid(-1, &one, WNOHANG)) > 0)
        if (pid == service) {
            *status = one;
            *ended = true;
        }
    return *ended && (!forks || *status != 0 || (pid < 0 && errno == ECHILD));
}

/* ppoll() lets no signal in while a descriptor is ready, and a service that floods its log keeps the pipe so. */
static void let_signals_in(const sigset_t *open)
{
    sigset_t closed;

    sigprocmask(SIG_SETMASK, open, &closed);
    sigprocmask(SIG_SETMASK, &closed, NULL);
}

/* Nobody reads the log's pipe any more: without a reader the service would get SIGPIPE, or stand still. One pipe's
 * worth at a time, so that children and signals have their turn. False once no writer is left. */
static bool drop_output(int drain)
{
    static char bytes[65536];
    const ssize_t got = read(drain, bytes, sizeof bytes);

    return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}

static _Noreturn void keep_house(const struct settings *settings, int lifeline, int drain, pid_t service)
{
    struct pollfd watched = {.fd = lifeline};
    sigset_t open;
    bool ended = false;
    int status = 0;

    install_handlers(&open);
    while (!reap(service, settings->forks, &ended, &status)) {
        forward_signals(ended ? -1 : service);
        if (ppoll(&watched, 1, NULL, &open) > 0) {
            if (settings->lifeline)
                _exit(EXIT_WALLS); /* with PID 1 the kernel ends every process of the jail */
            if (watched.fd == lifeline)
                watched = (struct pollfd){.fd = drain, .events = POLLIN};
            else if (!drop_output(drain))
                watched.fd = -1;
            let_signals_in(&open);
        }
    }
    /* A supervisor that is gone does not ask for the status. */
    if (send(lifeline, &status, sizeof status, MSG_NOSIGNAL) < 0)
        _exit(EXIT_WALLS);
    _exit(0);
}

/* PID 1 keeps nothing that jail root could want: one socket, at most the end of a pipe, what is held for a jail that may
 * outlive its supervisor, and the right to signal any uid of the jail. */
static void lay_down_rights(const struct plan *plan, const struct settings *settings, int lifeline, int drain)
{
    int kept[MESSAGE_FDS] = {lifeline, drain};
    const size_t count = 2 + (settings->lifeline ? 0 : settings_kept(plan, kept + 2, MESSAGE_FDS - 2));

    for (unsigned long capability = 0; capability < CAPABILITY_LIMIT; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0)
            break;
    capabilities_limit(1U << CAPABILITY_KILL, false);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        fail("no_new_privs", "PID 1");
    refuse_directories(kept + 2, count - 2);
    keep_only(kept, count);
}

_Noreturn void jail_main(const struct plan *plan, const struct settings *settings, int channel, int lifeline, int drain)
{
    const size_t expected = tree_count(plan);
    const bool own_trees = settings->map_way != MAP_DIRECT;
    int *trees = NULL;
    size_t count = 0;

    wait_for_launcher(channel);
    if (own_trees)
        trees = trees_open(plan, settings->base, -1, &count);
    if ((settings->namespaces & NEW_CGROUP) != 0 && sys_unshare(NEW_CGROUP) != 0)
        fail("cgroup namespace", "");
    become_jail_root(settings);
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        fail("dumpable", "PID 1");
    hide_arguments();
    write_sysctls(plan);
    if (!own_trees)
        trees = receive_trees(channel, expected);
    mounts_make(plan, trees, settings->ephemeral, channel);
    free(trees);
    name_host(plan);
    if (plan_last(plan, OP_LOOPBACK) != NULL)
        loopback_up();

    const pid_t service = fork();
    if (service < 0)
        fail("fork", "service");
    if (service == 0)
        service_main(plan, settings, channel, false);
    if (settings->lifeline) {
        if (drain >= 0)
            close(drain);
        drain = -1;
    }
    lay_down_rights(plan, settings, lifeline, drain);
    keep_house(settings, lifeline, drain, service);
}
