#define _GNU_SOURCE
#include "handover.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "channel.h"
#include "report.h"

#define WATCHED (3 * SESSIONS + 3)
#define NOTICES "stockade/notices" /* an abstract name: no file system but the root is there yet */

static int notices_open(void)
{
    struct sockaddr_un place = {.sun_family = AF_UNIX, .sun_path = "\0" NOTICES};
    const socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + sizeof NOTICES);
    const int yes = 1;

    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) != 0 ||
        bind(fd, (const struct sockaddr *)&place, length) != 0)
        fail("notices", NOTICES);
    return fd;
}

/* Any process can send here: what counts is the kernel's word that it was PID 1. */
static bool from_first_process(const struct msghdr *message)
{
    const struct cmsghdr *part = CMSG_FIRSTHDR(message);
    struct ucred sender;

    if (part == NULL || part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_CREDENTIALS)
        return false;
    memcpy(&sender, CMSG_DATA(part), sizeof sender);
    return sender.pid == 1;
}

/* True when one of the lines is READY=1. */
static bool says_ready(const char *text)
{
    const char *found = strstr(text, "READY=1");
    return found != NULL && (found == text || found[-1] == '\n') && (found[7] == '\0' || found[7] == '\n');
}

static bool notices_read(int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control;
    char text[1024];
    bool ready = false;

    for (;;) {
        struct iovec part = {text, sizeof text - 1};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                                 .msg_controllen = sizeof control.bytes};
        const ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return ready;
        text[got] = '\0';
        ready = ready || (from_first_process(&message) && says_ready(text));
    }
}

static int child_signals_open(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    const int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        fail("signals", "signalfd");
    return fd;
}

static _Noreturn void serve(int notices)
{
    struct pollfd watched[WATCHED];
    struct signalfd_siginfo seen;
    int status;
    pid_t pid;

    setsid();
    const int signals = child_signals_open();
    for (;;) {
        watched[0] = (struct pollfd){.fd = signals, .events = POLLIN};
        watched[1] = (struct pollfd){.fd = notices, .events = POLLIN};
        const size_t count = 2 + channel_watch(watched + 2, WATCHED - 2);
        poll(watched, count, -1);
        if (notices_read(notices))
            channel_frame(FRAME_READY, 0, "", 0);
        while (read(signals, &seen, sizeof seen) == (ssize_t)sizeof seen)
            ;
        while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
            channel_child(pid, status);
        /* As Ctrl-Alt-Del: what ends the system is PID 1's to say. */
        if (channel_serve() == FRAME_STOP)
            kill(1, SIGINT);
    }
}

_Noreturn void hand_over(const char *program)
{
    static char home[] = "HOME=/", terminal[] = "TERM=linux", socket_name[] = "NOTIFY_SOCKET=@" NOTICES;
    static char *environment[] = {home, terminal, socket_name, NULL};
    const int notices = notices_open();
    const pid_t child = fork();

    if (child < 0)
        fail("fork", program);
    if (child == 0)
        serve(notices);
    execve(program, (char *[]){(char *)(uintptr_t)program, NULL}, environment);
    fail("exec", program);
}
