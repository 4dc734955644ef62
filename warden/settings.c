#define _GNU_SOURCE
#include "settings.h"

#include <errno.h>

#include "report.h"

static const struct record *need(const struct plan *plan, enum op op, const char *name)
{
    const struct record *record = plan_last(plan, op);

    if (record == NULL) {
        errno = EINVAL;
        fail("plan", name);
    }
    return record;
}

static int descriptor(const struct plan *plan, enum op op)
{
    const struct record *record = plan_last(plan, op);

    return record == NULL ? -1 : (int)record->a;
}

static uint64_t number(const struct plan *plan, enum op op, uint64_t otherwise)
{
    const struct record *record = plan_last(plan, op);

    return record == NULL ? otherwise : record->a;
}

static const char *string(const struct plan *plan, enum op op)
{
    const struct record *record = plan_last(plan, op);

    return record == NULL ? NULL : record->data;
}

void settings_descriptors(struct settings *settings, const struct plan *plan)
{
    settings->status = descriptor(plan, OP_STATUS);
    settings->state = descriptor(plan, OP_STATE);
    settings->gate = descriptor(plan, OP_GATE);
    settings->leash = descriptor(plan, OP_LEASH);
    settings->enter = descriptor(plan, OP_ENTER);
}

void settings_read(struct settings *settings, const struct plan *plan, const char *base)
{
    const struct record *ids = need(plan, OP_IDS, "no ids");
    const struct record *terminal = plan_last(plan, OP_TERMINAL);

    need(plan, OP_ARGV, "no command");
    *settings = (struct settings){
        .namespaces = (unsigned)number(plan, OP_NAMESPACES, 0),
        .map_way = (enum map_way)number(plan, OP_MAP_WAY, MAP_DIRECT),
        .forks = plan_last(plan, OP_FORKS) != NULL,
        .lifeline = plan_last(plan, OP_LIFELINE) != NULL,
        .detach = plan_last(plan, OP_DETACH) != NULL,
        .terminal = terminal != NULL,
        .rows = terminal == NULL ? 0 : (unsigned short)terminal->a,
        .columns = terminal == NULL ? 0 : (unsigned short)terminal->b,
        .uid = (uid_t)ids->a,
        .gid = (gid_t)ids->b,
        .capabilities = need(plan, OP_CAPABILITIES, "no capabilities")->a,
        .umask = (mode_t)number(plan, OP_UMASK, 022),
        .directory = string(plan, OP_DIRECTORY),
        .chroot = string(plan, OP_CHROOT),
        .base = string(plan, OP_BASE),
        .ephemeral = number(plan, OP_EPHEMERAL, 0),
        .instance = string(plan, OP_INSTANCE),
    };
    settings_descriptors(settings, plan);
    if (settings->detach)
        settings->restart = plan_last(plan, OP_RESTART);
    if (settings->base == NULL)
        settings->base = base;
    settings->single = settings->map_way == MAP_SINGLE;
    if (settings->chroot == NULL) {
        need(plan, OP_NAMESPACES, "no namespaces");
        need(plan, OP_ROOT, "no root");
    }
}

static size_t descriptors(const struct plan *plan, enum op op, int *fds, size_t room)
{
    const struct record *record = NULL;
    size_t count = 0;

    while ((record = plan_next(plan, op, record)) != NULL) {
        if (count == room) {
            errno = EMFILE;
            fail("plan", "too many descriptors to pass");
        }
        fds[count++] = (int)record->a;
    }
    return count;
}

size_t settings_passed(const struct plan *plan, int *fds, size_t room)
{
    return descriptors(plan, OP_PASS, fds, room);
}

bool settings_gate_brings(const struct plan *plan)
{
    const struct record *gate = plan_last(plan, OP_GATE);

    return gate != NULL && gate->b != 0;
}

bool settings_numbered(const struct plan *plan)
{
    return plan_next(plan, OP_PASS, NULL) != NULL || settings_gate_brings(plan);
}

size_t settings_helpers(const struct plan *plan, int *fds, size_t room)
{
    return descriptors(plan, OP_HELPER_FD, fds, room);
}

size_t settings_kept(const struct plan *plan, int *fds, size_t room)
{
    return descriptors(plan, OP_KEEP, fds, room);
}
