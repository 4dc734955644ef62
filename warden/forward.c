#define _GNU_SOURCE
#include "forward.h"

#include "report.h"
#include "sys.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SOCKETS 64
#define COPIED (1U << 16)     /* bytes up to which copying costs less than two splices */
#define CHUNK (1U << 20)      /* bytes that one splice asks for, and the size of a pipe */
#define TURN (4U * CHUNK)     /* bytes that a connection may move before the others get their turn */
#define PAUSE_MS 200          /* while no more connections can be taken */
#define ACCEPTED 16           /* connections taken before those that are open get their turn */
#define LAST_MS 1500          /* for what an ended jail still has to say; less than the supervisor waits for helpers */
#define SESSIONS 512          /* UDP peers at once */
#define SESSION_SECONDS 60
#define DATAGRAM 65536
#define EVENTS 128

enum kind { LISTENER, DATAGRAMS, OUTER, INNER, SESSION, LIFELINE };

/* First member of everything that epoll points to. */
struct source {
    enum kind kind;
    int fd;
};

struct gate {
    struct source source;
    uint16_t port;
};

/* What flows one way. Little is copied through a buffer; a bulk of data goes by splice(2) through a pipe, which is made
 * when there is need of one. `held` bytes are in `rest`, if that is not NULL, else in the pipe. */
struct half {
    int from, to;
    int pipe[2];
    char *rest;
    size_t held, rest_at;
    bool bulk, ending, ended, shut;
};

struct stream {
    struct source outer;    /* the client's socket */
    struct source inner;
    struct half half[2];    /* 0: client to service, 1: back */
    uint16_t port;
    int family;             /* in which the service is asked: IPv4, and then IPv6 if nobody listens there */
    bool connected, closed;
    struct stream *next, *previous; /* of the open ones, `next` also of the closed ones */
};

/* One UDP peer: datagrams from it go out of `source.fd`, answers go back as they came. */
struct session {
    struct source source;
    struct gate *gate;
    struct sockaddr_storage peer;
    socklen_t peer_length;
    char control[CMSG_SPACE(sizeof(struct in6_pktinfo))];
    socklen_t control_length;
    int family;
    bool answered;
    long long used; /* ms */
    struct session *next_ended;
};

static int poller = -1;
static struct gate gates[SOCKETS];
static struct session *sessions[SESSIONS];
static struct stream *open_streams, *closed_streams;
static struct session *ended_sessions;
static time_t paused;  /* since when no more connections are taken; 0: they are */
static long long last; /* ms: when this process ends, whatever is left. 0: the jail lives */
static char datagram[DATAGRAM];
static char copied[COPIED];

static long long now_ms(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (long long)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static time_t now(void)
{
    return (time_t)(now_ms() / 1000);
}

#define STREAM_EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

static int watch(int operation, int fd, struct source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};

    return epoll_ctl(poller, operation, fd, &event);
}

/* Connects to `port` on the jail's loopback address of one family, or begins to. */
static int connect_inside(int family, int type, uint16_t port)
{
    const struct sockaddr_in four = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const struct sockaddr_in6 six = {
        .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    const void *address = family == AF_INET ? (const void *)&four : (const void *)&six;
    const int fd = socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0 || connect(fd, address, family == AF_INET ? sizeof four : sizeof six) == 0 || errno == EINPROGRESS)
        return fd;
    close(fd);
    return -1;
}

/* A client whose service cannot be reached sees a reset, as it would from the service's own host. */
static void refuse(int fd)
{
    const struct linger at_once = {.l_onoff = 1, .l_linger = 0};

    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(fd);
}

static void close_stream(struct stream *stream, bool broken)
{
    if (stream->closed)
        return;
    stream->closed = true;
    if (broken) {
        refuse(stream->outer.fd);
        refuse(stream->inner.fd);
    } else {
        close(stream->outer.fd);
        close(stream->inner.fd);
    }
    for (int way = 0; way < 2; way++) {
        free(stream->half[way].rest);
        if (stream->half[way].pipe[0] >= 0) {
            close(stream->half[way].pipe[0]);
            close(stream->half[way].pipe[1]);
        }
    }
    if (stream->next != NULL)
        stream->next->previous = stream->previous;
    *(stream->previous != NULL ? &stream->previous->next : &open_streams) = stream->next;
    stream->next = closed_streams;
    closed_streams = stream;
}

/* Other events of the same epoll_wait may still point to what was closed: freed after them. */
static void free_closed(void)
{
    while (ended_sessions != NULL) {
        struct session *next = ended_sessions->next_ended;

        free(ended_sessions);
        ended_sessions = next;
    }
    while (closed_streams != NULL) {
        struct stream *next = closed_streams->next;

        free(closed_streams);
        closed_streams = next;
    }
}

enum progress { WAITING, MORE, ENDED, BROKEN };

static bool is_busy(void)
{
    return errno == EAGAIN || errno == EINTR;
}

/* A pipe for a bulk of data; without one everything is copied. */
static void begin_bulk(struct half *half)
{
    if (half->pipe[0] < 0 && pipe2(half->pipe, O_NONBLOCK | O_CLOEXEC) == 0)
        fcntl(half->pipe[0], F_SETPIPE_SZ, CHUNK); /* a refused one is smaller, no more */
    half->bulk = half->pipe[0] >= 0;
}

/* Sends on what is held. False when nothing more can be sent now, or at all. */
static bool flush(struct half *half, enum progress *progress)
{
    while (half->held > 0) {
        const ssize_t out =
            half->rest != NULL
                ? send(half->to, half->rest + half->rest_at, half->held, MSG_DONTWAIT | MSG_NOSIGNAL)
                : splice(half->pipe[0], NULL, half->to, NULL, half->held, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
        if (out <= 0) {
            *progress = is_busy() ? WAITING : BROKEN;
            return false;
        }
        half->held -= (size_t)out;
        half->rest_at += (size_t)out;
    }
    free(half->rest);
    half->rest = NULL;
    return true;
}

/* Reads into the pipe. As splice(2). */
static ssize_t take_bulk(struct half *half)
{
    const ssize_t in = splice(half->from, NULL, half->pipe[1], NULL, CHUNK, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);

    if (in > 0)
        half->held = (size_t)in;
    return in;
}

/* Reads and sends on at once; what cannot be sent is held. As recv(2). */
static ssize_t take_little(struct half *half)
{
    const ssize_t in = recv(half->from, copied, sizeof copied, MSG_DONTWAIT);

    if (in <= 0)
        return in;
    const ssize_t out = send(half->to, copied, (size_t)in, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (out < 0 && !is_busy())
        return -1;
    const size_t sent = out < 0 ? 0 : (size_t)out;
    if (sent < (size_t)in) {
        half->rest = malloc((size_t)in - sent);
        if (half->rest == NULL)
            return -1;
        memcpy(half->rest, copied + sent, (size_t)in - sent);
        half->held = (size_t)in - sent;
        half->rest_at = 0;
    }
    if ((size_t)in == sizeof copied)
        begin_bulk(half);
    return in;
}

/* Moves what has come, until there is no more, no room for it, or it is the others' turn. */
static enum progress pump(struct half *half)
{
    enum progress progress = WAITING;
    size_t moved = 0;

    for (;;) {
        if (!flush(half, &progress))
            return progress;
        if (half->ended)
            return ENDED;
        /* Not before the flush: what is still held when nothing more comes would wait for ever. */
        if (moved >= TURN)
            return MORE;
        const bool bulk = half->bulk;
        const ssize_t in = bulk ? take_bulk(half) : take_little(half);
        if (in == 0) {
            half->ended = true;
            continue;
        }
        if (in < 0 && !is_busy())
            return BROKEN;
        if (in < 0) {
            half->bulk = half->bulk && moved > sizeof copied;
            return WAITING;
        }
        moved += (size_t)in;
        /* A short read has emptied a stream socket (epoll(7)), unless its end came with it. */
        if (!bulk && (size_t)in < sizeof copied && half->held == 0 && !half->ending)
            return WAITING;
    }
}

/* Nobody is left to take what the client sent. Unread it would make of the close a reset, which takes away what is on
 * its way to the client. */
static void forget(int client)
{
    for (size_t left = TURN; left > 0 && recv(client, copied, sizeof copied, MSG_DONTWAIT) > 0; left -= sizeof copied)
        continue;
}

static void run_half(struct stream *stream, int way, struct source *source)
{
    struct half *half = &stream->half[way], *other = &stream->half[1 - way];
    const enum progress progress = half->shut ? WAITING : pump(half);

    if (progress == ENDED && last != 0)
        forget(stream->outer.fd);
    if (progress == BROKEN)
        close_stream(stream, true);
    else if (progress == ENDED && (other->shut || last != 0))
        close_stream(stream, false);
    else if (progress == ENDED)
        half->shut = shutdown(half->to, SHUT_WR) == 0 || errno == ENOTCONN;
    else if (progress == MORE)
        /* Changing an edge-triggered watch reports what is ready once again. */
        watch(EPOLL_CTL_MOD, source->fd, source, STREAM_EVENTS);
    if (progress == ENDED && !stream->closed && !half->shut)
        close_stream(stream, true);
}

static bool reach(struct stream *stream, int family)
{
    const int yes = 1, fd = connect_inside(family, SOCK_STREAM, stream->port);

    if (fd < 0)
        return false;
    if (watch(EPOLL_CTL_ADD, fd, &stream->inner, STREAM_EVENTS) != 0) {
        close(fd);
        return false;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    stream->family = family;
    stream->inner = (struct source){.kind = INNER, .fd = fd};
    stream->half[0].to = stream->half[1].from = fd;
    return true;
}

/* Nothing is read of a client whose service has not answered yet: only that the client is gone is noticed. */
static void run_unconnected(struct stream *stream, const struct source *source, uint32_t events)
{
    const bool failed = (events & (EPOLLERR | EPOLLHUP)) != 0;

    if (source->kind == INNER && failed && stream->family == AF_INET) {
        close(stream->inner.fd);
        stream->inner.fd = -1;
        if (!reach(stream, AF_INET6))
            close_stream(stream, true);
    } else if (failed) {
        close_stream(stream, true);
    } else if (source->kind == INNER && (events & EPOLLOUT) != 0) {
        stream->connected = true;
        /* Reports what came in the meantime. */
        if (watch(EPOLL_CTL_MOD, stream->outer.fd, &stream->outer, STREAM_EVENTS) != 0)
            close_stream(stream, true);
    }
}

/* What arrived at one socket goes to the other; a socket that takes data again gets what was held for it. */
static void run_stream(struct stream *stream, struct source *source, uint32_t events)
{
    const int in = source->kind == OUTER ? 0 : 1, out = 1 - in;

    if (!stream->closed && !stream->connected)
        run_unconnected(stream, source, events);
    if (!stream->connected)
        return;
    if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0)
        stream->half[in].ending = true;
    if (!stream->closed && (events & EPOLLOUT) != 0 && stream->half[out].held > 0 && (last == 0 || out == 1))
        run_half(stream, out, out == 0 ? &stream->outer : &stream->inner);
    if (!stream->closed && (events & ~(uint32_t)EPOLLOUT) != 0 && (last == 0 || in == 1))
        run_half(stream, in, source);
}

static struct stream *stream_of(struct source *source)
{
    const size_t offset = source->kind == OUTER ? offsetof(struct stream, outer) : offsetof(struct stream, inner);

    return (struct stream *)(void *)((char *)source - offset);
}

static void begin_stream(int client, uint16_t port)
{
    struct stream *stream = calloc(1, sizeof *stream);

    if (stream == NULL) {
        refuse(client);
        return;
    }
    stream->next = open_streams;
    if (open_streams != NULL)
        open_streams->previous = stream;
    open_streams = stream;
    stream->port = port;
    stream->outer = (struct source){.kind = OUTER, .fd = client};
    stream->inner.fd = -1;
    stream->half[0] = (struct half){.from = client, .to = -1, .pipe = {-1, -1}};
    stream->half[1] = (struct half){.from = -1, .to = client, .pipe = {-1, -1}};
    if (watch(EPOLL_CTL_ADD, client, &stream->outer, EPOLLET) != 0 ||
        (!reach(stream, AF_INET) && !reach(stream, AF_INET6)))
        close_stream(stream, true);
}

/* Clients that cannot be taken now wait in the kernel's queue, and must not wake the forwarder over and over. */
static void listen_again(bool yes)
{
    for (size_t i = 0; i < SOCKETS; i++)
        if (gates[i].port != 0 && gates[i].source.kind == LISTENER)
            watch(EPOLL_CTL_MOD, gates[i].source.fd, &gates[i].source, yes ? EPOLLIN : 0);
    paused = yes ? 0 : now();
}

static void accept_streams(const struct gate *gate)
{
    for (int taken = 0; taken < ACCEPTED; taken++) {
        const int client = accept4(gate->source.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (client < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM))
            listen_again(false);
        if (client < 0)
            return;
        begin_stream(client, gate->port);
    }
}

static void end_session(size_t index)
{
    struct session *session = sessions[index];

    close(session->source.fd);
    session->source.fd = -1;
    session->next_ended = ended_sessions;
    ended_sessions = session;
    sessions[index] = NULL;
}

static void end_old_sessions(void)
{
    const long long limit = now_ms() - SESSION_SECONDS * 1000;

    for (size_t i = 0; i < SESSIONS; i++)
        if (sessions[i] != NULL && sessions[i]->used < limit)
            end_session(i);
}

/* Connects a session to the service in one family, in place of the other. False, and nothing is changed, on failure. */
static bool ask(struct session *session, int family)
{
    struct source source = {.kind = SESSION, .fd = connect_inside(family, SOCK_DGRAM, session->gate->port)};

    if (source.fd < 0)
        return false;
    if (watch(EPOLL_CTL_ADD, source.fd, &session->source, EPOLLIN) != 0) {
        close(source.fd);
        return false;
    }
    if (session->source.fd >= 0)
        close(session->source.fd);
    session->source = source;
    session->family = family;
    return true;
}

static struct session *session_of(struct gate *gate, const struct msghdr *message)
{
    size_t place = SESSIONS, oldest = 0;
    struct session *session;

    for (size_t i = 0; i < SESSIONS; i++) {
        session = sessions[i];
        if (session == NULL) {
            place = i;
            continue;
        }
        if (session->gate == gate && session->peer_length == message->msg_namelen &&
            memcmp(&session->peer, message->msg_name, session->peer_length) == 0)
            return session;
        if (sessions[oldest] == NULL || session->used < sessions[oldest]->used)
            oldest = i;
    }
    if (place == SESSIONS) {
        end_session(oldest);
        place = oldest;
    }
    session = calloc(1, sizeof *session);
    if (session == NULL)
        return NULL;
    session->source = (struct source){.kind = SESSION, .fd = -1};
    session->gate = gate;
    memcpy(&session->peer, message->msg_name, message->msg_namelen);
    session->peer_length = message->msg_namelen;
    if (!ask(session, AF_INET) && !ask(session, AF_INET6)) {
        free(session);
        return NULL;
    }
    sessions[place] = session;
    return session;
}

/* A datagram that was not sent for what became of the one before is sent again; one that nobody takes, before there was
 * an answer, in the other family. */
static void pass_on(struct session *session, size_t length)
{
    int error = 0;
    socklen_t size = sizeof error;

    if (send(session->source.fd, datagram, length, MSG_DONTWAIT) < 0)
        error = errno;
    else if (!session->answered)
        /* ICMP's answer comes on the loopback before send(2) returns. */
        getsockopt(session->source.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != ECONNREFUSED)
        return;
    if (!session->answered)
        ask(session, session->family == AF_INET ? AF_INET6 : AF_INET);
    send(session->source.fd, datagram, length, MSG_DONTWAIT);
}

static void receive_datagrams(struct gate *gate)
{
    for (int turn = 0; turn < EVENTS; turn++) {
        struct sockaddr_storage peer = {0};
        char control[CMSG_SPACE(sizeof(struct in6_pktinfo))];
        struct iovec data = {.iov_base = datagram, .iov_len = sizeof datagram};
        struct msghdr message = {.msg_name = &peer, .msg_namelen = sizeof peer, .msg_iov = &data,
                                 .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        const ssize_t length = recvmsg(gate->source.fd, &message, MSG_DONTWAIT);
        struct session *session;

        if (length < 0)
            return;
        session = session_of(gate, &message);
        if (session == NULL)
            continue;
        session->used = now_ms();
        /* Which of our addresses it came to: the answer leaves from the same one. */
        session->control_length = (socklen_t)message.msg_controllen;
        memcpy(session->control, control, session->control_length);
        pass_on(session, (size_t)length);
    }
}

static void answer_datagrams(struct session *session)
{
    for (int turn = 0; turn < EVENTS; turn++) {
        const ssize_t length = recv(session->source.fd, datagram, sizeof datagram, MSG_DONTWAIT);
        struct iovec data = {.iov_base = datagram, .iov_len = length > 0 ? (size_t)length : 0};
        struct msghdr message = {.msg_name = &session->peer, .msg_namelen = session->peer_length,
                                 .msg_iov = &data, .msg_iovlen = 1, .msg_control = session->control,
                                 .msg_controllen = session->control_length};

        if (length < 0)
            return;
        session->answered = true;
        session->used = now_ms();
        sendmsg(session->gate->source.fd, &message, MSG_DONTWAIT);
    }
}

static long number(const char *text, char end, char **rest)
{
    long value;

    errno = 0;
    value = strtol(text, rest, 10);
    if (errno != 0 || *rest == text || **rest != end || value < 0) {
        errno = EINVAL;
        fail("forward arguments", text);
    }
    return value;
}

static void open_gate(struct gate *gate, const char *text)
{
    const int on = 1;
    int type = 0, family = 0;
    socklen_t length = sizeof type;
    char *rest;

    gate->source.fd = (int)number(text, ':', &rest);
    gate->port = (uint16_t)number(rest + 1, '\0', &rest);
    if (getsockopt(gate->source.fd, SOL_SOCKET, SO_TYPE, &type, &length) != 0 ||
        getsockopt(gate->source.fd, SOL_SOCKET, SO_DOMAIN, &family, &length) != 0)
        fail("forward socket", text);
    gate->source.kind = type == SOCK_STREAM ? LISTENER : DATAGRAMS;
    /* What it accepts inherits this: what one side sent goes on at once, as it did there. */
    if (type == SOCK_STREAM && setsockopt(gate->source.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0)
        fail("forward socket", text);
    if (type != SOCK_STREAM &&
        setsockopt(gate->source.fd, family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6,
                   family == AF_INET ? IP_PKTINFO : IPV6_RECVPKTINFO, &on, sizeof on) != 0)
        fail("forward socket", text);
    if (fcntl(gate->source.fd, F_SETFL, O_NONBLOCK) != 0 ||
        fcntl(gate->source.fd, F_SETFD, FD_CLOEXEC) != 0 ||
        watch(EPOLL_CTL_ADD, gate->source.fd, &gate->source, EPOLLIN) != 0)
        fail("forward socket", text);
}

/* From here on the process is nobody, in the jail's network, and cannot become anything else. */
static void enter_network(int pidfd, uid_t uid, gid_t gid)
{
    /* In the namespace an ordinary user may well be 0, with ids that cannot be given up. */
    const bool privileged = geteuid() == 0;

    if (!privileged && sys_setns(pidfd, NEW_USER) != 0)
        fail("forward setns user", "");
    if (sys_setns(pidfd, NEW_NET) != 0)
        fail("forward setns net", "");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        fail("forward no_new_privs", "");
    if (privileged && (setgroups(0, NULL) != 0 || setresgid(gid, gid, gid) != 0 || setresuid(uid, uid, uid) != 0))
        fail("forward ids", "");
    if (sys_capset(0, 0) != 0)
        fail("forward capset", "");
}

/* Whoever started the forwarder goes on once it is ready; streams of its starter it holds none. */
static void go_to_background(void)
{
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    const pid_t pid = fork();

    if (pid < 0 || null < 0)
        fail("forward fork", "");
    if (pid > 0)
        _exit(0);
    setsid();
    for (int fd = 0; fd < 3; fd++)
        if (dup2(null, fd) < 0)
            fail("forward descriptors", "/dev/null");
}

/* What the service said last is still in its sockets, which are closed, and in the pipes here. The ports are free. */
static void begin_to_end(const struct source *lifeline)
{
    struct stream *next;

    last = now_ms() + LAST_MS;
    paused = 0;
    close(lifeline->fd);
    for (size_t i = 0; i < SESSIONS; i++)
        if (sessions[i] != NULL)
            answer_datagrams(sessions[i]);
    for (size_t i = 0; i < SOCKETS; i++)
        if (gates[i].port != 0) {
            close(gates[i].source.fd);
            gates[i].source.fd = -1;
        }
    for (struct stream *stream = open_streams; stream != NULL; stream = next) {
        next = stream->next;
        if (!stream->connected)
            close_stream(stream, true);
        else if (stream->half[1].shut)
            close_stream(stream, false);
        else
            run_half(stream, 1, &stream->inner);
    }
}

static void serve(struct epoll_event *event)
{
    struct source *source = event->data.ptr;

    switch (source->kind) {
    case LISTENER:
        accept_streams((struct gate *)source);
        break;
    case DATAGRAMS:
        receive_datagrams((struct gate *)source);
        break;
    case OUTER:
    case INNER:
        run_stream(stream_of(source), source, event->events);
        break;
    case SESSION:
        answer_datagrams((struct session *)source);
        break;
    case LIFELINE:
        begin_to_end(source);
        break;
    }
}

/* How long to wait for the next event, in ms. */
static int patience(void)
{
    const long long left = last - now_ms();

    if (last != 0)
        return left > 0 ? (int)left : 0;
    return paused != 0 ? PAUSE_MS : SESSION_SECONDS * 1000;
}

int forward(int argc, char **argv)
{
    struct source lifeline = {.kind = LIFELINE, .fd = -1};
    struct rlimit files;
    time_t swept = now();
    char *rest;

    if (argc < 4 || argc - 3 > SOCKETS) {
        errno = EINVAL;
        fail("forward arguments", "");
    }
    signal(SIGPIPE, SIG_IGN);
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
        fail("forward dumpable", "");
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    lifeline.fd = (int)syscall(SYS_pidfd_open, number(argv[0], '\0', &rest), 0U);
    if (poller < 0 || lifeline.fd < 0)
        fail("forward pidfd_open", argv[0]);
    if (watch(EPOLL_CTL_ADD, lifeline.fd, &lifeline, EPOLLIN) != 0)
        fail("forward lifeline", argv[0]);
    for (int i = 3; i < argc; i++)
        open_gate(&gates[i - 3], argv[i]);
    enter_network(lifeline.fd, (uid_t)number(argv[1], '\0', &rest), (gid_t)number(argv[2], '\0', &rest));
    go_to_background();
    while (last == 0 || (open_streams != NULL && now_ms() < last)) {
        struct epoll_event events[EVENTS];
        const bool pausing = paused != 0;
        const int count = epoll_wait(poller, events, EVENTS, patience());

        if (count < 0 && errno != EINTR)
            fail("forward epoll_wait", "");
        for (int i = 0; i < count; i++)
            serve(&events[i]);
        if (pausing && (count == 0 || now() != paused || closed_streams != NULL || ended_sessions != NULL))
            listen_again(true);
        free_closed();
        if (now() - swept >= SESSION_SECONDS) {
            end_old_sessions();
            swept = now();
        }
    }
    return 0;
}
