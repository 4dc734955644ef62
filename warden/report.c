#define _GNU_SOURCE
#include "report.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

void (*failure_hook)(int error, const char *step, const char *object);

int failure_status(const char *step, int error)
{
    if (strcmp(step, "exec") != 0)
        return EXIT_WALLS;
    return error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

void failure_print(int error, const char *step, const char *object)
{
    const bool named = *object != '\0';

    dprintf(STDERR_FILENO, "error: launch step `%s` failed%s%s%s: %s\n", step, named ? " on `" : "", object,
            named ? "`" : "", strerror(error));
}

_Noreturn void fail(const char *step, const char *object)
{
    const int error = errno;

    if (failure_hook != NULL)
        failure_hook(error, step, object);
    _exit(failure_status(step, error));
}
