"""The service behind the published ports of these tests: `publishedpeer.py HOST`, on port 80, TCP and UDP.

Over TCP each line is an order: `give N` for N bytes, `later N` for these after 0.1 s, `digest` for the SHA-256 of what
comes until the client has no more to say, `reset` for an abortive close. A datagram is sent back with `<` before it.
"""

import hashlib
import os
import socket
import struct
import sys
import threading
import time

PATTERN = bytes(range(251)) * 4177  # 1 MiB, and no power of two repeats in it


def serve(client: socket.socket) -> None:
    with client, client.makefile("rb") as lines:
        for line in lines:
            order, _, number = line.strip().partition(b" ")
            if order == b"later":
                time.sleep(0.1)
            if order in (b"give", b"later"):
                left = int(number)
                while left > 0:
                    client.sendall(PATTERN[:left])
                    left -= len(PATTERN)
            elif order == b"digest":
                client.sendall(hashlib.sha256(lines.read()).hexdigest().encode())
                return
            elif order == b"reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(os.dup(client.fileno()))
                lines.close()
                client.close()
                return


def answer(datagrams: socket.socket) -> None:
    while True:
        text, peer = datagrams.recvfrom(65536)
        datagrams.sendto(b"<" + text[:60000], peer)


def main(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((host, 80))
    threading.Thread(target=answer, args=(datagrams,), daemon=True).start()
    with socket.create_server((host, 80), family=family, backlog=512) as listener:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
