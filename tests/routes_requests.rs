//! Each path goes to its own provider, and nowhere else.

mod common;
use common::*;

/// Answers with the method and target that it saw.
fn echo() -> Upstream {
    Upstream::start(|req, conn| match req.head.word(0) {
        "HEAD" => conn.head(
            200,
            &[("content-length", "9"), ("x-target", req.head.word(1))],
        ),
        _ => conn.respond(200, &[], req.head.start.as_bytes()),
    })
}

#[test]
fn both_providers_are_mapped_and_the_query_is_kept_as_it_is() {
    let up = echo();
    let mux = Mux::start(&up);
    for (target, seen) in [
        (
            "/claude/v1/messages?beta=true",
            "/anthropic/v1/messages?beta=true",
        ),
        (
            "/claude/v1/messages/count_tokens",
            "/anthropic/v1/messages/count_tokens",
        ),
        (
            "/claude/v1/models?limit=1000&x=%2F..%2f?a/../b",
            "/anthropic/v1/models?limit=1000&x=%2F..%2f?a/../b",
        ),
        (
            "/claude/v1/a-b.c_d~e:f@g/...",
            "/anthropic/v1/a-b.c_d~e:f@g/...",
        ),
        (
            "/claude/v1/not-oauth/oauth",
            "/anthropic/v1/not-oauth/oauth",
        ),
        // The first /v1/ is the route's, whatever comes behind it.
        ("/claude/v1/files/v1/x", "/anthropic/v1/files/v1/x"),
        (
            "/claude/v1/models?next=/v1/oauth/authorize",
            "/anthropic/v1/models?next=/v1/oauth/authorize",
        ),
        ("/chatgpt/v1/responses", "/backend-api/codex/responses"),
        (
            "/chatgpt/v1/responses/compact?",
            "/backend-api/codex/responses/compact?",
        ),
        (
            "/chatgpt/v1/models?client_version=1.2",
            "/backend-api/codex/models?client_version=1.2",
        ),
    ] {
        let answer = mux.ask("GET", target, &[], b"");
        assert_eq!(
            (answer.status, answer.text()),
            (200, format!("GET {seen} HTTP/1.1").as_str())
        );
    }
}

#[test]
fn a_slash_at_the_end_of_base_url_is_not_doubled() {
    let up = echo();
    let url = format!("{}/anthropic/", up.url());
    let mux = Setup::new(&up).provider(0, "base_url", url).start();
    let answer = mux.message();
    assert_eq!(answer.text(), "POST /anthropic/v1/messages HTTP/1.1");
}

#[test]
fn every_method_is_passed_on() {
    let up = echo();
    let mux = Mux::start(&up);
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"] {
        for body in ["", "some"] {
            let answer = mux.ask(method, MESSAGES, &[], body.as_bytes());
            assert_eq!(
                answer.text(),
                format!("{method} /anthropic/v1/messages HTTP/1.1")
            );
            let request = up.requests().pop().expect("a request");
            assert_eq!(request.body, body.as_bytes(), "{method}");
            // A method that means to send something tells that it is nothing (RFC 9110 section 8.6).
            let sends = ["POST", "PUT", "PATCH"].contains(&method) || !body.is_empty();
            let length = sends.then(|| body.len().to_string());
            assert_eq!(
                request.head.get("content-length"),
                length.as_deref(),
                "{method}"
            );
        }
    }
    let answer = mux.ask("HEAD", MESSAGES, &[], b"");
    assert_eq!(answer.header("x-target"), Some("/anthropic/v1/messages"));
    assert_eq!(answer.header("content-length"), Some("9"));
}

#[test]
fn what_has_no_route_is_404_and_never_reaches_the_upstream() {
    let up = echo();
    let mux = Mux::start(&up);
    for target in [
        "/",
        "/nowhere",
        "/claude",
        "/claude/",
        "/claude/v1",
        "/claude/v1/",
        "/claude/v1?x=1",
        "/claude/v2/messages",
        "/claude/messages",
        "/Claude/v1/messages",
        "/chatgpt/responses",
        "/healthz/more",
        "/v1/messages",
        "//claude/v1/messages",
        "/claude//v1/messages",
        "/claude/v1//messages",
        "/claude/v1/messages/",
        "/claude/v1/./messages",
        "/claude/v1/../v1/messages",
        "/claude/v1/a/../../../etc/passwd",
        "/claude/v1/%6dessages",
        "/claude/v1/%2e%2e/messages",
        "/claude/v1/messages%00",
        "/claude/v1/a;b",
        "/claude/v1/a\\b",
        "/claude/v1/a+b",
        "/claude/v1/oauth/token",
        "/claude/v1/oauth/authorize?x",
        "/chatgpt/v1/oauth/token",
        "/claude/v1/OAuth/token",
    ] {
        let answer = mux.ask("GET", target, &[], b"");
        assert_eq!(answer.status, 404, "{target}");
        assert_eq!(answer.header("x-should-retry"), Some("false"), "{target}");
        assert!(!answer.error().is_empty());
    }
    // Whatever else is no letter or digit, and no part of a path's grammar.
    for other in ('!'..='~').filter(|c| !c.is_ascii_alphanumeric() && !"-._~:@/?".contains(*c)) {
        let answer = mux.ask("GET", &format!("/claude/v1/a{other}b"), &[], b"");
        let status = if "\"#<>".contains(other) { 400 } else { 404 };
        assert_eq!(answer.status, status, "{other}");
    }
    assert_eq!(up.requests().len(), 0);
}

#[test]
fn a_target_that_is_no_path_is_400() {
    let up = echo();
    let mux = Mux::start(&up);
    for target in [
        "http://ai-mux/claude/v1/messages",
        "https://api.anthropic.com/v1/messages",
        "*",
        "claude/v1/messages",
    ] {
        let answer = mux.ask("GET", target, &[], b"");
        assert_eq!(answer.status, 400, "{target}");
        answer.error();
    }
    assert_eq!(up.requests().len(), 0);
}

#[test]
fn a_provider_that_is_not_configured_has_no_route() {
    let up = echo();
    let setup = Setup::new(&up);
    let only = up.provider("claude");
    let mux = setup.set("providers", json!([only])).start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 404);
}

#[test]
fn health_needs_no_token() {
    let up = echo();
    let mux = Mux::start(&up);
    for (method, target) in [
        ("GET", "/healthz"),
        ("HEAD", "/healthz"),
        ("HEAD", "/"),
        ("HEAD", "/claude"),
        ("HEAD", "/chatgpt"),
        ("HEAD", "/claude/api/hello"),
        ("GET", "/healthz?x=1"),
        ("HEAD", "/?x"),
    ] {
        let mut client = mux.client();
        let answer = client.request(method, target, &[], b"").answer();
        assert_eq!(answer.status, 200, "{method} {target}");
        assert_eq!(
            answer.body.is_empty(),
            method == "HEAD",
            "{method} {target}"
        );
        // A body that HEAD must not have would be read as the beginning of the next head.
        let next = client.request("GET", "/healthz", &[], b"").answer();
        assert_eq!(
            next.head.start, "HTTP/1.1 200 OK",
            "after {method} {target}"
        );
        let ready = json!({"claude": "ready", "chatgpt": "ready"});
        assert_eq!(next.json(), json!({"status": "ok", "providers": ready}));
        let date = next
            .header("date")
            .and_then(|text| httpdate::parse_http_date(text).ok());
        let age = date.and_then(|date| date.elapsed().ok());
        assert!(age.is_some_and(|age| age < PATIENCE), "not today: {date:?}");
    }
    mux.wait_log_times("status=200", 16);
    assert!(mux.log_lines("ended=").is_empty(), "nothing went wrong");
    for (method, target) in [
        ("GET", "/"),
        ("GET", "/claude"),
        ("POST", "/healthz"),
        ("HEAD", "/claude/v1/messages"),
        ("GET", "/claude/api/hello"),
        ("HEAD", "/chatgpt/api/hello"),
    ] {
        let mut client = mux.client();
        let answer = client.request(method, target, &[], b"").answer();
        assert_eq!(answer.status, 401, "{method} {target}");
        assert!(client.closed(), "more than an answer to {method} {target}");
    }
    assert_eq!(up.requests().len(), 0);
}

#[test]
fn health_says_which_providers_are_ready_and_nothing_secret() {
    let up = echo();
    let (claude, chatgpt) = (up.login("claude", 3600), up.login("chatgpt", 3600));
    let mux = Setup::bare(&up).save("claude", &claude.claude()).start();
    let health = || mux.client().request("GET", "/healthz", &[], b"").answer();
    let before = health();
    assert_eq!(before.status, 200);
    let expected = json!({"claude": "ready", "chatgpt": "unavailable"});
    assert_eq!(before.json()["providers"], expected);
    login::save(&mux.state(), "chatgpt", &chatgpt.codex());
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    let after = health();
    let expected = json!({"claude": "ready", "chatgpt": "ready"});
    assert_eq!(after.json()["providers"], expected);
    for login in [claude, chatgpt] {
        for secret in [&login.access, &login.refresh, &login.account] {
            assert!(!after.text().contains(&secret[..9]), "{}", after.text());
        }
    }
}

#[test]
fn health_needs_no_worker() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.respond(200, &[], b"late")
    });
    let mux = Setup::new(&up).set("workers", 1).start();
    let mut busy = mux.client();
    busy.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, |_| true);
    for (method, target) in [("GET", "/healthz"), ("HEAD", "/"), ("HEAD", "/claude")] {
        assert_eq!(
            mux.client()
                .request(method, target, &[], b"")
                .answer()
                .status,
            200
        );
    }
    go.advance();
    assert_eq!(busy.answer().text(), "late");
}

/// Malformed, health, token, path, upgrade, size, credential.
#[test]
fn the_first_thing_that_is_wrong_is_the_one_that_is_told() {
    let up = echo();
    let mux = Setup::bare(&up).start();
    let twice = [
        ("x-a", "1"),
        ("content-length", "1"),
        ("content-length", "2"),
    ];
    let huge = [BEARER, ("content-length", "99999999999")];
    let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
    let body = [BEARER, ("content-length", "5"), ("expect", "100-continue")];
    for (status, method, target, headers) in [
        (400, "GET", "/healthz", twice.to_vec()),
        (400, "POST", MESSAGES, twice.to_vec()),
        (401, "POST", "/nowhere", vec![]),
        (401, "GET", MESSAGES, upgrade.to_vec()),
        (401, "POST", MESSAGES, huge[1..].to_vec()),
        (404, "POST", "/nowhere", huge.to_vec()),
        (404, "GET", "/nowhere", [&huge[..], &upgrade].concat()),
        (426, "GET", MESSAGES, [&huge[..], &upgrade].concat()),
        (413, "POST", MESSAGES, huge.to_vec()),
        (503, "POST", MESSAGES, body.to_vec()), // and not 100 Continue
    ] {
        let answer = mux.client().start(method, target, &headers).answer();
        assert_eq!(answer.status, status, "{method} {target} {headers:?}");
        answer.error();
    }
}
