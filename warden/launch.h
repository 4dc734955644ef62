/* The launcher: from a plan to a child behind the walls. */
#ifndef WARDEN_LAUNCH_H
#define WARDEN_LAUNCH_H

#include "plan.h"
#include "settings.h"

/* Starts a jail (or a plain chroot) and supervises it; returns the exit status to pass on. */
int launch(struct plan *plan, const struct settings *settings);

/* Runs the command in the namespaces of a running jail, behind the same walls. */
int enter(struct plan *plan, const struct settings *settings);

#endif
