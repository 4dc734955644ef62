/* Descriptors, and the messages that the warden's processes send each other. */
#ifndef WARDEN_UTIL_H
#define WARDEN_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MESSAGE_FDS 64
#define MESSAGE_TEXT 4352 /* a step and a path */

enum message_kind {
    MESSAGE_GO = 1,     /* launcher → child: the ids are mapped, go on */
    MESSAGE_TREES,      /* launcher → PID 1: detached trees; text: their int32 numbers */
    MESSAGE_FAILED,     /* to the launcher: error, "step\0object\0" */
    MESSAGE_SERVICE,    /* to the launcher, from the service: its pid is the sender's */
    MESSAGE_GATED,      /* to the launcher: the service waits at its gate */
    MESSAGE_TERMINAL,   /* to the launcher: the master of the jail's pty */
    MESSAGE_LOG_SOCKET, /* to the launcher: the jail's /dev/log */
};

struct message {
    enum message_kind kind;
    int error;
    pid_t sender; /* as the receiver's pid namespace knows it */
    size_t length;
    char text[MESSAGE_TEXT];
    size_t fd_count;
    int fds[MESSAGE_FDS];
};

void channel_pair(int ends[2]);
void channel_send(int channel, enum message_kind kind, int error, const void *text, size_t length, const int *fds,
                  size_t fd_count);

/* True with a message, false when every other end is closed; fails on anything else. */
bool channel_receive(int channel, struct message *message);

/* Closes every descriptor but these. */
void keep_only(const int *fds, size_t count);

/* Leaves nothing but a name in what others read as this process's command line. */
void remember_arguments(int argc, char **argv);
void hide_arguments(void);

/* Descriptors 0, 1 and 2 are open, so that nothing opened later lands there by accident. */
void open_standard(void);

/* Descriptors 0, 1 and 2 are /dev/null. */
void close_standard(void);

/* The whole of a file or stream, at most `limit` bytes, in memory of its own. */
char *read_all(int fd, size_t limit, size_t *length);

bool write_all(int fd, const char *bytes, size_t length);

/* Writes `value` to the existing file `path` in one call; errno when that fails. */
bool write_file(const char *path, const char *value);

/* A decimal number for a file or an argument; `text` has room for 24 bytes. */
const char *decimal(uint64_t number, char *text);

#endif
