/* Files of a guest for the line: built into the warden, because a jail has no `cat`. */
#ifndef WARDEN_FILES_H
#define WARDEN_FILES_H

#include <stdbool.h>

/* Carries out `@read PATH`, `@list PATH`, `@pack PATH [DEVICE]`, `@unpack PATH [DEVICE]` or `@sync` on standard input and
 * output and returns the exit status: 0, or an errno. */
int files_command(char *const *argv);

bool is_files_command(const char *name);

#endif
