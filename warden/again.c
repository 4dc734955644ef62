#define _GNU_SOURCE
#include "again.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "report.h"
#include "supervise.h"
#include "sys.h"
#include "util.h"

static struct {
    int sources[AGAIN_SOURCES];
    size_t count;
    bool never;
    long long began; /* ms */
    uint64_t restarts, delay, header;
} self;

static long long now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (long long)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

void again_from(const int *sources, size_t count)
{
    memcpy(self.sources, sources, count * sizeof *sources);
    self.count = count;
}

size_t again_sources(int *fds, size_t room)
{
    const size_t count = self.count < room ? self.count : room;

    memcpy(fds, self.sources, count * sizeof *fds);
    return count;
}

void again_begin(const struct plan *plan, const struct settings *settings)
{
    const struct record *before = plan_last(plan, OP_AGAIN);

    self.began = now();
    if (before != NULL) {
        self.restarts = before->a;
        self.delay = before->b;
        self.header = before->c;
    } else if (settings->state >= 0) {
        const off_t at = lseek(settings->state, 0, SEEK_CUR);
        self.header = at > 0 ? (uint64_t)at : 0;
    }
}

bool again_ends(int number)
{
    return number == SIGPWR || number == SIGTERM || number == SIGINT || number == SIGQUIT;
}

void again_never(void)
{
    self.never = true;
}

bool again_wanted(const struct settings *settings, bool failed)
{
    return settings->restart != NULL && !self.never && self.count > 0 &&
           (failed || settings->restart->a == RESTART_ALWAYS);
}

/* Twice the last one, up to the longest; the first one again after a life that was long enough. */
static uint64_t next_delay(const struct record *policy)
{
    if (self.delay == 0 || (uint64_t)(now() - self.began) >= policy->d)
        return policy->b;
    return self.delay * 2 < policy->c ? self.delay * 2 : policy->c;
}

/* The file grows with no number of lives. The new lines begin with one that says that the supervisor lives, so a
 * reader between the two writes is not misled by what is left of the old ones. */
static void rewrite_state(const struct settings *settings, const char *ended)
{
    if (settings->state < 0 || lseek(settings->state, (off_t)self.header, SEEK_SET) < 0)
        return;
    note_process("supervisor", getpid());
    note("restarts %llu", (unsigned long long)self.restarts);
    note("last %s", ended);
    note("waiting %llu", (unsigned long long)self.delay);
    const off_t end = lseek(settings->state, 0, SEEK_CUR);
    if (end < 0 || ftruncate(settings->state, end) != 0)
        fail("state", "ftruncate");
}

/* True when a signal says that there is to be no further life. */
static bool called_off(int signals)
{
    const long long until = now() + (long long)self.delay;
    struct pollfd watched = {.fd = signals, .events = POLLIN};
    struct signalfd_siginfo information;

    for (long long left; (left = until - now()) > 0;) {
        if (poll(&watched, 1, (int)left) <= 0)
            continue;
        while (read(signals, &information, sizeof information) == (ssize_t)sizeof information)
            if (again_ends((int)information.ssi_signo))
                return true;
        while (waitpid(-1, NULL, WNOHANG) > 0)
            continue;
    }
    return false;
}

/* What this supervisor leaves to its successor, as a plan of one record. */
static int successor_plan(void)
{
    const struct { char magic[8]; uint32_t version, count, op, size; uint64_t a, b, c, d; } plan = {
        PLAN_MAGIC, PLAN_VERSION, 1, OP_AGAIN, 0, self.restarts, self.delay, self.header, 0};
    const int fd = sys_memfd_create("again");

    if (fd < 0 || !write_all(fd, (const char *)&plan, sizeof plan))
        fail("again", "plan");
    return fd;
}

static void become_successor(void)
{
    char name[] = "warden", texts[AGAIN_SOURCES + 1][24];
    char *argv[AGAIN_SOURCES + 3] = {name}, *const nothing[] = {NULL};
    size_t count = 1;
    int sources[AGAIN_SOURCES + 1];

    memcpy(sources, self.sources, sizeof self.sources);
    sources[self.count] = successor_plan();
    for (size_t i = 0; i <= self.count; i++) {
        if (lseek(sources[i], 0, SEEK_SET) != 0 || fcntl(sources[i], F_SETFD, 0) != 0)
            fail("again", "plan");
        decimal((uint64_t)sources[i], texts[i]);
        argv[count++] = texts[i];
    }
    const int own = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (own >= 0)
        sys_execveat(own, argv, nothing);
    fail("again", "exec");
}

void again(const struct settings *settings, const char *ended, int signals)
{
    self.delay = next_delay(settings->restart);
    self.restarts++;
    log_line("the service's life ended (%s); restart %llu in %llu.%llu s", ended, (unsigned long long)self.restarts,
             (unsigned long long)(self.delay / 1000), (unsigned long long)(self.delay % 1000 / 100));
    rewrite_state(settings, ended);
    /* Whoever waits for the first start may have stopped reading. */
    if (settings->status >= 0)
        fcntl(settings->status, F_SETFL, O_WRONLY | O_NONBLOCK);
    if (!called_off(signals))
        become_successor();
    log_line("no further restart: the jail is being stopped");
}
