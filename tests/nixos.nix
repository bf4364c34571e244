# The module on a real NixOS, in a virtual machine: `nix build .#checks.x86_64-linux.nixos`.
# A stand-in for the vendor runs inside the machine, so that no account and no network is needed.
let
  # Hands out one login after another, each refresh token good for one use, and streams to the newest one only.
  vendor = ''
    import json
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    refreshes = 0


    class Vendor(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            global refreshes
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/token":
                if json.loads(body)["refresh_token"] != f"refresh-{refreshes}":
                    return self.answer(400, {"error": "invalid_grant"})
                refreshes += 1
                tokens = {
                    "access_token": f"access-{refreshes}",
                    "refresh_token": f"refresh-{refreshes}",
                    "expires_in": 3600,
                }
                return self.answer(200, tokens)
            if self.headers["authorization"] != f"Bearer access-{refreshes}":
                return self.answer(401, {"error": "stale token"})
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for event in (f"data: one of {refreshes}\n\n", "data: two\n\n", ""):
                self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())

        def answer(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


    ThreadingHTTPServer(("127.0.0.1", 9000), Vendor).serve_forever()
  '';

  # A login as Claude Code leaves it behind, long expired.
  login = builtins.toJSON {
    claudeAiOauth = {
      accessToken = "access-0";
      refreshToken = "refresh-0";
      expiresAt = 1;
      scopes = [ "user:inference" ];
    };
    kept = "as it was";
  };

  machine =
    { lib, pkgs, ... }:
    {
      environment.systemPackages = [ pkgs.openssl ];

      systemd.services.vendor = {
        requiredBy = [ "ai-mux.service" ];
        before = [ "ai-mux.service" ];
        serviceConfig.ExecStart = "${lib.getExe pkgs.python3} ${pkgs.writeText "vendor.py" vendor}";
      };

      # The token, and the certificate for the second machine, as secrets reach a real one: at run time, root's own.
      systemd.services.secrets = {
        requiredBy = [ "ai-mux.service" ];
        before = [ "ai-mux.service" ];
        path = [ pkgs.openssl ];
        serviceConfig = {
          Type = "oneshot";
          RemainAfterExit = true;
        };
        script = ''
          umask 077
          mkdir -p /run/secrets
          openssl rand -hex 20 > /run/secrets/alice
          mkdir -m 0755 -p /run/certificates
          openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost \
            -addext subjectAltName=DNS:localhost -keyout /run/certificates/key.pem -out /run/certificates/cert.pem
          chgrp -R certificates /run/certificates
          chmod 0640 /run/certificates/*.pem
        '';
      };
      users.groups.certificates = { };

      services.ai-mux = {
        enable = true;
        users.alice.tokenFile = "/run/secrets/alice";
        settings.providers = [
          {
            name = "claude";
            base_url = "http://127.0.0.1:9000";
            token_url = "http://127.0.0.1:9000/token";
          }
        ];
      };
    };
in
{
  name = "ai-mux";

  nodes.plain = machine;
  nodes.https = {
    imports = [ machine ];
    services.ai-mux = {
      settings.listen = ":443";
      tls = {
        certificate = "/run/certificates/cert.pem";
        key = "/run/certificates/key.pem";
        group = "certificates";
      };
    };
  };

  testScript = ''
    start_all()

    def ask(machine, url, token):
        return machine.succeed(
            f"curl -sS --cacert /run/certificates/cert.pem -w '%{{http_code}}' "
            f"-H 'authorization: Bearer {token}' --json '{{}}' {url}/claude/v1/messages"
        )

    for machine, url, port in (plain, "http://localhost:8080", 8080), (https, "https://localhost", 443):
        machine.wait_for_unit("ai-mux.service")
        machine.wait_for_open_port(9000)
        machine.wait_for_open_port(port)
        token = machine.succeed("cat /run/secrets/alice").strip()

        with subtest("a stranger is refused, and without a login nobody is served"):
            assert ask(machine, url, "not-a-token-of-anyone").endswith("401")
            assert ask(machine, url, token).endswith("503")

        with subtest("a login moved in as the README says is refreshed and served, without a restart"):
            machine.succeed(
                "mkdir -m 0700 /root/claude",
                """echo '${login}' > /root/claude/.credentials.json""",
                "chmod 0600 /root/claude/.credentials.json",
                "mv /root/claude /var/lib/ai-mux/",
                "chown -R --reference=/var/lib/ai-mux/ /var/lib/ai-mux/claude",
            )
            answer = ask(machine, url, token)
            assert answer == "data: one of 1\n\ndata: two\n\n200", answer

        with subtest("the refreshed login survives a restart"):
            machine.systemctl("restart ai-mux.service")
            machine.wait_for_open_port(port)
            assert "data: one of 1" in ask(machine, url, token)
            saved = machine.succeed("cat /var/lib/ai-mux/claude/.credentials.json")
            assert "refresh-1" in saved and "as it was" in saved, saved

        with subtest("the logins are for the service alone"):
            assert machine.succeed("stat -Lc %a /var/lib/ai-mux").strip() == "700"
            assert machine.succeed("stat -Lc %a /var/lib/ai-mux/claude/.credentials.json").strip() == "600"
            machine.fail("runuser -u nobody -- cat /var/lib/ai-mux/claude/.credentials.json")
            machine.fail("runuser -u nobody -- cat /run/credentials/ai-mux.service/user-alice")

        with subtest("the token stands neither in the unit nor in the configuration"):
            unit = machine.succeed("systemctl cat ai-mux.service")
            config = machine.succeed("systemctl show -P ExecStart ai-mux.service | grep -o '/nix/store/[^ ]*json' | head -n 1")
            assert token not in unit and token not in machine.succeed(f"cat {config}")
            assert token not in machine.succeed("journalctl -u ai-mux.service")

        with subtest("the unit stays hardened"):
            machine.succeed("systemd-analyze security --threshold=15 ai-mux.service")

        with subtest("it stops when asked"):
            machine.systemctl("stop ai-mux.service")
            assert machine.succeed("systemctl show -P Result ai-mux.service").strip() == "success"
  '';
}
