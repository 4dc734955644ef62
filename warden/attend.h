/* Programs beside a jail that serve its network: kept for exactly as long as it lives, or run once. */
#ifndef WARDEN_ATTEND_H
#define WARDEN_ATTEND_H

/*
 * argv: PID of the jail's first process, then a command that goes into the background once it serves;
 * `{net}` in it stands for a path of the jail's network namespace. The command runs as root of the jail's
 * user namespace, in a pid namespace of its own, and ends with the jail or with the attendant.
 * Returns, with the command's exit status, once that has gone into the background.
 */
int attend(int argc, char **argv);

/* argv as above. Becomes the command, as root of the jail's user namespace and in its network namespace. */
int within(int argc, char **argv);

#endif
