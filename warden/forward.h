/* The forwarder: carries what arrives on sockets made outside to ports in a jail's network. */
#ifndef WARDEN_FORWARD_H
#define WARDEN_FORWARD_H

/*
 * argv: PID of a process in the jail, uid and gid to become, then one FD:PORT for each socket: an
 * inherited TCP listener or bound UDP socket, and the port on the jail's loopback that it leads to.
 * Goes into the background once it serves. When that process ends it gives the sockets up, and clients what the service
 * said last, for a second or two. Returns an exit status.
 */
int forward(int argc, char **argv);

#endif
