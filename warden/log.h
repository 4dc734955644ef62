/* The jail's log file: appended to, and rotated by size. */
#ifndef WARDEN_LOG_H
#define WARDEN_LOG_H

#include <stddef.h>

#include "plan.h"

/* Opens the file that OP_LOG names. False when the plan names none. */
bool log_open(const struct plan *plan);

/* A full disk must not end the jail: what cannot be written is dropped. */
void log_write(const char *bytes, size_t length);

/* A line of the warden's own, with the time. Nothing without a log. */
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One syslog datagram as a line of the log, or of standard error when there is no log. */
void log_datagram(const char *bytes, size_t length);

#endif
