#!/usr/bin/env python3
"""A TCP server and a client that are slow in a chosen way, for causes that diagnose must name."""

import argparse
import signal
import socket
import sys
import threading
import time


def receive(connection, options):
    """Reads until the other end closes, so many bytes a call, with a pause after each."""
    while connection.recv(options.bytes):
        if options.pause:
            time.sleep(options.pause)


def serve(options):
    """Accepts for ever; each connection is read by a thread of its own."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.rcvbuf:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.rcvbuf)
    listener.bind(("0.0.0.0", options.port))
    listener.listen()
    while True:
        connection, _ = listener.accept()
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
