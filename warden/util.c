#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "report.h"
#include "sys.h"

void channel_pair(int ends[2])
{
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
        fail("channel", "socketpair");
}

void channel_send(int channel, enum message_kind kind, int error, const void *text, size_t length, const int *fds,
                  size_t fd_count)
{
    struct { int32_t kind, error; } head = {(int32_t)kind, error};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)(uintptr_t)text, length}};
    union { char bytes[CMSG_SPACE(MESSAGE_FDS * sizeof(int))]; struct cmsghdr align; } control = {{0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

    if (fd_count > 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = (unsigned)CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = (unsigned)CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, fd_count * sizeof(int));
    }
    /* A launcher that is gone can be told nothing; its lifeline says the rest. */
    if (sendmsg(channel, &message, MSG_NOSIGNAL) < 0 && kind != MESSAGE_FAILED)
        fail("channel", "sendmsg");
}

/* musl's CMSG_NXTHDR mixes signs inside the macro. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
static struct cmsghdr *next_part(struct msghdr *header, struct cmsghdr *part)
{
    return CMSG_NXTHDR(header, part);
}
#pragma GCC diagnostic pop

bool channel_receive(int channel, struct message *message)
{
    struct { int32_t kind, error; } head = {0, 0};
    struct iovec parts[2] = {{&head, sizeof head}, {message->text, sizeof message->text - 1}};
    union {
        char bytes[CMSG_SPACE(MESSAGE_FDS * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
        struct cmsghdr align;
    } control;
    struct msghdr header = {
        .msg_iov = parts, .msg_iovlen = 2, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got;

    /* ECONNRESET tells once that the other end went with something unread; what that end sent itself still comes. */
    do
        got = recvmsg(channel, &header, MSG_CMSG_CLOEXEC);
    while (got < 0 && (errno == EINTR || errno == ECONNRESET));
    if (got == 0)
        return false;
    if (got < 0)
        fail("channel", "recvmsg");
    if ((size_t)got < sizeof head || (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
        errno = EPROTO;
        fail("channel", "recvmsg");
    }
    message->kind = (enum message_kind)head.kind;
    message->error = head.error;
    message->sender = 0;
    message->length = (size_t)got - sizeof head;
    message->text[message->length] = '\0';
    message->fd_count = 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part != NULL; part = next_part(&header, part)) {
        if (part->cmsg_level != SOL_SOCKET)
            continue;
        if (part->cmsg_type == SCM_RIGHTS) {
            message->fd_count = ((size_t)part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            if (message->fd_count > MESSAGE_FDS) { /* without credentials there would be room for more */
                errno = EPROTO;
                fail("channel", "recvmsg");
            }
            memcpy(message->fds, CMSG_DATA(part), message->fd_count * sizeof(int));
        } else if (part->cmsg_type == SCM_CREDENTIALS) {
            struct ucred credentials;
            memcpy(&credentials, CMSG_DATA(part), sizeof credentials);
            message->sender = credentials.pid;
        }
    }
    return true;
}

static int compare(const void *left, const void *right)
{
    const int a = *(const int *)left, b = *(const int *)right;

    return (a > b) - (a < b);
}

void keep_only(const int *fds, size_t count)
{
    int sorted[MESSAGE_FDS + 8];
    unsigned next = 0;

    if (count > sizeof sorted / sizeof *sorted) {
        errno = EMFILE;
        fail("descriptors", "too many to keep");
    }
    memcpy(sorted, fds, count * sizeof *fds);
    qsort(sorted, count, sizeof *sorted, compare);
    for (size_t i = 0; i < count; i++) {
        if (sorted[i] < 0 || (unsigned)sorted[i] < next)
            continue;
        if ((unsigned)sorted[i] > next && sys_close_range(next, (unsigned)sorted[i] - 1) != 0)
            fail("descriptors", "close_range");
        next = (unsigned)sorted[i] + 1;
    }
    if (sys_close_range(next, UINT_MAX) != 0)
        fail("descriptors", "close_range");
}

static char *arguments;
static size_t arguments_length;

void remember_arguments(int argc, char **argv)
{
    /* The kernel lays them end to end (proc(5), cmdline). */
    arguments = argv[0];
    arguments_length = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) - argv[0]);
}

void hide_arguments(void)
{
    static const char name[] = "warden";

    memset(arguments, 0, arguments_length);
    if (arguments_length >= sizeof name)
        memcpy(arguments, name, sizeof name);
}

void open_standard(void)
{
    int fd;

    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd < 0)
        fail("descriptors", "/dev/null");
    close(fd);
}

void close_standard(void)
{
    const int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    for (int target = STDIN_FILENO; target <= STDERR_FILENO; target++)
        if (fd < 0 || dup2(fd, target) < 0)
            fail("descriptors", "/dev/null");
    if (fd > STDERR_FILENO)
        close(fd);
}

char *read_all(int fd, size_t limit, size_t *length)
{
    size_t room = 64 * 1024, used = 0;
    char *bytes = malloc(room);

    for (;;) {
        if (bytes == NULL)
            fail("memory", "");
        const ssize_t got = read(fd, bytes + used, room - used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            free(bytes);
            return NULL;
        }
        if (got == 0)
            break;
        used += (size_t)got;
        if (used > limit) {
            free(bytes);
            errno = EFBIG;
            return NULL;
        }
        if (used == room)
            bytes = realloc(bytes, room *= 2);
    }
    *length = used;
    return bytes;
}

bool write_all(int fd, const char *bytes, size_t length)
{
    while (length > 0) {
        const ssize_t put = write(fd, bytes, length);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return false;
        bytes += put;
        length -= (size_t)put;
    }
    return true;
}

bool write_file(const char *path, const char *value)
{
    const int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0)
        return false;
    const bool written = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
    const int error = errno;
    close(fd);
    errno = error;
    return written;
}

const char *decimal(uint64_t number, char *text)
{
    snprintf(text, 24, "%llu", (unsigned long long)number);
    return text;
}
