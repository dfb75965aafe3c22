#!/usr/bin/env python3
"""Connections that a broker must survive. Usage: misbehave.py ADDRESS PORT KIND [COUNT [SECONDS]]

Speaks just enough of the tcp framing (docs/protocol.md) to break it at a chosen point.
"""

import os
import random
import resource
import socket
import struct
import sys
import time

TOPIC = b"penstock"
PAYLOAD = 1 << 20


def connect(address):
    return socket.create_connection(address, timeout=20)


def hello(topic=TOPIC, version=1):
    """Hello: magic, version, topic length, session, stream, streams, ack, order, path, payload,
    resume from, datagram."""
    fixed = struct.pack(
        "<4sHHQIIBBBxIQI4x", b"PNSK", version, len(topic), 0, 0, 1, 1, 0, 0, PAYLOAD, 0, 0
    )
    assert len(fixed) == 48
    return fixed + topic


def batch_header(length=PAYLOAD, messages=1):
    """Header of batch 0, with a checksum that fits nothing."""
    return struct.pack("<B3xIQII", 1, length, 0, messages, 0xDEADBEEF)


def open_stream(address):
    """A connection whose Hello the broker has welcomed."""
    sock = connect(address)
    sock.sendall(hello())
    answer = b""
    while len(answer) < 56:
        part = sock.recv(56 - len(answer))
        assert part, "the broker closed instead of a Welcome"
        answer += part
    return sock


def reset(sock):
    """Closes with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_hello(address, number):
    sock = connect(address)
    sock.sendall(hello()[: 1 + number % 47])
    sock.close()


def half_header(address, number):
    sock = open_stream(address)
    sock.sendall(batch_header()[: 1 + number % 23])
    reset(sock) if number % 2 else sock.close()


def mid_batch(address, number):
    """Claims 1 MiB, sends part of it, goes away."""
    sock = open_stream(address)
    sock.sendall(batch_header() + b"x" * (number * 4099 % PAYLOAD))
    reset(sock) if number % 2 else sock.close()


def huge_claim(address, number):
    """A batch of almost 4 GiB, or with more messages than bytes."""
    sock = open_stream(address)
    sock.sendall(batch_header(length=0xFFFFFFF0) if number % 2 else batch_header(8, 1 << 31))
    drain(sock)


def garbage(address, number):
    sock = connect(address)
    try:
        sock.sendall(random.Random(number).randbytes(1 + number * 997 % 100_000))
    except OSError:
        pass  # the broker may well have closed by now
    drain(sock)


def other_version(address, number):
    sock = connect(address)
    sock.sendall(hello(version=2 + number))
    drain(sock)


def drain(sock):
    """Waits until the broker closes; a broker that keeps such a connection is at fault."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    sock.close()


def idle(address, count, seconds):
    """Holds `count` connections that send nothing; prints how many were open at once."""
    wanted = count + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
    socks = []
    for _ in range(count):
        socks.append(connect(address))
    print(f"open {len(socks)}", flush=True)
    time.sleep(seconds)
    os._exit(0)


def main():
    address = (sys.argv[1], int(sys.argv[2]))
    kind = sys.argv[3]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    if kind == "idle":
        idle(address, count, float(sys.argv[5]))
    kinds = [half_hello, half_header, mid_batch, huge_claim, garbage, other_version]
    act = {f.__name__: f for f in kinds}[kind]
    for number in range(count):
        act(address, number)


if __name__ == "__main__":
    main()
