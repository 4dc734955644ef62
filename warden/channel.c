#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "files.h"
#include "report.h"
#include "util.h"

#define HEADER 8U
#define PTY_PEER 0x5441UL /* TIOCGPTPEER */
#define STRINGS_MOST 512U

struct session {
    bool used, exited, input_ended;
    unsigned number;
    pid_t pid;
    int input, output, error; /* -1: closed; a terminal is one descriptor for input and output */
    int status;
    uint32_t credit;         /* what may still be sent to the host */
    char pending[WINDOW];    /* standard input that waits */
    size_t pending_length;
};

static int line = -1;
static bool opened;
static struct session sessions[SESSIONS];
static unsigned char buffer[HEADER + FRAME_MOST];
static size_t buffered;

uint32_t exit_number(int status)
{
    return WIFSIGNALED(status) ? 128U + (uint32_t)WTERMSIG(status) : (uint32_t)WEXITSTATUS(status);
}

void channel_open(const char *device)
{
    struct termios raw;

    line = open(device, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (line < 0 || tcgetattr(line, &raw) != 0)
        fail("line", device);
    cfmakeraw(&raw);
    if (tcsetattr(line, TCSANOW, &raw) != 0)
        fail("line", device);
    opened = true;
}

bool channel_lost(void)
{
    return opened && line < 0;
}

void channel_frame(enum frame_kind kind, unsigned session, const void *payload, size_t length)
{
    unsigned char frame[HEADER + DATA_MOST] = {(unsigned char)kind, 0, (unsigned char)(session >> 8),
                                               (unsigned char)session};

    if (line < 0 || length > DATA_MOST)
        return;
    frame[6] = (unsigned char)(length >> 8);
    frame[7] = (unsigned char)length;
    memcpy(frame + HEADER, payload, length);
    if (!write_all(line, (const char *)frame, HEADER + length)) {
        close(line);
        line = -1;
    }
}

static uint32_t number_at(const unsigned char *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static unsigned short_at(const unsigned char *bytes)
{
    return (unsigned)bytes[0] << 8 | bytes[1];
}

void channel_number(enum frame_kind kind, unsigned session, uint32_t number)
{
    const unsigned char bytes[4] = {(unsigned char)(number >> 24), (unsigned char)(number >> 16),
                                    (unsigned char)(number >> 8), (unsigned char)number};

    channel_frame(kind, session, bytes, sizeof bytes);
}

void channel_record(unsigned type, const unsigned char *text, size_t length)
{
    unsigned char part[DATA_MOST] = {(unsigned char)(type >> 8), (unsigned char)type};

    do {
        const size_t room = sizeof part - 2, count = length < room ? length : room;
        memcpy(part + 2, text, count);
        channel_frame(FRAME_RECORD, length > room, part, count + 2);
        text += count;
        length -= count;
    } while (length > 0);
}

static struct session *find(unsigned number)
{
    for (size_t i = 0; i < SESSIONS; i++)
        if (sessions[i].used && sessions[i].number == number)
            return &sessions[i];
    return NULL;
}

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static _Noreturn void child_fails(const char *step, int error)
{
    dprintf(STDERR_FILENO, "%s: %s\n", step, strerror(error));
    _exit(error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

/* The strings after the numbers of an EXEC frame; NULL unless all are there and end in a NUL. */
static char **strings_of(const unsigned char *payload, size_t length, size_t *count)
{
    char **strings = calloc(STRINGS_MOST + 1, sizeof *strings);
    char *copy = malloc(length + 1);
    size_t at = 0;

    *count = 0;
    if (strings == NULL || copy == NULL || length == 0 || payload[length - 1] != '\0') {
        free(strings);
        free(copy);
        return NULL;
    }
    memcpy(copy, payload, length);
    for (; at < length && *count < STRINGS_MOST; at += strlen(copy + at) + 1)
        strings[(*count)++] = copy + at;
    return strings;
}

static _Noreturn void command(char **strings, size_t count, size_t argc, const int fds[3], bool terminal)
{
    sigset_t none;
    char *end, **argv = calloc(argc + 1, sizeof *argv);
    const unsigned long uid = strtoul(strings[1], &end, 10);
    const unsigned long gid = *end == ':' ? strtoul(end + 1, NULL, 10) : uid;

    setsid();
    if (terminal && ioctl(fds[0], TIOCSCTTY, 0) != 0)
        child_fails("terminal", errno);
    for (int fd = 0; fd < 3; fd++)
        if (dup2(fds[fd], fd) < 0)
            child_fails("dup2", errno);
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL); /* KILL and STOP refuse */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
    const int standard[] = {0, 1, 2};
    keep_only(standard, 3);
    if (argv == NULL)
        child_fails("memory", errno);
    memcpy(argv, strings + 2, argc * sizeof *argv);
    if (chdir(strings[0]) != 0)
        child_fails(strings[0], errno);
    if (uid != 0 || gid != 0)
        if (setgroups(0, NULL) != 0 || setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) != 0 ||
            setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) != 0)
            child_fails(strings[1], errno);
    if (is_files_command(argv[0]))
        _exit(files_command(argv));
    clearenv();
    for (size_t i = 2 + argc; i < count; i++)
        putenv(strings[i]);
    execvp(argv[0], argv);
    child_fails(argv[0], errno);
}

/* Pairs of descriptors: [0] for the child, [1] for the warden. */
static bool pipes_open(int ends[3][2], bool terminal, unsigned rows, unsigned columns)
{
    const struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    int unlock = 0, pair[2];

    if (terminal) {
        const int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
        if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) != 0 || ioctl(master, TIOCSWINSZ, &size) != 0)
            return false;
        const int slave = ioctl(master, PTY_PEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
        for (int i = 0; i < 3; i++) {
            ends[i][0] = slave;
            ends[i][1] = i == 2 ? -1 : master;
        }
        return slave >= 0;
    }
    for (int i = 0; i < 3; i++) {
        if (pipe2(pair, O_CLOEXEC) != 0)
            return false;
        ends[i][0] = pair[i == 0 ? 0 : 1];
        ends[i][1] = pair[i == 0 ? 1 : 0];
        fcntl(ends[i][1], F_SETFL, O_NONBLOCK);
    }
    return true;
}

static void refuse(unsigned number, const char *why)
{
    channel_frame(FRAME_STDERR, number, why, strlen(why));
    channel_number(FRAME_EXIT, number, EXIT_WALLS);
}

static void start(unsigned number, const unsigned char *payload, size_t length)
{
    struct session *session = NULL;
    int ends[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
    size_t count = 0;

    for (size_t i = 0; i < SESSIONS && session == NULL; i++)
        if (!sessions[i].used)
            session = &sessions[i];
    char **strings = length < HEADER ? NULL : strings_of(payload + HEADER, length - HEADER, &count);
    const size_t argc = strings == NULL ? 0 : short_at(payload + 6);
    const bool terminal = strings != NULL && (short_at(payload) & EXEC_TERMINAL) != 0;
    if (session == NULL || find(number) != NULL || argc == 0 || count < argc + 2) {
        refuse(number, "too many commands at once, or a malformed one\n");
    } else if (!pipes_open(ends, terminal, short_at(payload + 2), short_at(payload + 4))) {
        refuse(number, "no terminal or pipe for the command\n");
    } else {
        const int inner[3] = {ends[0][0], ends[1][0], ends[2][0]};
        const pid_t pid = fork();
        if (pid == 0)
            command(strings, count, argc, inner, terminal);
        if (pid < 0) {
            refuse(number, "no process for the command\n");
        } else {
            memset(session, 0, offsetof(struct session, pending));
            session->pending_length = 0;
            session->used = true;
            session->number = number;
            session->pid = pid;
            session->input = ends[0][1];
            session->output = terminal ? fcntl(ends[1][1], F_DUPFD_CLOEXEC, 0) : ends[1][1];
            session->error = ends[2][1];
            session->credit = WINDOW;
            for (int i = 0; i < 3; i++)
                ends[i][1] = -1;
        }
    }
    for (int i = 0; i < 3; i++) {
        const bool shared = i > 0 && terminal; /* one descriptor, three times */
        if (!shared) {
            shut(&ends[i][0]);
            shut(&ends[i][1]);
        }
    }
    if (strings != NULL)
        free(strings[0]);
    free(strings);
}

static void feed(struct session *session)
{
    size_t done = 0;

    while (session->input >= 0 && done < session->pending_length) {
        const ssize_t put = write(session->input, session->pending + done, session->pending_length - done);
        if (put < 0 && errno == EAGAIN)
            break;
        if (put < 0) { /* the command reads no more: what is left is dropped */
            shut(&session->input);
            done = session->pending_length;
            break;
        }
        done += (size_t)put;
    }
    if (session->input < 0)
        done = session->pending_length;
    memmove(session->pending, session->pending + done, session->pending_length - done);
    session->pending_length -= done;
    if (done > 0)
        channel_number(FRAME_CREDIT, session->number, (uint32_t)done);
    if (session->input_ended && session->pending_length == 0)
        shut(&session->input);
}

/* True while more may come from this descriptor. */
static bool drain(struct session *session, int *fd, enum frame_kind kind)
{
    char bytes[DATA_MOST];

    while (*fd >= 0 && session->credit > 0) {
        const size_t room = session->credit < sizeof bytes ? session->credit : sizeof bytes;
        const ssize_t got = read(*fd, bytes, room);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return false;
        if (got <= 0) { /* EIO: the last process has closed the terminal */
            shut(fd);
            return false;
        }
        session->credit -= (uint32_t)got;
        channel_frame(kind, session->number, bytes, (size_t)got);
    }
    return *fd >= 0;
}

static void pump(struct session *session)
{
    feed(session);
    const bool more_output = drain(session, &session->output, FRAME_STDOUT);
    const bool more_error = drain(session, &session->error, FRAME_STDERR);
    /* Processes that the command left behind may keep the pipes open: they are not waited for. */
    if (session->exited && !more_output && !more_error) {
        channel_number(FRAME_EXIT, session->number, exit_number(session->status));
        shut(&session->input);
        shut(&session->output);
        shut(&session->error);
        session->used = false;
    }
}

static void take_input(struct session *session, const unsigned char *payload, size_t length)
{
    if (length > sizeof session->pending - session->pending_length)
        return; /* more than its credit */
    memcpy(session->pending + session->pending_length, payload, length);
    session->pending_length += length;
}

static enum frame_kind take(enum frame_kind kind, unsigned number, const unsigned char *payload, size_t length)
{
    struct session *session = find(number);

    if (kind == FRAME_STOP || kind == FRAME_SERVICE)
        return kind;
    if (kind == FRAME_EXEC) {
        start(number, payload, length);
        return 0;
    }
    if (session == NULL)
        return 0;
    if (kind == FRAME_DATA)
        take_input(session, payload, length);
    else if (kind == FRAME_EOF)
        session->input_ended = true;
    else if (kind == FRAME_CREDIT && length == 4)
        session->credit += number_at(payload);
    else if (kind == FRAME_SIGNAL && length == 4 && !session->exited)
        kill(-session->pid, (int)number_at(payload));
    else if (kind == FRAME_RESIZE && length == 4 && session->input >= 0) {
        const struct winsize size = {.ws_row = (unsigned short)short_at(payload),
                                     .ws_col = (unsigned short)short_at(payload + 2)};
        ioctl(session->input, TIOCSWINSZ, &size); /* ENOTTY: a command on pipes */
    }
    return 0;
}

static enum frame_kind read_line(void)
{
    enum frame_kind request = 0;
    size_t at = 0;

    const ssize_t got = read(line, buffer + buffered, sizeof buffer - buffered);
    if (got <= 0) {
        if (got == 0 || (errno != EINTR && errno != EAGAIN))
            shut(&line);
        return 0;
    }
    buffered += (size_t)got;
    channel_number(FRAME_TAKEN, 0, (uint32_t)got);
    while (buffered - at >= HEADER) {
        const uint32_t length = number_at(buffer + at + 4);
        if (length > FRAME_MOST) { /* nothing on this line can be trusted any more */
            dprintf(STDERR_FILENO, "stockade: the serial line is out of step\n");
            shut(&line);
            return 0;
        }
        if (buffered - at < HEADER + length)
            break;
        const enum frame_kind seen = take((enum frame_kind)buffer[at], short_at(buffer + at + 2), buffer + at + HEADER,
                                          length);
        request = seen == 0 ? request : seen;
        at += HEADER + length;
    }
    memmove(buffer, buffer + at, buffered - at);
    buffered -= at;
    return request;
}

static void want(struct pollfd *watched, size_t room, size_t *count, int fd, short events)
{
    if (fd >= 0 && *count < room)
        watched[(*count)++] = (struct pollfd){.fd = fd, .events = events};
}

size_t channel_watch(struct pollfd *watched, size_t room)
{
    size_t count = 0;

    want(watched, room, &count, line, POLLIN);
    for (size_t i = 0; i < SESSIONS; i++) {
        const struct session *session = &sessions[i];
        if (!session->used)
            continue;
        if (session->pending_length > 0)
            want(watched, room, &count, session->input, POLLOUT);
        if (session->credit > 0) {
            want(watched, room, &count, session->output, POLLIN);
            want(watched, room, &count, session->error, POLLIN);
        }
    }
    return count;
}

enum frame_kind channel_serve(void)
{
    struct pollfd ready = {.fd = line, .events = POLLIN};
    enum frame_kind request = 0;

    if (line >= 0 && poll(&ready, 1, 0) > 0)
        request = read_line();
    for (size_t i = 0; i < SESSIONS; i++)
        if (sessions[i].used)
            pump(&sessions[i]);
    return request;
}

bool channel_child(pid_t pid, int status)
{
    for (size_t i = 0; i < SESSIONS; i++)
        if (sessions[i].used && !sessions[i].exited && sessions[i].pid == pid) {
            sessions[i].exited = true;
            sessions[i].status = status;
            return true;
        }
    return false;
}
