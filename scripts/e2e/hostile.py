#!/usr/bin/env python3
"""Peers that a broker must be able to bear. Usage: hostile.py FROM ADDRESS PORT KIND [NUMBER]

Speaks just enough of docs/protocol.md to do harm. FROM is its own address. NUMBER means connections, or for
floods seconds: they last so long at least, and until SIGTERM. Says "ready" and its pid on stderr before a
flood, and on stdout how much it sent, as one JSON object.
"""

import collections
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time

UDP_SEGMENT = 103  # linux/udp.h
SEGMENTS = 64
LARGEST_BURST = 65000
LONGEST = 120  # seconds of a flood that nobody ends
DATA = struct.Struct("<4sIQHHB3xQQIIII")
HEAD = 8  # magic and checksum
MAGIC = b"PNSD"


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


def packet(key, number, seq, length, offset, payload, messages=1):
    """A DATA packet with a checksum that is right."""
    fields = (key, 0, len(payload), 0, number, seq, length, offset, messages, 0)
    covered = DATA.pack(MAGIC, 0, *fields)[HEAD:] + payload
    return MAGIC + struct.pack("<I", crc32c(covered)) + covered


def hello(path=0, session=0, stream=0, streams=1, payload=1 << 16, resume=0, topic=b"penstock", length=None):
    length = len(topic) if length is None else length
    fixed = (b"PNSK", 1, length, session, stream, streams, 1, 0, path, payload, resume, 1472 * path)
    return struct.pack("<4sHHQIIBBBxIQI4x", *fixed) + topic


class Broker:
    def __init__(self, own, address):
        self.own, self.address = own, address

    def connect(self):
        return socket.create_connection(self.address, timeout=10, source_address=(self.own, 0))

    def datagrams(self, segment=None):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((self.own, 0))
        if segment:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
        sock.connect(self.address)
        return sock

    def answer(self, sock):
        """Refusal's code, and the whole Welcome."""
        welcome = b""
        while len(welcome) < 56:
            part = sock.recv(56 - len(welcome))
            if not part:
                return None, welcome
            welcome += part
        return struct.unpack_from("<H", welcome, 6)[0], welcome


told_to_end = []


def ready():
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.append(True))
    print("ready", os.getpid(), file=sys.stderr, flush=True)


def flood(broker, seconds, packets):
    """Sends packets of one size over and over, as many with one call as it takes."""
    size = len(packets[0])
    assert all(len(each) == size for each in packets)
    step = min(SEGMENTS, LARGEST_BURST // size)
    bursts = [b"".join(packets[at : at + step]) for at in range(0, len(packets), step)]
    sock = broker.datagrams(size)
    ready()
    sent, start = 0, time.monotonic()
    while time.monotonic() < start + (seconds if told_to_end else LONGEST):
        for burst in bursts:
            try:
                sock.send(burst)
                sent += len(burst) // size
            except (BlockingIOError, ConnectionRefusedError):
                pass
    return {"packets": sent, "seconds": time.monotonic() - start, "bytes": size}


def guessed(broker, seconds):
    """Good packets of streams that it can only guess."""
    rng = random.Random(1)
    pad = bytes(64)
    packets = [packet(rng.getrandbits(64), n, n, 1 << 16, 0, pad) for n in range(20 * SEGMENTS)]
    return flood(broker, seconds, packets)


def damaged(broker, seconds):
    """What was seen of an honest publisher, with a checksum that fits nothing."""
    rng = random.Random(2)
    return flood(broker, seconds, [each[:4] + rng.randbytes(4) + each[HEAD:] for each in overheard()])


def repeated(broker, seconds):
    """What was seen of an honest publisher, from another address."""
    return flood(broker, seconds, overheard())


def overheard():
    """Packets of an honest publisher, all of one size; says "ready" when it listens."""
    seen = collections.defaultdict(list)
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    tap.settimeout(10)
    ready()
    while not any(len(packets) == 4 * SEGMENTS for packets in seen.values()):
        ip = tap.recv(65536)
        if ip[0] >> 4 != 4 or ip[9] != socket.IPPROTO_UDP:
            continue
        datagram = ip[(ip[0] & 15) * 4 :]
        payload = datagram[8 : struct.unpack_from(">H", datagram, 4)[0]]
        if payload[:4] == MAGIC:
            seen[len(payload)].append(payload)
    tap.close()
    return max(seen.values(), key=len)


def refused(broker, count):
    """Hellos for a session that is not there; each is told so."""
    told = 0
    for number in range(count):
        with broker.connect() as sock:
            sock.sendall(hello(session=number + 1, stream=0))
            told += broker.answer(sock)[0] == 4
    return {"connections": count, "refused": told}


def unanswered(broker, count):
    """Half hellos, all open at once, until the broker closes them."""
    socks = [broker.connect() for _ in range(count)]
    for number, sock in enumerate(socks):
        # The broker may have had to make room.
        try:
            sock.sendall(hello()[: number % 48])
        except OSError:
            pass
    return {"connections": count, "closed": sum(closed(sock) for sock in socks)}


def slow(broker, count):
    """Hellos byte by byte, each in time for a patience that begins anew, none in time for one that does not."""
    socks = [broker.connect() for _ in range(count)]
    gone = set()
    for byte in hello():
        for sock in set(socks) - gone:
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                gone.add(sock)
        time.sleep(0.1)
    return {"connections": count, "closed": len(gone | {sock for sock in socks if closed(sock)})}


def closed(sock):
    """Whether the broker closes, whatever it says before."""
    try:
        while sock.recv(4096):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def left_open(broker, count):
    """Streams over xdp of which no packet ever comes."""
    socks = [broker.connect() for _ in range(count)]
    for sock in socks:
        sock.sendall(hello(path=1))
    opened = [sock for sock in socks if broker.answer(sock)[0] == 0]
    ready()
    # The broker gives them up after 10 s.
    for sock in opened:
        sock.settimeout(20)
    return {"connections": count, "opened": len(opened), "closed": sum(closed(sock) for sock in opened)}


def claims(broker, count):
    """Hellos and packets that claim what cannot be; the stream is its own."""
    wrong = {
        "no streams": hello(streams=0),
        "streams": hello(streams=1025),
        "stream": hello(stream=0xFFFFFFFF, streams=0xFFFFFFFF),
        "batches": hello(session=7, resume=(1 << 64) - 1),
        "topic": hello(length=0xFFFF),
        "another folder": hello(topic=b"../../etc/passwd"),
    }
    codes = {}
    for what, said in wrong.items():
        with broker.connect() as sock:
            sock.sendall(said)
            codes[what] = broker.answer(sock)[0]
    sock = broker.connect()
    sock.sendall(hello(path=1, payload=0xFFFFFFFF))
    code, welcome = broker.answer(sock)
    assert code == 0, code
    key, credit = struct.unpack_from("<QQ", welcome, 32)
    datagrams = broker.datagrams()
    for number in range(count):
        part = bytes(100)
        kinds = [
            # Almost 4 GiB; far beyond the first; as many messages as bytes; bytes outside of the batch.
            packet(key, 8 * number, 0, 0xFFFFFFF0, 0xFFFFFF00, part),
            packet(key, 8 * number + 1, 1 << 61, 200, 0, part),
            packet(key, 8 * number + 2, 2, 200, 0, part, messages=0xFFFFFFFF),
            packet(key, 8 * number + 3, 3, 50, 0, part),
            # A batch for each packet, the largest there is: more and more room, if credit were not kept to.
            packet(key, 8 * number + 4, 4 + number, 1 << 20, 0, part),
            packet(key, (1 << 62) + number, 4, 200, 0, part),
        ]
        for each in kinds:
            datagrams.send(each)
        time.sleep(0.0005)
    return {"codes": codes, "packets": 6 * count, "credit": credit}


def batch_header(seq, length):
    """The header of a batch over tcp."""
    return struct.pack("<B3xIQII", 1, length, seq, 1, 0)


def hosts():
    """Addresses of the attacker: those of its interface that end in 100 and more."""
    listed = subprocess.run(["ip", "-4", "-br", "addr", "show", "dev", "b0"], capture_output=True, text=True, check=True)
    found = [word.split("/")[0] for word in listed.stdout.split() if "/" in word]
    return [host for host in found if int(host.split(".")[3]) >= 100]


def opened(broker, **fields):
    """An open stream: its connection, the key of its packets, and the largest batch."""
    sock = broker.connect()
    sock.sendall(hello(**fields))
    code, welcome = broker.answer(sock)
    assert code == 0, code
    return sock, struct.unpack_from("<Q", welcome, 32)[0], struct.unpack_from("<I", welcome, 16)[0]


def hoarded(broker, count):
    """From each of its hosts, over both paths: streams with batches of the largest size that are not sent, or
    nearly all of one; with as much of each as the broker takes. They stay until SIGTERM."""
    kept, streams = [], 0
    for host in hosts():
        mine = Broker(host, broker.address)
        datagrams = mine.datagrams()
        for _ in range(count):
            sock, _, largest = opened(mine)
            sock.sendall(batch_header(0, largest))
            sock.setblocking(False)
            try:
                sock.send(bytes(512 << 10))
            except BlockingIOError:
                pass
            control, key, largest = opened(mine, path=1, payload=largest)
            number = 0
            # A byte for each page, of which a receiver may take a piece of memory.
            for seq in range(3):
                for part in range(60):
                    datagrams.send(packet(key, number, seq, largest, part << 12, b"x"))
                    number += 2
            # And as many batches as may be open, of which each lacks a byte.
            for seq in range(3, 200):
                datagrams.send(packet(key, number, seq, 6, 0, b"x"))
                number += 2
            kept += [sock, control, datagrams]
            streams += 2
    ready()
    while not told_to_end:
        time.sleep(0.05)
    return {"streams": streams, "hosts": len(hosts())}


def udp_from(source, broker, payload):
    """An IP packet with any source address."""
    udp = struct.pack(">HHHH", 5353, broker.address[1], 8 + len(payload), 0) + payload
    ends = socket.inet_aton(source) + socket.inet_aton(broker.address[0])
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, 17, 0) + ends + udp


def reflected(broker, count):
    """Packets of its own stream, first from itself, then with the source address of somebody else: pings with
    gaps, each of which asks for a large ACK. Tells how many ACKs either got."""
    victim = hosts()[0]
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    tap.bind(("b0", 0x0800))
    tap.settimeout(2)
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    got = collections.Counter()
    control, key, _ = opened(broker, path=1)
    for number in range(count):
        for source in (victim, broker.own):
            raw.sendto(udp_from(source, broker, packet(key, 4 * number + 2 * (source == broker.own), 0, 0, 0, b"", 0)), (broker.address[0], 0))
        # The answer to the second is the sign that the first was seen.
        while True:
            ip, where = tap.recvfrom(65536)
            payload = ip[(ip[0] & 15) * 4 + 8 :]
            if where[2] == socket.PACKET_OUTGOING or ip[9] != socket.IPPROTO_UDP or payload[:4] != b"PNSA":
                continue
            to = socket.inet_ntoa(ip[16:20])
            got[to] += 1
            if to == broker.own:
                break
    control.close()
    return {"own": got[broker.own], "victim": got[victim]}


def main():
    own, address, port, kind = sys.argv[1:5]
    number = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    kinds = [guessed, damaged, repeated, refused, unanswered, slow, left_open, claims, hoarded, reflected]
    act = {each.__name__: each for each in kinds}[kind]
    print(json.dumps(act(Broker(own, (address, int(port))), number)))


if __name__ == "__main__":
    main()
