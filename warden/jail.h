/* PID 1 of a jail: makes the mounts, starts the service, and from then on only reaps and forwards signals. */
#ifndef WARDEN_JAIL_H
#define WARDEN_JAIL_H

#include "plan.h"
#include "settings.h"

/* The first process in the new namespaces. Its ids are not mapped until the launcher says so on `channel`.
 * All that it keeps is
 * `lifeline`, and of a jail that outlives its supervisor `drain`, the read end of its output (else -1). */
_Noreturn void jail_main(const struct plan *plan, const struct settings *settings, int channel, int lifeline, int drain);

/* Signals that the supervisor and PID 1 pass on. */
extern const int forwarded_signals[];
extern const size_t forwarded_count;

#endif
