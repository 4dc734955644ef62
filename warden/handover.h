/* A guest whose PID 1 is the image's own, a systemd: the warden makes the network and becomes it. */
#ifndef WARDEN_HANDOVER_H
#define WARDEN_HANDOVER_H

/* Becomes `program`, in PID 1. A child goes on serving the line, which is open, and tells the host that the system is up
 * once PID 1 says so to its NOTIFY_SOCKET (systemd(1), sd_notify(3)). */
_Noreturn void hand_over(const char *program);

#endif
