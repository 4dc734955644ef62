/* Further lives of a jail: when its supervisor starts it anew, and how. */
#ifndef WARDEN_AGAIN_H
#define WARDEN_AGAIN_H

#include <stdbool.h>
#include <stddef.h>

#include "plan.h"
#include "settings.h"

#define AGAIN_SOURCES 2 /* a plan and its fragment */

/* The descriptors from which the plan was read: each life reads them once more. */
void again_from(const int *sources, size_t count);
size_t again_sources(int *fds, size_t room);

/* A life begins now. */
void again_begin(const struct plan *plan, const struct settings *settings);

/* Whether that signal to the supervisor means that there is to be no further life. */
bool again_ends(int number);

/* There is to be no further life, however this one ends. */
void again_never(void);

/* Whether another life follows the one that ends now. */
bool again_wanted(const struct settings *settings, bool failed);

/*
 * Becomes the supervisor of the next life after its delay. `ended` tells how the last one ended, "exit 1". Everything
 * that a life makes is gone and nothing of it is kept: the supervisor executes itself anew, with the same descriptors.
 * Returns when it is called off meanwhile by a signal on the descriptor `signals`.
 */
void again(const struct settings *settings, const char *ended, int signals);

#endif
