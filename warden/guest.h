/* PID 1 of a User-Mode Linux guest. */
#ifndef WARDEN_GUEST_H
#define WARDEN_GUEST_H

#define GUEST_HOME "/.stockade"         /* what an image has beside its root file system */
#define GUEST_INIT GUEST_HOME "/init"   /* the warden itself: the kernel's `init=` */

/* Boots the guest, starts its service, answers on the serial line, powers off. What the host says comes from the
 * kernel's command line, as environment variables that begin with `stockade_`. */
_Noreturn void guest_main(void);

#endif
