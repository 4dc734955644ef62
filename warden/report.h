/* What a failed step does: say which, on what and why, and end the process. */
#ifndef WARDEN_REPORT_H
#define WARDEN_REPORT_H

#define EXIT_WALLS 125
#define EXIT_NOT_EXECUTABLE 126
#define EXIT_NOT_FOUND 127

/* Called by fail() with errno, the step and its object; each role of the warden sets its own. */
extern void (*failure_hook)(int error, const char *step, const char *object);

/* The step failed with errno: never returns, never goes on. */
_Noreturn void fail(const char *step, const char *object);

/* Says it on standard error. */
void failure_print(int error, const char *step, const char *object);

/* The exit status that tells the caller about a failed step. */
int failure_status(const char *step, int error);

#endif
