"""What root inside a pod can try, with the capabilities a container can be given: `untrusted.py VERB [ARGUMENT...]`.

Prints one JSON object that says what came of it; judging is the test's. Everything is bounded in time and number, and
aims only at the addresses that are given.
"""

import ctypes
import json
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys

LIMIT = 5
MESH_PORTS = (15001, 15006, 15008)
SO_REUSEPORT, SO_ATTACH_REUSEPORT_CBPF, TCP_REPAIR = 15, 51, 19


def at(text):
    host, port = text.rsplit(":", 1)
    return host.strip("[]"), int(port)


def tcp(address):
    made = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    made.settimeout(LIMIT)
    return made


def talk(conn, address):
    """Connects, asks, and says what happened: an answer, or in one word how there was none."""
    try:
        conn.connect(address)
        conn.sendall(b"GET / HTTP/1.1\r\nhost: server\r\nconnection: close\r\n\r\n")
        received = b""
        while chunk := conn.recv(65536):
            received += chunk
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return type(error).__name__
    finally:
        conn.close()
    if not received.startswith(b"HTTP/1."):
        return "closed" if not received else "bytes"
    head, body = received.split(b"\r\n\r\n", 1)
    answer = {"status": int(head.split()[1])}
    found = re.search(rb"\{.*\}", body, re.DOTALL)
    return answer | {"echo": json.loads(found.group())} if found else answer


def reset(conn):
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def captured(address):
    """A connection that the mesh has captured, and the port in the pod that it was sent to."""
    conn = tcp(address)
    conn.connect(address)
    mine = conn.getsockname()[1]
    for line in open("/proc/self/net/tcp", encoding="ascii"):
        fields = line.split()
        if fields[1].endswith(f":{mine:04X}") and fields[3] != "0A":
            return conn, mine, int(fields[2].rsplit(":", 1)[1], 16)
    raise SystemExit("no such connection in /proc/net/tcp")


def options(target):
    """Dials with each option that an agent, a proxy or a root process may set."""
    one = struct.pack("i", 1)
    tried = {
        "SO_MARK 1": (socket.SOL_SOCKET, 36, one),
        "SO_MARK 1337": (socket.SOL_SOCKET, 36, struct.pack("I", 1337)),
        "SO_MARK all": (socket.SOL_SOCKET, 36, struct.pack("I", 0xFFFFFFFF)),
        "SO_PRIORITY": (socket.SOL_SOCKET, 12, struct.pack("i", 7)),
        "SO_REUSEADDR": (socket.SOL_SOCKET, 2, one),
        "SO_REUSEPORT": (socket.SOL_SOCKET, SO_REUSEPORT, one),
        "SO_KEEPALIVE": (socket.SOL_SOCKET, 9, one),
        "SO_DONTROUTE": (socket.SOL_SOCKET, 5, one),
        "SO_INCOMING_CPU": (socket.SOL_SOCKET, 49, struct.pack("i", 0)),
        "SO_BINDTODEVICE": (socket.SOL_SOCKET, 25, b"eth0\0"),
        "IP_TRANSPARENT": (socket.IPPROTO_IP, 19, one),
        "IP_FREEBIND": (socket.IPPROTO_IP, 15, one),
        "IP_BIND_ADDRESS_NO_PORT": (socket.IPPROTO_IP, 24, one),
        "IP_TTL": (socket.IPPROTO_IP, 2, one),
        "TCP_NODELAY": (socket.IPPROTO_TCP, 1, one),
        "TCP_FASTOPEN_CONNECT": (socket.IPPROTO_TCP, 30, one),
    }
    said = {}
    for name, (level, option, value) in tried.items():
        conn = tcp(at(target))
        conn.settimeout(2)
        conn.setsockopt(level, option, value)
        answer = talk(conn, at(target))
        said[name] = answer["status"] if isinstance(answer, dict) else answer
    return said


def dial(*targets):
    return {target: talk(tcp(at(target)), at(target)) for target in targets}


def borrow(source, target):
    """Dials from an address that this process says is its own."""
    if not source.startswith("127."):
        subprocess.run(["ip", "address", "replace", f"{source}/32", "dev", "lo"], check=True)
    conn = tcp(at(target))
    conn.bind((source, 0))
    answer = talk(conn, at(target))
    return {"answer": answer}


def forged(source, target, count):
    """Sends SYNs that say they come from `source`, past every socket."""
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    host, port = at(target)
    ends = socket.inet_aton(source) + socket.inet_aton(host)

    def checksum(data):
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return ~total & 0xFFFF

    sent = 0
    for number in range(int(count)):
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, number, 0, 64, 6, 0) + ends
        syn = [40000 + number, port, number, 0, 5 << 4, 2, 65535, 0, 0]
        pseudo = ends + struct.pack("!HH", 6, 20)
        syn[7] = checksum(pseudo + struct.pack("!HHIIBBHHH", *syn))
        raw.sendto(ip + struct.pack("!HHIIBBHHH", *syn), (host, 0))
        sent += 1
    return {"sent": sent}


def replay(own, target, times):
    """Uses the source port of a captured connection again for the agent's port, during it and right after it."""
    said = {"bytes": 0, "dials": 0}

    def again(port, to):
        conn = tcp((own, to))
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        conn.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
        try:
            conn.bind((own, port))
        except OSError:
            return
        said["dials"] += 1
        said["bytes"] += talk(conn, (own, to)) not in ("closed", "ConnectionRefusedError", "ConnectionResetError")

    for _ in range(int(times)):
        conn, mine, hashed = captured(at(target))
        again(mine, 15001)
        reset(conn)
        for port in (hashed, 15001, 15006):
            again(mine, port)
    return said


def listen_on_hash(target, times):
    """Listens where the target's connections are sent to, in a reuseport group that picks by a program of its own."""
    conn, _, hashed = captured(at(target))
    reset(conn)
    listeners = []
    for _ in range(2):
        listener = tcp(("", hashed))
        listener.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
        listener.bind(("", hashed))
        listener.listen()
        listener.setblocking(False)
        listeners.append(listener)
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    fprog = struct.pack("HxxxxxxQ", 1, ctypes.addressof(program))
    listeners[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, fprog)
    answers = [talk(tcp(at(target)), at(target)) for _ in range(int(times))]
    strangers = 0
    for listener in listeners:
        try:
            listener.accept()
            strangers += 1
        except BlockingIOError:
            pass
    good = sum(isinstance(answer, dict) and answer["status"] == 200 for answer in answers)
    return {"port": hashed, "good": good, "strangers": strangers}


def squat(own):
    """Tries to share the agent's ports."""
    taken = []
    for port in MESH_PORTS:
        for host in ("0.0.0.0", "127.0.0.1", own, "::", "::1"):
            for flags in ((), (2,), (SO_REUSEPORT,), (2, SO_REUSEPORT)):
                conn = tcp((host, port))
                for flag in flags:
                    conn.setsockopt(socket.SOL_SOCKET, flag, 1)
                try:
                    conn.bind((host, port))
                    conn.listen()
                    taken.append([host, port, list(flags)])
                except OSError:
                    pass
                conn.close()
    return {"taken": taken}


def bpf(_=None):
    """Asks the kernel for programs, maps and links, and tries to load programs. The numbers are errors (errno)."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[platform.machine()]

    def call(command, attributes):
        buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
        result = libc.syscall(number, command, buffer, 128)
        return ctypes.get_errno() if result < 0 else 0

    code = ctypes.create_string_buffer(struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    license_text = ctypes.create_string_buffer(b"GPL\0")

    def load(kind, hook):
        head = struct.pack("IIQQIIQII", kind, 2, ctypes.addressof(code), ctypes.addressof(license_text), 0, 0, 0, 0, 0)
        return call(5, head + struct.pack("16sII", b"", 0, hook))

    return {
        "next program": call(11, struct.pack("II", 0, 0)),
        "next map": call(12, struct.pack("II", 0, 0)),
        "next link": call(31, struct.pack("II", 0, 0)),
        "map by id": call(14, struct.pack("II", 1, 0)),
        "load connect4": load(18, 10),
        "load sk_lookup": load(30, 36),
        "load tc": load(3, 0),
    }


def network(*lines):
    """Runs commands of `ip`, `tc` and `ss`, and says how each ended."""
    said = {}
    for line in lines:
        done = subprocess.run(line.split(), capture_output=True, text=True, timeout=LIMIT, check=False)
        said[line] = done.returncode
    return said


def flood(target, count):
    """Connects and resets, as fast as it goes."""
    outcomes = {}
    for _ in range(int(count)):
        conn = tcp(at(target))
        try:
            conn.connect(at(target))
            outcome = "connected"
        except OSError as error:
            outcome = type(error).__name__
        reset(conn)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def connections(host, first, count):
    """Connections to many ports that no packet is sent for (`TCP_REPAIR`)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = []
    for number in range(count):
        conn = tcp((host, 0))
        conn.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        conn.connect((host, first + number % 16))
        kept.append(conn)
    return kept


def hold(host, processes, count, probe):
    """Has several processes keep connections, then dials in earnest, while they are kept and after."""
    children = []
    for number in range(int(processes)):
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            kept = connections(host, 1000 * (number + 1), int(count))
            os.write(tells, struct.pack("I", len(kept)))
            signal.pause()
        os.close(tells)
        children.append((child, told))
    kept = sum(struct.unpack("I", os.read(told, 4))[0] for _, told in children)
    during = talk(tcp(at(probe)), at(probe))
    for child, _ in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"kept": kept, "during": during}


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(source, destination, port, flags, payload, hidden):
    """A TCP segment made by hand, in an IP packet; `hidden` behind options of IPv6."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    header = struct.pack("!HHIIBBHHH", 40000, port, 1, 1, 5 << 4, flags, 8192, 0, 0)
    length = len(header) + len(payload)
    pseudo = ends + (struct.pack("!BBH", 0, 6, length) if family == socket.AF_INET else struct.pack("!II", length, 6))
    header = header[:16] + struct.pack("!H", checksum(pseudo + header + payload)) + header[18:]
    if family == socket.AF_INET:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 6, 0) + ends
        return 0x0800, ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + header + payload
    options = struct.pack("!BBBB4x", 6, 0, 1, 4) if hidden else b""
    ip = struct.pack("!IHBB", 6 << 28, length + len(options), 60 if hidden else 6, 64) + ends
    return 0x86DD, ip + options + header + payload


def by_hand(source, destination, bypass, *segments):
    """Sends segments past the kernel's TCP, and where asked past its queues: each `PORT:FLAGS:BYTES`, and of IPv6
    `:hidden` behind options and `:mapped` from an IPv4 address."""
    gateway = "fe80::1" if ":" in source else "169.254.1.1"
    neighbour = subprocess.run(["ip", "neigh", "show", gateway, "dev", "eth0"], capture_output=True, text=True).stdout
    mac = bytes.fromhex(re.search(r"lladdr (\S+)", neighbour).group(1).replace(":", ""))
    return send_by_hand("eth0", mac, source, destination, bypass, segments)


def by_hand_from(device, source, destination, *segments):
    """As above, by this interface, to whoever is there."""
    return send_by_hand(device, b"\xff" * 6, source, destination, 1, segments)


def send_by_hand(device, mac, source, destination, bypass, segments):
    SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as packets:
        packets.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, int(bypass))
        packets.bind((device, 0))
        own = packets.getsockname()[4]
        for text in segments:
            port, flags, size, *rest = text.split(":")
            end = "::ffff:10.9.8.7" if "mapped" in rest else source
            kind, packet = segment(end, destination, int(port), int(flags), b"x" * int(size), "hidden" in rest)
            packets.send(mac + own + struct.pack("!H", kind) + packet)
    return {"sent": len(segments)}


VERBS = {
    verb.__name__: verb
    for verb in (options, dial, borrow, forged, replay, listen_on_hash, squat, bpf, network, flood, hold)
    + (by_hand, by_hand_from)
}

if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])))
    sys.stdout.flush()
    # Thousands of open sockets are the kernel's to close.
    os._exit(0)
