/* The mount tree of a jail: sources as detached trees, then everything on its place, then the pivot. */
#ifndef WARDEN_MOUNTS_H
#define WARDEN_MOUNTS_H

#include "plan.h"

/* Opens the source of every OP_ROOT and OP_BIND, in order; -1 stands for an optional one that is not there.

 * Relative ones start from `base`. `userns` is the user namespace for idmapped trees, -1 when there can be none. */
int *trees_open(const struct plan *plan, const char *base, int userns, size_t *count);

/* Carries out the mount records in order in the caller's own mount namespace and makes the result `/`.
 * Volumes become overlays of `ephemeral` bytes, unless that is 0. The jail's log socket, when there is one, goes to the launcher through `channel`. */
void mounts_make(const struct plan *plan, const int *trees, uint64_t ephemeral, int channel);

/* Only what needs no source, on the running system whose root is open as `root`: no pivot. */
void mounts_add(const struct plan *plan, int root);

#endif
