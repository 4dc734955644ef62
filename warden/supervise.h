/* The warden outside of the jail, from the clone to the end: it relays, logs, reports and waits. */
#ifndef WARDEN_SUPERVISE_H
#define WARDEN_SUPERVISE_H

#include "plan.h"
#include "settings.h"

struct child {
    pid_t pid;
    int channel;
    int lifeline; /* -1: the child is the command itself */
    int output;   /* read end of the service's output, -1: not logged */
};

/* Makes `failure_hook` tell whom the plan names, of what could be read of it. */
void supervisor_reads(const struct plan *plan, const struct settings *settings);

/* Makes `failure_hook` end the jail, clean up and report; blocks the signals that supervise() reads. */
void supervisor_begin(const struct plan *plan, const struct settings *settings);

/* One line to whoever listens and to the state file. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The same, but whoever listens gets it together with the next that is said. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Whether the record's path goes when the jail ends. */
bool is_removed(const struct record *record);

/* `WORD PID STARTTIME`: with its start time a pid is never taken for another's (proc(5), field 22). */
void note_process(const char *word, pid_t pid);

/* Until the child's end; returns the exit status to pass on. */
int supervise(const struct child *child);

/* The child that a failing launch must end. */
void supervisor_owns(const struct child *child);

#endif
