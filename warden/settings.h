/* What the plan gives once, read out of its records and checked to be whole. */
#ifndef WARDEN_SETTINGS_H
#define WARDEN_SETTINGS_H

#include <stdbool.h>
#include <sys/types.h>

#include "plan.h"

struct settings {
    unsigned namespaces;
    enum map_way map_way;
    bool forks, lifeline, detach, terminal, single;
    unsigned short rows, columns;
    int status, state, gate, leash, enter; /* descriptors, -1: none */
    uid_t uid;
    gid_t gid;
    uint64_t capabilities;
    mode_t umask;
    const char *directory, *chroot; /* NULL: none */
    const char *base;               /* where relative sources start */
    uint64_t ephemeral;             /* bytes, 0: volumes are kept */
    const char *instance;           /* NULL: the supervisor's pid */
    const struct record *restart;   /* NULL: one life */
};

/* The descriptors alone, of which a plan that lacks the rest may have some. */
void settings_descriptors(struct settings *settings, const struct plan *plan);

/* `base` is used where the plan names none. Fails with EINVAL where a record that every launch needs is missing. */
void settings_read(struct settings *settings, const struct plan *plan, const char *base);

/* The descriptors that the service gets beyond 0, 1 and 2, as numbered outside; returns how many. */
size_t settings_passed(const struct plan *plan, int *fds, size_t room);

/* Whether descriptors for the service come through its gate. */
bool settings_gate_brings(const struct plan *plan);

/* Whether the service gets descriptors beyond 0, 1 and 2 at all: their numbers must be free then. */
bool settings_numbered(const struct plan *plan);

/* The descriptors that the supervisor holds, as numbered outside; returns how many. */
size_t settings_kept(const struct plan *plan, int *fds, size_t room);

/* The descriptors that the helpers get, likewise. */
size_t settings_helpers(const struct plan *plan, int *fds, size_t room);

#endif
