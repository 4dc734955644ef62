/*
 * A record of a guest that is kept outside of it: the guest kernel's audit subsystem tells PID 1 of every program that
 * is executed and of all that is typed on terminals, and PID 1 tells the host at once. Nobody in the guest can become
 * its receiver instead, and its rules are locked until the guest ends.
 */
#ifndef WARDEN_RECORD_H
#define WARDEN_RECORD_H

/* Begins to record. -1 when the host asked for no record; else the descriptor to poll. */
int record_open(void);

/* Sends on what the kernel has told until now; nothing without a record. */
void record_read(void);

#endif
