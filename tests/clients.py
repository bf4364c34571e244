#!/usr/bin/env python3
"""The vendors' own SDKs through the running ai-mux: python3 tests/clients.py target/release/ai-mux

Makes a virtual environment in a temporary folder, installs `anthropic` and `openai` there, starts a stand-in
for both vendors and the given binary in front of it, and asserts what the SDKs see. Exits with 0 or 1.
"""

import base64
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv

TOKEN = "alice-has-this-token-of-her-own"
ACCESS = {"claude": "access-token-of-claude", "chatgpt": "set in main"}
ACCOUNT = "account-of-the-owner"
WORDS = ["Hello", " from", " the", " stand-in"]


# --- the stand-in for both vendors -----------------------------------------------------------------------------


class Vendor(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["content-length"])))

    def answer(self, body):
        self.server.seen.append((self.path, dict(self.headers.items())))
        provider = "claude" if self.path.startswith("/anthropic") else "chatgpt"
        if self.headers["authorization"] != f"Bearer {ACCESS[provider]}":
            error = {"type": "authentication_error", "message": "the stand-in knows no such token"}
            return self.json(401, {"type": "error", "error": error})
        path = self.path.split("?")[0]
        asked = json.loads(body) if body else {}
        if path == "/anthropic/v1/models":
            model = {"id": "stand-in", "type": "model", "display_name": "Stand-in", "created_at": "2026-01-01T00:00:00Z"}
            return self.json(200, {"data": [model], "has_more": False, "first_id": "stand-in", "last_id": "stand-in"})
        if path == "/codex/models":
            return self.json(200, {"object": "list", "data": [{"id": "stand-in", "object": "model", "created": 1, "owned_by": "x"}]})
        if path == "/anthropic/v1/messages/count_tokens":
            return self.json(200, {"input_tokens": 42})
        if path == "/anthropic/v1/messages" and not asked.get("stream"):
            return self.json(200, message([{"type": "text", "text": "".join(WORDS)}]))
        if path == "/anthropic/v1/messages":
            return self.stream("text/event-stream", claude_events())
        if path == "/codex/responses" and asked["stream"] and not asked["store"]:
            # Codex's streams come without a Content-Type.
            return self.stream(None, chatgpt_events())
        self.json(404, {"type": "error", "error": {"type": "not_found_error", "message": path}})

    def json(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("request-id", "req_of_the_stand_in")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, content_type, events):
        self.send_response(200)
        if content_type:
            self.send_header("content-type", content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            self.wfile.flush()
            if "delta" in event["type"]:
                assert self.server.shown.acquire(timeout=20), "the client has not shown this one"
        self.wfile.write(b"0\r\n\r\n")


def message(content):
    usage = {"input_tokens": 3, "output_tokens": len(WORDS)}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in", "content": content,
            "stop_reason": "end_turn", "stop_sequence": None, "usage": usage}


def claude_events():
    yield {"type": "message_start", "message": message([])}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for word in WORDS:
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_stop"}


def chatgpt_events():
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "stand-in", "output": [], "error": None,
                "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": False,
                "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0, "status": "in_progress"}
    yield {"type": "response.created", "sequence_number": 0, "response": response}
    for number, word in enumerate(WORDS, 1):
        yield {"type": "response.output_text.delta", "sequence_number": number, "item_id": "item_1",
               "output_index": 0, "content_index": 0, "delta": word, "logprobs": []}
    usage = {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": len(WORDS),
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 3 + len(WORDS)}
    done = dict(response, status="completed", usage=usage)
    yield {"type": "response.completed", "sequence_number": len(WORDS) + 1, "response": done}


# --- what the SDKs see -----------------------------------------------------------------------------------------


def claude(host, shown):
    import anthropic

    ways = {"Bearer": {"auth_token": TOKEN}, "x-api-key": {"api_key": TOKEN}}
    for way, key in ways.items():
        client = anthropic.Anthropic(base_url=f"{host}/claude", **key)
        ask = {"model": "stand-in", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
        words = []
        with client.messages.stream(**ask) as stream:
            for word in stream.text_stream:
                words.append(word)
                shown.release()
        assert words == WORDS, words
        whole = client.messages.create(**ask)
        assert whole.content[0].text == "".join(WORDS) and whole._request_id == "req_of_the_stand_in"
        ask.pop("max_tokens")
        assert client.messages.count_tokens(**ask).input_tokens == 42
        assert [model.id for model in client.models.list()] == ["stand-in"]
        print(f"anthropic, {way}: streamed word by word, counted tokens, listed models")

    for key in [{"auth_token": "a-token-that-nobody-has"}, {"api_key": "a-token-that-nobody-has"}]:
        client = anthropic.Anthropic(base_url=f"{host}/claude", **key)
        refused(anthropic.AuthenticationError, lambda: client.messages.create(max_tokens=1, **ask))
    print("anthropic: a wrong token is its own AuthenticationError")


def chatgpt(host, shown):
    import openai

    ask = {"model": "stand-in", "input": "hello", "instructions": "be brief", "store": False, "stream": True}
    bearer = {}
    api_key = {"Authorization": openai.Omit(), "x-api-key": TOKEN}
    for way, extra in {"Bearer": bearer, "x-api-key": api_key}.items():
        client = openai.OpenAI(base_url=f"{host}/chatgpt/v1", api_key=TOKEN)
        words, last = [], None
        for event in client.responses.create(**ask, extra_headers=extra):
            last = event
            if event.type == "response.output_text.delta":
                words.append(event.delta)
                shown.release()
        assert words == WORDS, words
        assert last.type == "response.completed" and last.response.usage.output_tokens == len(WORDS)
        assert [model.id for model in client.models.list(extra_headers=extra)] == ["stand-in"]
        print(f"openai, {way}: streamed word by word, listed models")

    client = openai.OpenAI(base_url=f"{host}/chatgpt/v1", api_key="a-token-that-nobody-has")
    refused(openai.AuthenticationError, lambda: client.responses.create(**ask))
    print("openai: a wrong token is its own AuthenticationError")


def refused(error, ask):
    try:
        ask()
    except error as e:
        assert e.status_code == 401 and "token" in str(e), e
    else:
        raise AssertionError("a wrong token was admitted")


# --- putting it together ---------------------------------------------------------------------------------------


def write_logins(state):
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    soon = int(time.time()) + 3600
    ACCESS["chatgpt"] = f'{part({"alg": "none"})}.{part({"exp": soon})}.signature'
    oauth = {"accessToken": ACCESS["claude"], "refreshToken": "unused", "expiresAt": soon * 1000, "scopes": ["user:inference"]}
    tokens = {"id_token": ACCESS["chatgpt"], "access_token": ACCESS["chatgpt"], "refresh_token": "unused", "account_id": ACCOUNT}
    for name, value in [("claude/.credentials.json", {"claudeAiOauth": oauth}), ("chatgpt/auth.json", {"tokens": tokens})]:
        path = state / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))
        path.chmod(0o600)


def check_upstream(seen):
    """What the vendors saw: the owner's credential, and nothing of the client's token."""
    assert len(seen) == 2 * 4 + 2 * 2, [path for path, _ in seen]
    for path, headers in seen:
        assert TOKEN not in str(headers), headers
        lower = {name.lower(): value for name, value in headers.items()}
        assert "x-api-key" not in lower, headers
        if path.startswith("/anthropic"):
            assert "oauth-2025-04-20" in lower["anthropic-beta"].split(","), headers
        else:
            assert lower["chatgpt-account-id"] == ACCOUNT, headers


def run(binary, folder):
    vendor = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vendor)
    vendor.daemon_threads = True
    vendor.seen, vendor.shown = [], threading.Semaphore(0)
    threading.Thread(target=vendor.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{vendor.server_port}"
    write_logins(folder / "state")
    bases = {"claude": "/anthropic", "chatgpt": "/codex"}
    config = {
        "listen": "127.0.0.1:0",
        "state_dir": str(folder / "state"),
        "providers": [{"name": name, "base_url": url + base, "token_url": url + "/token"} for name, base in bases.items()],
        "users": [{"name": "alice", "token": TOKEN}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [binary, "--config", str(folder / "config.json")]
    mux = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"HOME": str(folder)})
    log = []
    try:
        while not (host := re.search(r"http://127\.0\.0\.1:\d+", "".join(log[-1:]))):
            line = mux.stderr.readline()
            assert line, f"it did not start: {''.join(log)}"
            log.append(line)
        rest = threading.Thread(target=lambda: log.extend(mux.stderr))
        rest.start()
        claude(host[0], vendor.shown)
        chatgpt(host[0], vendor.shown)
        mux.terminate()
        assert mux.wait(20) == 0, mux.returncode
        rest.join()
        check_upstream(vendor.seen)
        assert "".join(log).count("status=401") == 3, "an SDK tried a wrong token again and again"
        assert TOKEN not in "".join(log) and ACCOUNT not in "".join(log), "a secret is in the log"
    except BaseException:
        mux.kill()
        print("--- log\n" + "".join(log), file=sys.stderr)
        raise


def main():
    if len(sys.argv) != 2 or not os.access(sys.argv[1], os.X_OK):
        sys.exit(f"usage: {sys.argv[0]} PATH-OF-AI-MUX")
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory(prefix="ai-mux-clients-") as name:
        folder = pathlib.Path(name)
        if "AI_MUX_CLIENTS_VENV" not in os.environ:
            # This same program again, with the interpreter that has the SDKs.
            venv.create(folder / "venv", with_pip=True)
            python = str(folder / "venv/bin/python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", "anthropic", "openai"], check=True)
            again = [python, __file__, binary]
            sys.exit(subprocess.run(again, env=dict(os.environ, AI_MUX_CLIENTS_VENV="1")).returncode)
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]:
            os.environ.pop(variable, None), os.environ.pop(variable.lower(), None)
        for variable in [name for name in os.environ if name.startswith(("ANTHROPIC_", "OPENAI_"))]:
            os.environ.pop(variable)
        run(binary, folder)
        print("both SDKs work through ai-mux")


if __name__ == "__main__":
    main()
