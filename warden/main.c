/*
 * The warden: carries out a plan and decides nothing. `warden PLAN [FRAGMENT-FD]`; PLAN is a path, or
 * the number of an inherited descriptor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include "again.h"
#include "attend.h"
#include "forward.h"
#include "guest.h"
#include "launch.h"
#include "plan.h"
#include "report.h"
#include "settings.h"
#include "supervise.h"
#include "sys.h"
#include "util.h"

#define ADD_SEALS 1033 /* F_ADD_SEALS */
#define GET_SEALS 1034 /* F_GET_SEALS */
#define ALL_SEALS 0x0f /* seal, shrink, grow, write */

/* From a sealed copy nobody in the jail can reach the program on the host, not even by /proc/1/exe, and with no
 * environment there is none to read in /proc/1/environ. */
static void run_from_sealed_copy(char *const *argv)
{
    char *const nothing[] = {NULL};
    struct stat status;
    off_t at = 0;

    const int own = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (own < 0)
        fail("seal", "/proc/self/exe");
    if (fcntl(own, GET_SEALS) == ALL_SEALS && environ[0] == NULL) {
        close(own);
        return;
    }
    const int copy = sys_memfd_create("warden");
    if (copy < 0 || fstat(own, &status) != 0)
        fail("seal", "memfd");
    while (at < status.st_size)
        if (sendfile(copy, own, &at, (size_t)(status.st_size - at)) <= 0)
            fail("seal", "copy");
    if (fcntl(copy, ADD_SEALS, ALL_SEALS) != 0)
        fail("seal", "memfd");
    sys_execveat(copy, argv, nothing);
    fail("seal", "exec");
}

/* Returns NULL, or what is wrong with it, with errno: then nothing of it is kept. `fd` is what it was read from, -1 where
 * it cannot be opened. */
static const char *read_plan(struct plan *plan, const char *name, int *fd)
{
    char *end;
    const long number = strtol(name, &end, 10);
    const bool given = *name != '\0' && *end == '\0' && number > STDERR_FILENO && number < 65536;
    const size_t before = plan->count;
    size_t length = 0;

    *fd = given ? (int)number : open(name, O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        return name;
    const char *bytes = read_all(*fd, PLAN_LIMIT, &length);
    if (bytes == NULL)
        return name;
    const char *why = plan_parse(plan, bytes, length);
    if (why != NULL)
        plan->count = before;
    return why;
}

/* A further life of the jail begins with the same plan and fragment; what a supervisor leaves to itself is read once.
 * Past a damaged plan the fragment is read all the same: it names who is told. Returns as read_plan() does. */
static const char *read_plans(struct plan *plan, int count, char **names)
{
    int sources[AGAIN_SOURCES];
    const char *wrong = NULL;
    int error = 0;

    for (int i = 0; i < count; i++) {
        int fd;
        const char *why = read_plan(plan, names[i], &fd);
        if (why != NULL && wrong == NULL) {
            wrong = why;
            error = errno;
        }
        if (i < AGAIN_SOURCES)
            sources[i] = fd;
        else
            close(fd);
    }
    if (wrong != NULL) {
        errno = error;
        return wrong;
    }
    const int given = count < AGAIN_SOURCES ? count : AGAIN_SOURCES;
    if (plan_last(plan, OP_RESTART) != NULL && plan_last(plan, OP_DETACH) != NULL)
        again_from(sources, (size_t)given);
    else
        for (int i = 0; i < given; i++)
            close(sources[i]);
    return NULL;
}

/* Descriptors beyond those that the plan names are somebody's mistake, and a way out for the jail. */
static void keep_named(const struct plan *plan, const struct settings *settings)
{
    int kept[MESSAGE_FDS] = {STDIN_FILENO,    STDOUT_FILENO,  STDERR_FILENO,  settings->status,
                             settings->state, settings->gate, settings->leash, settings->enter};

    size_t count = 8 + settings_passed(plan, kept + 8, MESSAGE_FDS - 8);
    count += settings_helpers(plan, kept + count, MESSAGE_FDS - count);
    count += settings_kept(plan, kept + count, MESSAGE_FDS - count);
    count += again_sources(kept + count, MESSAGE_FDS - count);
    keep_only(kept, count);
}

/* The plan lies in the generation that it is for. */
static const char *directory_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *directory = slash == NULL ? strdup(".") : strndup(path, (size_t)(slash - path) + 1);

    if (directory == NULL)
        fail("memory", "");
    return directory;
}

int main(int argc, char **argv)
{
    struct plan plan = {NULL, 0};
    struct settings settings;

    failure_hook = failure_print;
    signal(SIGCHLD, SIG_DFL); /* where the caller ignores it, no child's end would be seen (waitpid(2)) */
    if (getpid() == 1 && strcmp(argv[0], GUEST_INIT) == 0)
        guest_main();
    if (argc > 1 && strcmp(argv[1], "forward") == 0)
        return forward(argc - 2, argv + 2);
    if (argc > 1 && strcmp(argv[1], "attend") == 0)
        return attend(argc - 2, argv + 2);
    if (argc > 1 && strcmp(argv[1], "within") == 0)
        return within(argc - 2, argv + 2);
    if (argc < 2 || argc > 2 + AGAIN_SOURCES) {
        dprintf(STDERR_FILENO, "usage: warden PLAN [FRAGMENT-FD]\n");
        return EXIT_WALLS;
    }
    open_standard();
    run_from_sealed_copy(argv);
    const char *wrong = read_plans(&plan, argc - 1, argv + 1);
    const int error = errno;
    settings_descriptors(&settings, &plan);
    supervisor_reads(&plan, &settings);
    errno = error;
    if (wrong != NULL)
        fail("plan", wrong);
    settings_read(&settings, &plan, directory_of(argv[1]));
    remember_arguments(argc, argv);
    keep_named(&plan, &settings);
    return settings.enter >= 0 ? enter(&plan, &settings) : launch(&plan, &settings);
}
