/* The last steps before the service's exec, the same for a launch, for entering and for a plain chroot. */
#ifndef WARDEN_SERVICE_H
#define WARDEN_SERVICE_H

#include "plan.h"
#include "settings.h"

/* Becomes the service, or tells the launcher through `channel` why not. `orphan_dies`: end with the parent. */
_Noreturn void service_main(const struct plan *plan, const struct settings *settings, int channel, bool orphan_dies);

/* Gives up every capability but `kept`, in all five sets and for good. */
void capabilities_limit(uint64_t kept, bool inheritable);

/* Takes the jail's uid and gid 0, and no group. Under an unmapped id a new file in a tmpfs is EOVERFLOW, and a new
 * pty cannot be given away. With one id there is no other to take. */
void become_jail_root(const struct settings *settings);

/* Fails where a descriptor is a directory: `openat(fd, "..")` leads out of any root. */
void refuse_directories(const int *fds, size_t count);

#endif
