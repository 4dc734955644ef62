#define _GNU_SOURCE
#include "supervise.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "again.h"
#include "jail.h"
#include "log.h"
#include "report.h"
#include "util.h"

#define KILLED "the kernel killed %lu of the jail's processes for want of memory (its limit, or the host's)"
#define REPORT_LINE (MESSAGE_TEXT + 128)

#define PTY_PEER 0x5441UL /* TIOCGPTPEER */
#define DRAIN_MOST 1024 /* reads: more than a pipe of a process without privileges holds (pipe(7)) */
#define ENDING_MS 1000
#define HELPER_MS 2000
#define HELPER_TURN_MS 50

enum watched { SIGNALS, CHANNEL, OUTPUT, SYSLOG, MASTER, INPUT, LEASH, WATCHED };

static struct {
    const struct plan *plan;
    const struct settings *settings;
    pid_t child;
    int child_channel;
    int proc; /* the host's: entering a jail changes what /proc is */
    struct pollfd watched[WATCHED];
    bool saw_service, raw, input, in_line; /* input: more may come; in_line: what was typed last did not end its line */
    struct termios terminal;
    char typed[4096]; /* read from standard input, not yet taken by the pty */
    size_t typed_length;
    char failed_line[MESSAGE_TEXT + 64];
    char kept[2 * REPORT_LINE]; /* reported, and not yet written to the status descriptor */
    size_t kept_length;
} self;

void supervisor_owns(const struct child *child)
{
    self.child = child->pid;
    self.child_channel = child->channel;
}

static void tell(int fd, const char *line, size_t length)
{
    if (fd >= 0 && !write_all(fd, line, length) && (errno == EBADF || errno == EINVAL))
        _exit(EXIT_WALLS); /* not a descriptor of ours: the caller broke its own plan */
}

static void flush(void)
{
    tell(self.settings->status, self.kept, self.kept_length);
    self.kept_length = 0;
}

/* The state file has every line at once; whoever waits for the status is woken for what it waits for. */
static void report(bool now, const char *format, va_list arguments)
{
    char line[REPORT_LINE];
    const int size = vsnprintf(line, sizeof line - 1, format, arguments);
    size_t length = size < 0 ? 0 : (size_t)size < sizeof line - 1 ? (size_t)size : sizeof line - 2;

    for (size_t i = 0; i < length; i++)
        if ((unsigned char)line[i] < ' ')
            line[i] = '?'; /* a path cannot forge a line */
    line[length++] = '\n';
    tell(self.settings->state, line, length);
    if (self.kept_length + length > sizeof self.kept)
        flush();
    memcpy(self.kept + self.kept_length, line, length);
    self.kept_length += length;
    if (now)
        flush();
}

void say(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    report(true, format, arguments);
    va_end(arguments);
}

void note(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    report(false, format, arguments);
    va_end(arguments);
}

void note_process(const char *word, pid_t pid)
{
    char path[40], stat[1024];
    unsigned long long start = 0;

    snprintf(path, sizeof path, "%d/stat", (int)pid);
    const int fd = openat(self.proc, path, O_RDONLY | O_CLOEXEC);
    const ssize_t got = fd < 0 ? -1 : read(fd, stat, sizeof stat - 1);
    if (fd >= 0)
        close(fd);
    if (got > 0) {
        stat[got] = '\0';
        /* The second field, in parentheses, may hold anything; the 22nd is the 20th after it. */
        const char *field = strrchr(stat, ')');
        for (int i = 0; field != NULL && i < 20; i++)
            field = strchr(field + 1, ' ');
        if (field != NULL)
            start = strtoull(field, NULL, 10);
    }
    note("%s %d %llu", word, (int)pid, start);
}

static void remove_path(const char *path)
{
    /* A cgroup stays busy for a moment after its last process is gone. */
    for (int tries = 0; rmdir(path) != 0 && errno == EBUSY && tries < 50; tries++)
        usleep(2000);
    if (errno == ENOTDIR)
        unlink(path);
}

bool is_removed(const struct record *record)
{
    return record->op == OP_REMOVE || (record->op == OP_CGROUP_DIR && record->a == 0);
}

/* Last made, first removed. Whoever entered a jail made nothing, and its paths lead to the jail's. */
static void remove_leftovers(void)
{
    if (self.settings->enter >= 0)
        return;
    for (size_t i = self.plan->count; i-- > 0;) {
        const struct record *record = &self.plan->records[i];
        if (is_removed(record))
            remove_path(record->data);
    }
}

/* How many of the jail's processes the kernel killed at its memory limit: memory.events of control groups in version 2,
 * memory.oom_control in 1. */
static void tell_of_memory(void)
{
    static const char *const files[] = {"memory.events", "memory.oom_control"};
    char path[PATH_MAX], text[512];

    for (size_t i = 0; i < 2 * self.plan->count && self.settings->enter < 0; i++) {
        const struct record *record = &self.plan->records[i / 2];
        if (record->op != OP_CGROUP_DIR || record->a != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", record->data, files[i % 2]);
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        const ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
        if (fd >= 0)
            close(fd);
        text[got > 0 ? got : 0] = '\0';
        const char *count = strstr(text, "oom_kill ");
        const unsigned long killed = count == NULL ? 0 : strtoul(count + sizeof "oom_kill", NULL, 10);
        if (killed == 0)
            continue;
        note("memory %lu", killed);
        log_line(KILLED, killed);
        if (self.settings->status < 0 && plan_last(self.plan, OP_LOG) == NULL)
            dprintf(STDERR_FILENO, "note: " KILLED "\n", killed);
    }
}

static void wait_for_helpers(void);

static void restore_terminal(void)
{
    if (self.raw)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &self.terminal);
    self.raw = false;
}

/* The launcher has no words for the cause; who has some may be named in the plan. */
static void explain_failure(int error, const char *step, const char *object)
{
    const struct record *record = plan_last(self.plan, OP_ON_FAILURE);

    if (self.settings->status >= 0)
        return;
    /* Within a jail that was entered the command would be the jail's, and run without its walls. */
    if (record == NULL || self.settings->enter >= 0) {
        failure_print(error, step, object);
        return;
    }
    char **argv = plan_strings(record);
    size_t count = 0;
    while (argv[count] != NULL)
        count++;
    char **longer = calloc(count + 2, sizeof *longer);
    if (longer == NULL)
        return;
    memcpy(longer, argv, count * sizeof *argv);
    longer[count] = self.failed_line;
    execve(longer[0], longer, environ);
}

static void word_failure(int error, const char *step, const char *object)
{
    snprintf(self.failed_line, sizeof self.failed_line, "failed %d %s: %s", error, step, object);
}

static void tell_failure(int error, const char *step, const char *object)
{
    say("%s", self.failed_line);
    remove_leftovers();
    explain_failure(error, step, object);
}

/* A child that fails while the launcher still writes to it has said why: that is the cause, not the broken pipe. */
static void prefer_the_childs_reason(int *error, const char **step, const char **object)
{
    static struct message message;
    struct pollfd ready = {.fd = self.child_channel, .events = POLLIN};

    while (self.child_channel >= 0 && poll(&ready, 1, 0) == 1 && channel_receive(ready.fd, &message))
        if (message.kind == MESSAGE_FAILED) {
            *error = message.error;
            *step = message.text;
            *object = message.text + strlen(message.text) + 1;
            return;
        }
}

/* A process that ends closes its sockets first: where one was found closed it is waited for. */
static bool child_is_gone(bool ending, int *status)
{
    int left = ending ? ENDING_MS / HELPER_TURN_MS : 0;
    pid_t pid = 0;

    while (self.child > 0 && (pid = waitpid(self.child, status, WNOHANG)) == 0 && left-- > 0)
        poll(NULL, 0, HELPER_TURN_MS);
    return self.child > 0 && pid == self.child;
}

static void launcher_failed(int error, const char *step, const char *object)
{
    const bool ending = strcmp(step, "channel") == 0;
    int status;

    failure_hook = NULL;
    /* Whatever fails once the child is gone does so for want of it. */
    const bool gone = child_is_gone(ending, &status);
    if (gone && WIFSIGNALED(status)) {
        error = ECHILD;
        step = "launch";
        object = "PID 1";
    } else if (gone || ending) {
        prefer_the_childs_reason(&error, &step, &object);
    }
    if (gone) {
        self.child = 0;
        wait_for_helpers();
    }
    if (self.child > 0) {
        kill(self.child, SIGKILL);
        while (waitpid(self.child, NULL, 0) < 0 && errno == EINTR)
            continue;
        self.child = 0;
        wait_for_helpers();
    }
    restore_terminal();
    word_failure(error, step, object);
    if (plan_last(self.plan, OP_AGAIN) != NULL && again_wanted(self.settings, true)) {
        remove_leftovers();
        again(self.settings, self.failed_line, self.watched[SIGNALS].fd);
    }
    tell_failure(error, step, object);
}

static void reading_failed(int error, const char *step, const char *object)
{
    failure_hook = NULL;
    word_failure(error, step, object);
    tell_failure(error, step, object);
}

void supervisor_reads(const struct plan *plan, const struct settings *settings)
{
    self.plan = plan;
    self.settings = settings;
    failure_hook = reading_failed;
}

void supervisor_begin(const struct plan *plan, const struct settings *settings)
{
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigset_t read_later;

    self.plan = plan;
    self.settings = settings;
    self.child_channel = -1;
    again_begin(plan, settings);
    failure_hook = launcher_failed;
    self.proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (self.proc < 0)
        fail("supervise", "/proc");
    sigaction(SIGPIPE, &ignore, NULL);
    sigaction(SIGXFSZ, &ignore, NULL); /* a log that may grow no further must not end the jail */
    sigemptyset(&read_later);
    sigaddset(&read_later, SIGCHLD);
    sigaddset(&read_later, SIGPWR);
    for (size_t i = 0; i < forwarded_count; i++)
        sigaddset(&read_later, forwarded_signals[i]);
    if (sigprocmask(SIG_SETMASK, &read_later, NULL) != 0)
        fail("signals", "sigprocmask");
    const int fd = signalfd(-1, &read_later, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        fail("signals", "signalfd");
    for (size_t i = 0; i < WATCHED; i++)
        self.watched[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    self.watched[SIGNALS].fd = fd;
}

static void copy_window_size(void)
{
    struct winsize size;

    if (ioctl(STDIN_FILENO, TIOCGWINSZ, &size) == 0)
        ioctl(self.watched[MASTER].fd, TIOCSWINSZ, &size);
}

static bool make_raw(void)
{
    struct termios raw = self.terminal;

    cfmakeraw(&raw);
    return tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0;
}

static void begin_terminal(int master)
{
    self.watched[MASTER].fd = master;
    self.input = true;
    fcntl(master, F_SETFL, O_RDWR | O_NONBLOCK);
    /* Held open until the end: without any slave the master ends, and a process may yet open /dev/tty anew. */
    ioctl(master, PTY_PEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (tcgetattr(STDIN_FILENO, &self.terminal) != 0)
        return; /* standard input is no terminal: nothing to make raw */
    self.raw = make_raw();
    copy_window_size();
}

/* Nobody is at the terminal any more: to those in the jail it hangs up, where they would wait for ever to write. */
static void end_terminal(void)
{
    close(self.watched[MASTER].fd);
    self.watched[MASTER].fd = -1;
}

static void read_channel(void)
{
    struct message message;

    if (!channel_receive(self.watched[CHANNEL].fd, &message)) {
        close(self.watched[CHANNEL].fd);
        self.watched[CHANNEL].fd = -1;
        if (!self.saw_service) {
            errno = ECHILD;
            fail("launch", "PID 1");
        }
        say("exec ok");
        return;
    }
    switch (message.kind) {
    case MESSAGE_FAILED:
        errno = message.error;
        fail(message.text, message.text + strlen(message.text) + 1);
    case MESSAGE_SERVICE:
        self.saw_service = true;
        note_process("service", message.sender);
        break;
    case MESSAGE_GATED:
        say("gated");
        break;
    case MESSAGE_TERMINAL:
        if (message.fd_count == 1)
            begin_terminal(message.fds[0]);
        break;
    case MESSAGE_LOG_SOCKET:
        if (message.fd_count == 1)
            self.watched[SYSLOG].fd = message.fds[0];
        break;
    default:
        errno = EPROTO;
        fail("channel", "message");
    }
}

/* False at the end of the stream, or with EAGAIN when nothing is there now. */
static bool read_output(int fd)
{
    char bytes[65536];

    errno = 0;
    const ssize_t got = read(fd, bytes, sizeof bytes);
    if (got > 0)
        log_write(bytes, (size_t)got);
    return got > 0;
}

static bool read_syslog(int fd)
{
    char bytes[8192];
    const ssize_t got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);

    if (got >= 0)
        log_datagram(bytes, (size_t)got);
    return got >= 0;
}

/* The caller may share its standard output with others, and one of them have made it one that does not block. */
static bool show(const char *bytes, size_t length)
{
    struct pollfd room = {.fd = STDOUT_FILENO, .events = POLLOUT};

    while (length > 0) {
        const ssize_t put = write(STDOUT_FILENO, bytes, length);
        if (put < 0 && errno == EAGAIN)
            poll(&room, 1, -1);
        else if (put < 0 && errno != EINTR)
            return false;
        if (put > 0) {
            bytes += put;
            length -= (size_t)put;
        }
    }
    return true;
}

/* False when nothing is there now, or the terminal has ended. */
static bool read_master(int fd)
{
    char bytes[65536];
    const ssize_t got = read(fd, bytes, sizeof bytes);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (got > 0 && show(bytes, (size_t)got))
        return true;
    end_terminal();
    return false;
}

/* The end of standard input is the terminal's end-of-file key to what reads from the pty; within a line the first one
 * only hands over what was typed of it. */
static void read_input(void)
{
    static const char end_of_file = 4;
    const ssize_t got = read(STDIN_FILENO, self.typed, sizeof self.typed);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got > 0) {
        self.typed_length = (size_t)got;
        self.in_line = self.typed[got - 1] != '\n' && self.typed[got - 1] != '\r';
        return;
    }
    self.input = false;
    memset(self.typed, end_of_file, 2);
    self.typed_length = self.in_line ? 2 : 1;
}

static void flush_input(void)
{
    const ssize_t put = write(self.watched[MASTER].fd, self.typed, self.typed_length);

    if (put < 0 && errno != EAGAIN)
        self.typed_length = 0; /* the slave is closed: nobody reads this */
    if (put > 0) {
        self.typed_length -= (size_t)put;
        memmove(self.typed, self.typed + put, self.typed_length);
    }
}

static void read_signals(void)
{
    struct signalfd_siginfo information;

    while (read(self.watched[SIGNALS].fd, &information, sizeof information) == (ssize_t)sizeof information) {
        const int number = (int)information.ssi_signo;
        if (again_ends(number))
            again_never();
        if (number == SIGWINCH && self.watched[MASTER].fd >= 0)
            copy_window_size();
        /* A shell that goes on with a stopped job has made the terminal its own meanwhile. */
        if (number == SIGCONT && self.raw && tcgetpgrp(STDIN_FILENO) == getpgrp())
            make_raw();
        if ((number != SIGWINCH || self.watched[MASTER].fd < 0) && number != SIGCHLD && number != SIGPWR && self.child > 0)
            kill(self.child, number);
    }
}

/* Helpers end with PID 1. A published port must be free again once the jail is said to have ended. */
static void wait_for_helpers(void)
{
    struct pollfd signals = {.fd = self.watched[SIGNALS].fd, .events = POLLIN};
    int left = HELPER_MS / HELPER_TURN_MS;
    pid_t pid;

    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0 || (pid == 0 && left-- > 0))
        if (pid == 0) {
            poll(&signals, 1, HELPER_TURN_MS);
            read_signals();
        }
}

/* What was written last is in the pipes. Processes that are not the child's go on where it entered a jail or a plain
 * chroot, and must not keep this going. */
static void drain(void)
{
    while (self.watched[CHANNEL].fd >= 0) /* first: terminal and log socket of a short life may only come now */
        read_channel();
    for (int left = DRAIN_MOST; left > 0 && self.watched[OUTPUT].fd >= 0 && read_output(self.watched[OUTPUT].fd); left--)
        continue;
    for (int left = DRAIN_MOST; left > 0 && self.watched[SYSLOG].fd >= 0 && read_syslog(self.watched[SYSLOG].fd); left--)
        continue;
    for (int left = DRAIN_MOST; left > 0 && self.watched[MASTER].fd >= 0 && read_master(self.watched[MASTER].fd); left--)
        continue;
}

static void serve(void)
{
    struct pollfd *watched = self.watched;

    if ((watched[SIGNALS].revents & POLLIN) != 0)
        read_signals();
    if (watched[CHANNEL].fd >= 0 && watched[CHANNEL].revents != 0)
        read_channel();
    /* EAGAIN: a process with the ids of the pipe's maker can open it by /proc/self/fd/1 and was quicker. */
    if (watched[OUTPUT].fd >= 0 && watched[OUTPUT].revents != 0 && !read_output(watched[OUTPUT].fd) && errno != EAGAIN)
        watched[OUTPUT].fd = -1;
    if (watched[SYSLOG].fd >= 0 && watched[SYSLOG].revents != 0)
        read_syslog(watched[SYSLOG].fd);
    if (watched[MASTER].fd >= 0 && (watched[MASTER].revents & POLLOUT) != 0)
        flush_input();
    if (watched[MASTER].fd >= 0 && (watched[MASTER].revents & (POLLIN | POLLHUP | POLLERR)) != 0)
        read_master(watched[MASTER].fd);
    if (watched[INPUT].fd >= 0 && watched[INPUT].revents != 0)
        read_input();
    if (watched[LEASH].fd >= 0 && watched[LEASH].revents != 0) {
        watched[LEASH].fd = -1;
        kill(self.child, SIGKILL);
    }
}

static int finish(const struct child *child, int status)
{
    char ended[32];
    int own;

    drain();
    /* PID 1 ends with 0 once it has handed over the service's status; anything else befell PID 1 itself. */
    if (child->lifeline >= 0 && WIFEXITED(status) &&
        recv(child->lifeline, &own, sizeof own, MSG_DONTWAIT) == (ssize_t)sizeof own)
        status = own;
    restore_terminal();
    wait_for_helpers();
    if (WIFSIGNALED(status))
        snprintf(ended, sizeof ended, "signal %d", WTERMSIG(status));
    else
        snprintf(ended, sizeof ended, "exit %d", WEXITSTATUS(status));
    tell_of_memory();
    if (again_wanted(self.settings, status != 0)) {
        remove_leftovers();
        again(self.settings, ended, self.watched[SIGNALS].fd);
    }
    say("%s", ended);
    remove_leftovers();
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Whether the child has ended. Anything else that ends before it is a helper that was to serve it: whatever a helper
 * leaves in the background becomes the supervisor's. */
static bool reap(pid_t child, int *status)
{
    pid_t pid, lost = 0;
    int one;
    bool ended = false;

    while ((pid = waitpid(-1, &one, WNOHANG)) > 0)
        if (pid == child) {
            ended = true;
            *status = one;
        } else {
            lost = pid;
        }
    if (lost != 0 && !ended) {
        say("helper %d", (int)lost);
        log_line("network helper %d has ended: what it carried is cut off until the jail is restarted", (int)lost);
    }
    return ended;
}

int supervise(const struct child *child)
{
    int status;

    self.watched[CHANNEL].fd = child->channel;
    self.watched[OUTPUT].fd = child->output;
    self.watched[LEASH].fd = self.settings->leash;
    for (;;) {
        self.watched[MASTER].events = (short)(self.typed_length > 0 ? POLLIN | POLLOUT : POLLIN);
        /* Not watched while it has to wait: that it is hung up would be told again and again. */
        self.watched[INPUT].fd = self.input && self.typed_length == 0 ? STDIN_FILENO : -1;
        if (poll(self.watched, WATCHED, -1) < 0 && errno != EINTR)
            fail("supervise", "poll");
        serve();
        if (reap(child->pid, &status))
            break;
    }
    self.child = 0;
    return finish(child, status);
}
