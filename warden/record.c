#define _GNU_SOURCE
#include "record.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "channel.h"
#include "report.h"

/* include/uapi/linux/netlink.h and audit.h */
#define NETLINK_AUDIT 9
#define NLM_F_REQUEST 1
#define NLM_F_ACK 4
#define NLMSG_ERROR 2
#define AUDIT_SET 1001
#define AUDIT_ADD_RULE 1011
#define AUDIT_TTY_SET 1017
#define AUDIT_STATUS_ENABLED 1
#define AUDIT_STATUS_FAILURE 2
#define AUDIT_STATUS_PID 4
#define AUDIT_STATUS_RATE_LIMIT 8
#define AUDIT_STATUS_BACKLOG_LIMIT 16
#define AUDIT_FILTER_EXIT 4
#define AUDIT_ALWAYS 2
#define AUDIT_LOCKED 2
#define MASK_WORDS 64
#define FIELDS 64
#define BACKLOG 8192
#define BUFFER (4 << 20)
#define AUDIT_CONTROL 30 /* CAP_AUDIT_CONTROL of capabilities(7) */
#define TYPED 1319 /* AUDIT_TTY */
#define GATHERS "tty_audit_add_data" /* drivers/tty/tty_audit.c */

struct address {
    uint16_t family, zero;
    uint32_t port, groups;
};

struct header {
    uint32_t length;
    uint16_t type, flags;
    uint32_t sequence, port;
};

struct status {
    uint32_t mask, enabled, failure, pid, rate_limit, backlog_limit, lost, backlog, version, wait_time, waited;
};

struct rule {
    uint32_t flags, action, field_count, mask[MASK_WORDS], fields[FIELDS], values[FIELDS], field_flags[FIELDS], length;
};

struct tty_status {
    uint32_t enabled, passwords;
};

/* What tells who did what: SYSCALL, CWD and EXECVE of an exec, what was typed, what programs say of logins, and changes
 * of the audit subsystem itself. */
static const uint16_t told[] = {1300, 1305, 1307, 1309, TYPED, 1100, 1101, 1103, 1104, 1105, 1106, 1112, 1113, 1124};

static int kernel = -1;

static void ask(int fd, uint16_t type, const void *payload, size_t length)
{
    static uint32_t sequence;
    struct {
        struct header header;
        unsigned char payload[sizeof(struct rule)];
    } request = {.header = {.length = (uint32_t)(sizeof(struct header) + length), .type = type,
                            .flags = NLM_F_REQUEST | NLM_F_ACK, .sequence = ++sequence}};
    unsigned char answer[sizeof(struct header) + 8192];
    struct header header;
    int32_t error;

    memcpy(request.payload, payload, length);
    if (send(fd, &request, request.header.length, 0) < 0)
        fail("record", "send");
    for (;;) {
        const ssize_t got = recv(fd, answer, sizeof answer, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < (ssize_t)sizeof header)
            fail("record", "answer");
        memcpy(&header, answer, sizeof header);
        if (header.type != NLMSG_ERROR || header.sequence != sequence || got < (ssize_t)(sizeof header + sizeof error))
            continue; /* what happened meanwhile: nothing runs yet */
        memcpy(&error, answer + sizeof header, sizeof error);
        if (error != 0) {
            errno = -error;
            fail("record", "audit");
        }
        return;
    }
}

/* Where the kernel gathers what is typed until it is worth a message: the host makes it tell each key at once. */
static void tell_where_keys_are_gathered(void)
{
    char text[256], range[64], name[128], type;
    unsigned long address, start = 0;
    FILE *symbols = fopen("/proc/kallsyms", "re");

    while (symbols != NULL && fgets(text, sizeof text, symbols) != NULL) {
        if (sscanf(text, "%lx %c %127s", &address, &type, name) != 3)
            continue;
        if (start != 0 && address > start) {
            const int length = snprintf(range, sizeof range, "%lx %lx", start, address);
            channel_frame(FRAME_GATHERS, 0, range, (size_t)length);
            break;
        }
        if (strcmp(name, GATHERS) == 0)
            start = address;
    }
    if (symbols != NULL)
        fclose(symbols);
}

int record_open(void)
{
    const char *wanted = getenv("stockade_record");
    const int size = BUFFER;
    const struct tty_status tty = {.enabled = 1, .passwords = 1};
    struct rule rule = {.flags = AUDIT_FILTER_EXIT, .action = AUDIT_ALWAYS};
    struct status status = {
        .mask = AUDIT_STATUS_ENABLED | AUDIT_STATUS_FAILURE | AUDIT_STATUS_PID | AUDIT_STATUS_RATE_LIMIT |
                AUDIT_STATUS_BACKLOG_LIMIT,
        .enabled = 1, .failure = 1, .pid = (uint32_t)getpid(), .backlog_limit = BACKLOG,
    };

    if (wanted == NULL || *wanted == '\0')
        return -1;
    const int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_AUDIT);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) != 0)
        fail("record", "socket");
    rule.mask[SYS_execve / 32] |= 1U << (SYS_execve % 32);
    rule.mask[SYS_execveat / 32] |= 1U << (SYS_execveat % 32);
    ask(fd, AUDIT_SET, &status, sizeof status);
    ask(fd, AUDIT_ADD_RULE, &rule, sizeof rule);
    ask(fd, AUDIT_TTY_SET, &tty, sizeof tty); /* of this process, and so of all that come from it */
    status = (struct status){.mask = AUDIT_STATUS_ENABLED, .enabled = AUDIT_LOCKED};
    ask(fd, AUDIT_SET, &status, sizeof status);
    tell_where_keys_are_gathered();
    /* Locked or not, whoever has this may stop the record of its own terminal (AUDIT_TTY_SET): nobody but PID 1 has it. */
    if (prctl(PR_CAPBSET_DROP, AUDIT_CONTROL, 0, 0, 0) != 0)
        fail("record", "capability");
    kernel = fd;
    return fd;
}

/* `audit(TIME:NUMBER): tty pid=1 …`: what this process reads from a terminal is the line to the host, which nobody
 * types. */
static bool is_own_line(const struct header *header, const unsigned char *text, size_t length)
{
    char own[32];
    const size_t count = (size_t)snprintf(own, sizeof own, "): tty pid=%d ", (int)getpid());
    const unsigned char *end = memchr(text, ')', length);

    return header->type == TYPED && end != NULL && (size_t)(text + length - end) > count && memcmp(end, own, count) == 0;
}

void record_read(void)
{
    unsigned char message[sizeof(struct header) + 16384];
    struct header header;

    while (kernel >= 0) {
        struct address sender = {0};
        socklen_t size = sizeof sender;
        const ssize_t got =
            recvfrom(kernel, message, sizeof message, MSG_DONTWAIT, (struct sockaddr *)(void *)&sender, &size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < (ssize_t)sizeof header)
            return;
        if (sender.port != 0) /* root of the guest may send here too: only the kernel is 0 (netlink(7)) */
            continue;
        memcpy(&header, message, sizeof header);
        if (is_own_line(&header, message + sizeof header, (size_t)got - sizeof header))
            continue;
        for (size_t i = 0; i < sizeof told / sizeof *told; i++)
            if (header.type == told[i])
                channel_record(header.type, message + sizeof header, (size_t)got - sizeof header);
    }
}
