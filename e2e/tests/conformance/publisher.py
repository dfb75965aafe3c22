#!/usr/bin/env python3
"""A publisher written from docs/protocol.md alone: the second implementation of the protocol.

Usage: publisher.py tcp|xdp ADDRESS PORT TOPIC

Publishes numbered lines over the path in batches of different sizes and checks every answer of the broker.
Prints the number of the session, then the lines.
"""

import random
import socket
import struct
import sys

BATCHES = 40
LARGEST_PART = 1300
HELLO = struct.Struct("<4sHHQIIBBBxIQI4x")
WELCOME = struct.Struct("<4sHHQIIQQQI4x")
FRAME = struct.Struct("<B3xIQI")
REPLY = struct.Struct("<BBHIQ")
DATA = struct.Struct("<QHHBB2xQQIIII")
ACK = struct.Struct("<QHBBQIIQQ")


def crc_table():
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


TABLE = list(crc_table())


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def lines():
    """The messages of each batch."""
    rng, number = random.Random(1), 0
    for _ in range(BATCHES):
        batch = []
        for _ in range(rng.randrange(1, 30)):
            batch.append(b"%d %s" % (number, b"x" * rng.randrange(300)))
            number += 1
        yield batch


def hello(topic, path):
    # Version 1, a new session, stream 0 of 1, ack level 1, order level 0.
    largest = 1472 if path == "xdp" else 0
    return HELLO.pack(b"PNSK", 1, len(topic), 0, 0, 1, 1, 0, int(path == "xdp"), 1 << 16, 0, largest) + topic


def frame(kind, payload, seq, messages):
    """A frame's header: what precedes the checksum, and the checksum."""
    start = FRAME.pack(kind, len(payload), seq, messages)
    return start + struct.pack("<I", crc32c(start + struct.pack("<I", crc32c(payload))))


def batches():
    """Payload, number of messages and checksum of each batch."""
    for seq, messages in enumerate(lines()):
        payload = b"".join(struct.pack("<I", len(each)) + each for each in messages)
        yield payload, len(messages), frame(1, payload, seq, len(messages))


def read(sock, length):
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise SystemExit(f"the broker closed after {len(data)} of {length} bytes")
        data += part
    return data


def opened(address, topic, path):
    sock = socket.create_connection(address, timeout=30)
    sock.sendall(hello(topic, path))
    magic, version, refusal, session, largest, text_len, committed, key, credit, datagram = WELCOME.unpack(read(sock, 56))
    assert (magic, version, refusal) == (b"PNSK", 1, 0), (magic, version, refusal, sock.recv(text_len))
    assert session and largest >= 1 << 16 and text_len == 0 and committed == 0
    assert (key != 0) == (credit != 0) == (datagram != 0) == (path == "xdp"), (key, credit, datagram)
    return sock, session, key, credit


def wait_for_acks(sock, wanted):
    """Acks rise up to the number of batches; the broker closes after the one that confirms the end."""
    committed = 0
    while True:
        first = sock.recv(1)
        if not first:
            break
        kind, flags, error, length, now = REPLY.unpack(first + read(sock, 15))
        assert (kind, flags, error, length) == (3, 0, 0, 0), (kind, flags, error, sock.recv(length))
        assert committed <= now <= wanted
        committed = now
    assert committed == wanted, "the broker closes when everything is committed"


def over_tcp(address, topic):
    sock, session, _, _ = opened(address, topic, "tcp")
    for payload, _, header in batches():
        sock.sendall(header + payload)
    sock.sendall(frame(2, b"", BATCHES, 0))
    wait_for_acks(sock, BATCHES)
    return session


def packet(key, number, payload, seq, length, offset, messages, checksum):
    covered = DATA.pack(key, 0, len(payload), 0, 0, number, seq, length, offset, messages, checksum) + payload
    return b"PNSD" + struct.pack("<I", crc32c(covered)) + covered


def parse_ack(data, key):
    """Largest packet received, packets received in all, committed, and credit."""
    magic, checksum = struct.unpack_from("<4sI", data)
    assert magic == b"PNSA" and checksum == crc32c(data[8:]), "an ACK with its checksum"
    its_key, stream, gaps, flags, largest, _, run, committed, credit = ACK.unpack_from(data, 8)
    assert (its_key, stream, flags) == (key, 0, 0)
    assert len(data) == 52 + 8 * gaps and gaps <= 31
    received = run
    for gap in range(gaps):
        missing, run = struct.unpack_from("<II", data, 52 + 8 * gap)
        assert missing > 0
        received += run
    return largest, received, committed, credit


class Datagrams:
    """The packets of a stream; each has a new number, also one that carries a part again."""

    def __init__(self, address, own, key, credit):
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((own, 0))
        self.sock.connect(address)
        self.sock.settimeout(0.5)
        self.key, self.credit, self.number, self.committed = key, credit, 0, 0

    def send(self, *part):
        self.sock.send(packet(self.key, self.number, *part))
        self.number += 1

    def read_ack(self):
        """The largest packet that the broker has; None if no ACK comes."""
        try:
            largest, received, committed, credit = parse_ack(self.sock.recv(2048), self.key)
        except TimeoutError:
            return None
        assert largest < self.number and received <= self.number
        assert committed >= self.committed and credit >= self.credit, "neither goes back"
        self.committed, self.credit = committed, credit
        return largest

    def send_until(self, is_done, parts):
        """Sends parts, and again when no ACK comes for a while: a datagram may be lost."""
        for _ in range(60):
            for part in parts:
                self.send(*part)
            while (largest := self.read_ack()) is not None:
                if is_done(largest):
                    return
        raise SystemExit(f"no ACK; {self.committed} batches are committed")


def over_xdp(address, topic):
    sock, session, key, credit = opened(address, topic, "xdp")
    datagrams, sent = Datagrams(address, sock.getsockname()[0], key, credit), 0
    for seq, (payload, messages, header) in enumerate(batches()):
        sent += len(payload)
        assert sent <= datagrams.credit, "the broker's credit does not rise"
        checksum = struct.unpack_from("<I", header, 20)[0]
        offsets = range(0, len(payload), LARGEST_PART)
        # Whichever part comes first reserves the batch's place.
        parts = [
            (payload[offset : offset + LARGEST_PART], seq, len(payload), offset, messages, checksum)
            for offset in reversed(offsets)
        ]
        datagrams.send_until(lambda _: datagrams.committed == seq + 1, parts)
    # A ping is acknowledged like any packet.
    ping = datagrams.number
    datagrams.send_until(lambda largest: largest >= ping, [(b"", 0, 0, 0, 0, 0)])
    sock.sendall(frame(2, b"", BATCHES, 0))
    wait_for_acks(sock, BATCHES)
    return session


def main():
    path, address, port, topic = sys.argv[1:]
    publish = {"tcp": over_tcp, "xdp": over_xdp}[path]
    print(f"{publish((address, int(port)), topic.encode()):016x}")
    for batch in lines():
        for message in batch:
            sys.stdout.buffer.write(message + b"\n")


if __name__ == "__main__":
    main()
