#!/usr/bin/env python3
"""A TCP server and a client that are slow in a chosen way, for causes that diagnose must name."""

import argparse
import signal
import socket
import sys
import threading
import time


def receive(connection, options, turn=None, next_turn=None):
    """Reads until the other end closes, so many bytes a call, with a pause after each, or work."""
    while True:
        if turn:
            turn.acquire()
        data = connection.recv(options.bytes)
        end = time.thread_time() + options.spin
        while time.thread_time() < end:
            pass
        if next_turn:
            next_turn.release()
        if not data:
            return
        if options.pause:
            time.sleep(options.pause)


def relay(connection, options):
    """Two threads read in turn: none of them is busy, both together are."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    for turn, next_turn in ((first, second), (second, first)):
        threading.Thread(
            target=receive, args=(connection, options, turn, next_turn), daemon=True
        ).start()


def serve(options):
    """Accepts for ever; each connection is read by a thread of its own."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.rcvbuf:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.rcvbuf)
    listener.bind(("0.0.0.0", options.port))
    if options.clamp:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, options.clamp)
    listener.listen(options.backlog)
    while options.accept == 0:
        time.sleep(1)
    while True:
        connection, _ = listener.accept()
        if options.relay:
            relay(connection, options)
            continue
        if options.accepted_rcvbuf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.accepted_rcvbuf)
        threading.Thread(target=receive, args=(connection, options), daemon=True).start()


def send(options):
    """Sends for ever, or so many bytes and then nothing while it stays connected."""
    connection = socket.socket()
    if options.sndbuf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.sndbuf)
    connection.connect((options.address, options.port))
    data, sent = bytes(options.bytes), 0
    if options.nats:
        connection.sendall(b"CONNECT {\"verbose\":false}\r\n")
        data = b"PUB load %d\r\n%s\r\n" % (len(data), data)
    while options.total == 0 or sent < options.total:
        connection.sendall(data)
        sent += len(data)
        if options.pause:
            time.sleep(options.pause)
    signal.pause()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="ends after so long")
    roles = parser.add_subparsers(required=True)
    server = roles.add_parser("serve")
    server.add_argument("port", type=int)
    server.add_argument("--rcvbuf", type=int, default=0, help="of the listener")
    server.add_argument("--accepted-rcvbuf", type=int, default=0, help="of accepted sockets")
    server.add_argument("--clamp", type=int, default=0, help="TCP_WINDOW_CLAMP of the listener")
    server.add_argument("--backlog", type=int, default=128, help="connections that may wait")
    server.add_argument("--accept", type=int, default=1, help="0: never")
    server.add_argument("--spin", type=float, default=0, help="seconds of CPU time after each call")
    server.add_argument("--relay", action="store_true", help="two threads read in turn")
    server.set_defaults(role=serve)
    client = roles.add_parser("send")
    client.add_argument("address")
    client.add_argument("port", type=int)
    client.add_argument("--sndbuf", type=int, default=0)
    client.add_argument("--total", type=int, default=0)
    client.add_argument("--nats", action="store_true", help="publish to a NATS server")
    client.set_defaults(role=send)
    for role in (server, client):
        role.add_argument("--bytes", type=int, default=65536, help="per call")
        role.add_argument("--pause", type=float, default=0, help="seconds after each call")
    options = parser.parse_args()
    signal.alarm(options.seconds)
    try:
        options.role(options)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)


if __name__ == "__main__":
    main()
