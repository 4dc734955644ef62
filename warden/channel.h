/*
 * Commands from outside of a guest, over a serial line: frames of a header (u8 kind, u8 zero, u16 session,
 * u32 length, big-endian) and `length` bytes. A session is one command; what each side may send of its data is
 * bounded by the credit that the other gives.
 */
#ifndef WARDEN_CHANNEL_H
#define WARDEN_CHANNEL_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FRAME_MOST 32768U /* bytes of a frame after its header */
#define DATA_MOST 4096U   /* bytes of a frame of data */
#define WINDOW 65536U     /* credit at a session's start, both ways */
#define SESSIONS 32

enum frame_kind {
    FRAME_EXEC = 1,   /* u16 flags, rows, columns, argc; then strings: directory, "uid:gid", argv…, environment… */
    FRAME_DATA = 2,   /* standard input */
    FRAME_EOF = 3,    /* its end */
    FRAME_SIGNAL = 4, /* u32 number, to the command's process group */
    FRAME_RESIZE = 5, /* u16 rows, columns of the terminal */
    FRAME_CREDIT = 6, /* u32 bytes more; both ways */
    FRAME_STOP = 7,   /* end the guest */
    FRAME_SERVICE = 8, /* start the service now */

    FRAME_READY = 16,   /* the guest's system is up */
    FRAME_STDOUT = 17,
    FRAME_STDERR = 18,
    FRAME_EXIT = 19,    /* u32 status, 128 + n for a signal */
    FRAME_STARTED = 20, /* u32 pid of the service */
    FRAME_ENDED = 21,   /* u32 status of the service */
    FRAME_FAULT = 22,   /* text: what went wrong in the guest's start */
    FRAME_TAKEN = 23,   /* u32 bytes of the line that were read: the host keeps below what the terminal can hold */
    FRAME_RECORD = 24,  /* u16 type of an audit message, text; session 1: the next frame goes on with it */
    FRAME_GATHERS = 25, /* text "START END", hexadecimal: the kernel's code that gathers what is typed */
};

enum exec_flag { EXEC_TERMINAL = 1 };

/* Takes the line over; it is a terminal and becomes raw. */
void channel_open(const char *device);

/* The line that was open is so no more. */
bool channel_lost(void);

/* Sends a frame; nothing without a line. */
void channel_frame(enum frame_kind kind, unsigned session, const void *payload, size_t length);
void channel_number(enum frame_kind kind, unsigned session, uint32_t number);

/* A message of the kernel's audit subsystem, in as many frames as it needs. */
void channel_record(unsigned type, const unsigned char *text, size_t length);

/* What to poll; `room` entries at most. Returns how many. */
size_t channel_watch(struct pollfd *watched, size_t room);

/* Does what can be done without waiting. Returns the last request that is for the guest itself (STOP, SERVICE), or 0. */
enum frame_kind channel_serve(void);

/* A child ended. True when it was a session's. */
bool channel_child(pid_t pid, int status);

/* 0 to 255, as a shell tells it. */
uint32_t exit_number(int status);

#endif
