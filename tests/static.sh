#!/usr/bin/env bash
# tests/static.sh BINARY [QEMU]: proves that the binary is static, then that it needs nothing but itself. It runs in a root that
# holds the binary, a configuration, a state_dir, /etc/hosts and a CA file, refreshes an expired login and streams an answer,
# with TLS on both sides, by a host name that only that /etc/hosts knows. Needs root, python3 and openssl. QEMU is a static
# user-mode emulator for a binary of another architecture.
set -euo pipefail
binary=$(realpath "${1:?usage: tests/static.sh BINARY [QEMU]}")
qemu=${2:-}
fail() {
    echo "static: FAILED: $*" >&2
    exit 1
}

[[ $(file -b "$binary") == *static* ]] || fail "$(file "$binary")"
[[ $(ldd "$binary" 2>&1 || true) =~ statically\ linked|not\ a\ dynamic ]] || fail "$(ldd "$binary" 2>&1)"
if readelf -lW "$binary" | grep INTERP; then fail "it names a dynamic loader"; fi
if readelf -dW "$binary" | grep NEEDED; then fail "it needs libraries"; fi
echo "static: $(stat -c %s "$binary") bytes, no loader, no libraries"

if [ "$(id -u)" != 0 ]; then
    echo "static: SKIPPED: not root, so no chroot: the empty root is NOT tried" >&2
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/etc "$root"/state/claude "$root"/state/tls
install -m 0755 "$binary" "$root/ai-mux"
[ -z "$qemu" ] || install -m 0755 "$qemu" "$root/qemu"
echo "127.0.0.1 upstream.ai-mux.test" > "$root/etc/hosts"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=ai-mux test CA" \
    -keyout "$work/ca.key" -out "$root/ca.pem" 2> /dev/null
# certificate NAME FILE: FILE.pem and FILE.key, signed by the CA.
certificate() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" \
        -keyout "$2.key" -out "$work/request" 2> /dev/null
    openssl x509 -req -in "$work/request" -days 2 -CA "$root/ca.pem" -CAkey "$work/ca.key" -CAcreateserial \
        -CAserial "$work/serial" -extfile <(echo "subjectAltName=DNS:$1") -out "$2.pem" 2> /dev/null
}
certificate upstream.ai-mux.test "$work/upstream"
certificate mux.ai-mux.test "$root/state/tls/mux"

timeout 60 python3 - "$work" ${qemu:+/qemu} << 'PYTHON'
import http.client, json, os, pathlib, re, shutil, signal, socket, ssl, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

work = pathlib.Path(sys.argv[1])
root = work / "root"
emulator = sys.argv[2:]
first_shown = threading.Event()
seen = []


class Vendor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        seen.append((self.path, self.headers["host"], self.headers["authorization"], body))
        self.send_response(200)
        if self.path == "/token":
            tokens = {"access_token": "access-new", "refresh_token": "refresh-new", "expires_in": 3600}
            answer = json.dumps(tokens).encode()
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"9\r\nevent: 1\n\r\n")
        # The second event waits for the client to have the first one.
        if first_shown.wait(20):
            self.wfile.write(b"9\r\nevent: 2\n\r\n0\r\n\r\n")

    def log_message(self, *_):
        pass


vendor = ThreadingHTTPServer(("127.0.0.1", 0), Vendor)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(work / "upstream.pem", work / "upstream.key")
vendor.socket = tls.wrap_socket(vendor.socket, server_side=True)
threading.Thread(target=vendor.serve_forever, daemon=True).start()
upstream = f"https://upstream.ai-mux.test:{vendor.server_port}"

login = {"claudeAiOauth": {"accessToken": "access-old", "refreshToken": "refresh-old", "expiresAt": 1, "scopes": []}}
(root / "state/claude/.credentials.json").write_text(json.dumps(login))
(root / "ai-mux.yaml").write_text(f"""
listen: 127.0.0.1:0
state_dir: /state
providers: [{{ name: claude, base_url: "{upstream}", token_url: "{upstream}/token" }}]
users: [{{ name: alice, token: 0123456789abcdef-alice }}]
tls: {{ enabled: true, cert_path: /state/tls/mux.pem, key_path: /state/tls/mux.key }}
""")
nobody = 65534
for path in [root / "state", *(root / "state").rglob("*")]:
    os.chown(path, nobody, nobody)
held = {f"/{p.relative_to(root)}" for p in root.rglob("*") if not p.is_relative_to(root / "state")}
assert held == {"/ai-mux", "/ai-mux.yaml", "/ca.pem", "/etc", "/etc/hosts", *emulator}, held

mux = subprocess.Popen(
    [shutil.which("chroot"), f"--userspec={nobody}:{nobody}", root, *emulator, "/ai-mux", "--config", "/ai-mux.yaml"],
    env={"SSL_CERT_FILE": "/ca.pem"}, stderr=subprocess.PIPE, text=True,
)
log = []
try:
    port = None
    for line in mux.stderr:
        log.append(line)
        if found := re.search(r"listening on https://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
            break
    assert port, f"it did not start: {log}"
    # Or a full pipe would make it wait.
    rest = threading.Thread(target=lambda: log.extend(mux.stderr), daemon=True)
    rest.start()

    trusted = ssl.create_default_context(cafile=root / "ca.pem")
    link = trusted.wrap_socket(socket.create_connection(("127.0.0.1", port), 20), server_hostname="mux.ai-mux.test")
    body = b'{"stream":true}'
    link.sendall(
        b"POST /claude/v1/messages HTTP/1.1\r\nhost: mux.ai-mux.test\r\nconnection: close\r\n"
        b"authorization: Bearer 0123456789abcdef-alice\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )
    answer = http.client.HTTPResponse(link)
    answer.begin()
    assert answer.status == 200, (answer.status, answer.read())
    assert answer.readline() == b"event: 1\n"
    first_shown.set()
    assert answer.read() == b"event: 2\n"
    link.close()

    (token, message) = seen
    assert token[0] == "/token" and json.loads(token[3])["refresh_token"] == "refresh-old", token
    assert message == ("/v1/messages", upstream.removeprefix("https://"), "Bearer access-new", body), message
    saved = json.loads((root / "state/claude/.credentials.json").read_text())["claudeAiOauth"]
    assert saved["refreshToken"] == "refresh-new", saved

    mux.send_signal(signal.SIGTERM)
    assert mux.wait(20) == 0, mux.returncode
    rest.join(20)
    secrets = ["access-old", "access-new", "refresh-old", "refresh-new", "0123456789abcdef-alice"]
    assert not [secret for secret in secrets if secret in "".join(log)], "a secret in the log"
except BaseException:
    print("".join(log), file=sys.stderr)
    raise
finally:
    mux.kill()
PYTHON
echo "static: in an empty root it refreshed a login and streamed an answer, TLS on both sides"
