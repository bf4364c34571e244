//! The log says what happened, a line for each request and refresh, and at no level a secret. That it holds none is
//! asserted at the end of every run; here are the runs that tempt it most.

mod common;
use common::*;
use std::thread;
use std::time::{Duration, Instant};

const COOKIE: &str = "nB7vLq2XsT9z";
const HEADER: &str = "Hy4RkW8mCe6d";
const BODY: &str = "Gf3PxJ5uZa1o";
const ACCOUNT: &str = "Qa7NtVw5Bi3k";
const BOB: &str = "Lr6ZcX1dWq8FhJ4uGe0S";

fn tempted(up: &Upstream, level: &str) -> Setup {
    for secret in [
        COOKIE,
        HEADER,
        BODY,
        ACCOUNT,
        "Wrong5Token7Here9Now",
        "Query8Secret2Value",
    ] {
        up.secret(secret);
    }
    Setup::new(up)
        .set("log_level", level)
        .provider(0, "headers", json!({"x-team": HEADER}))
        .provider(1, "headers", json!({"x-team": HEADER}))
        .env("RUST_LOG", "trace")
}

#[test]
fn at_any_level_whatever_happens() {
    for level in ["debug", "info", "warn", "error"] {
        let up = Upstream::start(|req, conn| match req.head.get("x-way") {
            Some("cut") => conn.cut(),
            Some("broken") => {
                conn.stream(&[("set-cookie", COOKIE)])?;
                conn.chunk(BODY)?;
                conn.cut()
            }
            Some("401") => conn.respond(401, &[("set-cookie", COOKIE)], BODY.as_bytes()),
            Some("500") => conn.respond(500, &[("request-id", "req_7")], BODY.as_bytes()),
            _ => {
                let headers = [("set-cookie", COOKIE), ("chatgpt-account-id", ACCOUNT)];
                conn.respond(200, &headers, BODY.as_bytes())
            }
        });
        let (claude, chatgpt) = (up.login("claude", -10), up.login("chatgpt", -10));
        let setup = tempted(&up, level).save("claude", &claude.claude());
        let mux = setup.save("chatgpt", &chatgpt.codex()).start_unheard();
        for target in [
            MESSAGES,
            RESPONSES,
            "/claude/v1/messages?key=Query8Secret2Value",
        ] {
            for way in ["fine", "cut", "broken", "401", "500"] {
                let headers = [
                    BEARER,
                    ("x-api-key", TOKEN),
                    ("cookie", COOKIE),
                    ("chatgpt-account-id", ACCOUNT), // as Codex does
                    ("anthropic-version", "2023-06-01"),
                    ("x-way", way),
                ];
                let mut client = mux.client();
                client.request("POST", target, &headers, BODY.as_bytes());
                client.head();
                let _ = client.body();
            }
        }
        for headers in [
            &[("authorization", "Bearer Wrong5Token7Here9Now")][..],
            &[("x-api-key", "Wrong5Token7Here9Now")],
            &[
                ("authorization", "Basic Wrong5Token7Here9Now"),
                ("cookie", COOKIE),
            ],
            &[BEARER, ("x-api-key", "Wrong5Token7Here9Now")],
            &[BEARER, ("authorization\t", "Bearer Wrong5Token7Here9Now")],
        ] {
            let answer = mux
                .client()
                .request("POST", MESSAGES, headers, BODY.as_bytes())
                .answer();
            assert!(answer.status == 401 || answer.status == 400);
        }
        if level == "debug" {
            mux.wait_log_times("status=", 20);
            assert!(mux.log().contains("x-way"), "debug adds headers");
            let plain = "anthropic-version: \"2023-06-01\"";
            assert!(mux.log().contains(plain), "and what is harmless of them");
            let answers = mux.log_lines(" answer: ");
            assert!(answers.iter().any(|line| line.contains("set-cookie: (")));
            assert!(!mux.log().contains("[ureq"), "the crates say little");
        }
        if level == "warn" || level == "error" {
            assert!(!mux.log().contains("status=200"), "{}", mux.log());
        }
    }
}

#[test]
fn a_level_leaves_out_what_is_less_grave() {
    for (level, warnings) in [("info", 1), ("warn", 1), ("error", 0)] {
        let up = Upstream::plain();
        let setup = Setup::new(&up).set("log_level", level);
        let path = login::path(&setup.state(), "claude");
        let loose = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(path, loose).expect("chmod");
        let mut mux = setup.start_unheard();
        assert_eq!(mux.message().status, 200);
        assert_eq!(mux.stop(), 0);
        assert_eq!(mux.log_lines("WARN").len(), warnings, "{level}");
        assert_eq!(mux.log_lines("INFO").is_empty(), level != "info", "{level}");
    }
}

/// Neither is too early; `one_line_for_each_request` sees that neither is too late.
#[test]
fn the_line_tells_when_the_first_byte_came_and_when_the_last() {
    let pause = || thread::sleep(Duration::from_millis(300));
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        pause();
        conn.stream(&[])?;
        conn.chunk("one")?;
        held.wait(1);
        conn.finish()
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}").head();
    assert_eq!(client.text(), "one");
    pause();
    go.advance();
    client.body().expect("a whole body");
    mux.wait_log("total=");
    let line = mux.log_lines("total=").remove(0);
    let time = |name: &str| {
        let text = line
            .split(name)
            .nth(1)
            .and_then(|rest| rest.split("ms").next());
        text.and_then(|text| text.parse::<u64>().ok())
            .expect("milliseconds")
    };
    let first = time(" first=");
    assert!(first >= 300 && time(" total=") >= first + 300, "{line}");
}

/// As other relays have it. The path is in the log.
#[test]
fn a_token_in_the_path() {
    let up = Upstream::plain();
    let mux = tempted(&up, "debug").start();
    for target in [
        format!("/{TOKEN}/v1/messages"),
        format!("/claude/v1/{TOKEN}"),
    ] {
        for (status, headers) in [(401, &[][..]), (404, &[BEARER])] {
            let mut client = mux.client();
            let answer = client.request("POST", &target, headers, b"{}").answer();
            assert_eq!(answer.status, status, "{target}");
        }
    }
    mux.wait_log_times("path=(a token)", 4);
    // Whosever it is, and at the end of what is shown of a path.
    up.secret(BOB);
    let users = json!([{"name": "alice", "token": TOKEN}, {"name": "bob", "token": BOB}]);
    let both = Setup::new(&up).set("users", users).start();
    let far = "a".repeat(200 - "/claude/v1/".len() - TOKEN.len());
    for target in [
        format!("/{BOB}/v1/messages"),
        format!("/claude/v1/{far}{TOKEN}"),
    ] {
        assert_eq!(both.ask("POST", &target, &[], b"{}").status, 404);
    }
    both.wait_log_times("path=(a token)", 2);
    assert_eq!(up.requests().len(), 0);
    // At debug, values are in the log, too.
    let agent = format!("{} {TOKEN}", "x".repeat(250));
    for headers in [("user-agent", TOKEN), ("user-agent", agent.as_str())] {
        assert_eq!(mux.ask("POST", MESSAGES, &[headers], b"{}").status, 200);
    }
    mux.wait_log_times("user-agent: (", 2);
    assert_eq!(
        mux.ask("POST", MESSAGES, &[(TOKEN, "x")], b"{}").status,
        200
    );
    mux.wait_log_times("status=200", 3);
    let name = TOKEN.to_ascii_lowercase();
    assert!(!mux.log().contains(&name), "nor is the name of a header");
}

/// Some proxies send the client's request id back.
#[test]
fn a_token_that_comes_back_as_a_request_id() {
    let up = Upstream::start(|req, conn| {
        let id = req.head.get("x-request-id").unwrap_or_default();
        conn.respond(429, &[("x-request-id", id)], b"slow down")
    });
    let mux = tempted(&up, "debug").start();
    let ask = |id: &str| mux.ask("POST", MESSAGES, &[("x-request-id", id)], b"{}");
    assert_eq!(ask(TOKEN).header("x-request-id"), Some(TOKEN));
    assert_eq!(ask(&format!("id-{TOKEN}-1")).status, 429);
    assert_eq!(ask("req_7").status, 429);
    mux.wait_log_times("status=429", 3);
    assert!(mux.log().contains("request-id=req_7"));
}

#[test]
fn when_a_token_endpoint_says_too_much() {
    for (status, body) in [
        (200, json!({"access_token": 5, "note": BODY})),
        (200, json!({"access_token": "", "note": BODY})),
        (200, json!(BODY)),
        (
            400,
            json!({"error": "invalid_request", "error_description": BODY}),
        ),
        (400, json!({"error": {"message": BODY, "type": BODY}})),
        (500, json!({"message": BODY})),
        (302, json!(BODY)),
    ] {
        let up = Upstream::plain();
        let shown = body.clone();
        up.on_refresh(move |_, conn| {
            let headers = [
                ("set-cookie", COOKIE),
                ("location", "https://example.org/Query8Secret2Value"),
            ];
            conn.respond(status, &headers, shown.to_string().as_bytes())
                .map(|()| true)
        });
        let setup = tempted(&up, "debug").save("claude", &up.login("claude", -10).claude());
        let mux = setup.start();
        assert_eq!(mux.message().status, 503, "{status} {body}");
        mux.wait_log("claude: refresh");
        let said = mux.log_lines("claude: refresh").join("\n");
        if body["error"] == "invalid_request" {
            assert!(
                said.contains("invalid_request"),
                "its error word is told: {said}"
            );
        }
        assert_eq!(up.refreshes().len(), 1, "{status} {body}");
    }
}

/// A credential file of nonsense is no reason to quote it.
#[test]
fn when_a_file_is_malformed() {
    for text in [
        BODY.to_owned(),
        format!("\"{BODY}\""),
        format!("{{\"claudeAiOauth\":{{\"accessToken\":[\"{BODY}\"]}}}}"),
    ] {
        let up = Upstream::plain();
        let setup = tempted(&up, "debug");
        std::fs::write(login::path(&setup.state(), "claude"), &text).expect("write a file");
        let answer = setup.start().message();
        assert_eq!(answer.status, 503);
        assert!(!answer.text().contains(BODY), "{}", answer.text());
    }
}

#[test]
fn one_line_for_each_request() {
    let up = Upstream::start(|req, conn| match req.head.get("x-way") {
        Some("limited") => conn.respond(429, &[("request-id", "req_011ABC")], b"slow down"),
        Some("codex") => conn.respond(400, &[("x-request-id", "0f-1e")], b"oh"),
        Some("cut") => {
            conn.stream(&[])?;
            conn.chunk("12345")?;
            conn.cut()
        }
        _ => conn.respond(200, &[("request-id", "req_fine")], b"seven b"),
    });
    let mux = Mux::start(&up);
    let mut lines = 0;
    let mut line = |target: &str, headers: &[(&str, &str)]| {
        let mut client = mux.client();
        thread::sleep(Duration::from_millis(20)); // which no line counts: nothing is asked yet
        let asked = Instant::now();
        client.request("POST", target, headers, b"{}").head();
        let body = client.body();
        lines += 1;
        mux.wait_log_times("status=", lines);
        let time = asked.elapsed().as_millis();
        let line = mux.log_lines("status=").pop().expect("a line");
        let local = client.wire.socket().local_addr().expect("an address");
        assert!(line.contains(&format!(" peer={local} ")), "{line}");
        let told = |name| {
            let text = line.split(name).nth(1).and_then(|s| s.split("ms").next());
            text.and_then(|text| text.parse().ok()).unwrap_or(u128::MAX)
        };
        let (first, total) = (told(" first="), told(" total="));
        assert!(first <= total && total <= time, "{line} within {time}ms");
        if let Ok(body) = body {
            assert!(line.contains(&format!(" bytes={} ", body.len())), "{line}");
        }
        line
    };
    let has = |line: &str, words: &[&str]| {
        for word in words {
            assert!(
                format!("{line} ").contains(&format!(" {word} ")),
                "{word} is not in {line}"
            );
        }
    };
    let fine = line("/claude/v1/messages?beta=true&x=y", &[BEARER]);
    let common = [
        "user=alice",
        "provider=claude",
        "method=POST",
        "path=/claude/v1/messages",
    ];
    has(&fine, &common);
    has(&fine, &["status=200", "bytes=7"]);
    assert!(
        !fine.contains("beta") && !fine.contains("req_fine") && !fine.contains("ended="),
        "{fine}"
    );

    let limited = line(MESSAGES, &[BEARER, ("x-way", "limited")]);
    has(
        &limited,
        &["status=429", "bytes=9", "request-id=req_011ABC"],
    );
    let codex = line(RESPONSES, &[BEARER, ("x-way", "codex")]);
    has(
        &codex,
        &["provider=chatgpt", "status=400", "request-id=0f-1e"],
    );
    let cut = line(MESSAGES, &[BEARER, ("x-way", "cut")]);
    has(&cut, &["status=200", "bytes=5"]);
    assert!(cut.contains(" ended=\"upstream broke off: "), "{cut}");
    let refused = line(MESSAGES, &[]);
    has(&refused, &["user=-", "status=401"]);
    assert!(refused.contains(" ended=\"wrong or no token"), "{refused}");
    let nowhere = line("/nowhere", &[BEARER]);
    has(
        &nowhere,
        &["user=alice", "provider=-", "path=/nowhere", "status=404"],
    );
    assert!(nowhere.contains(" ended=\"no such path"), "{nowhere}");

    // One that goes away while it sends its body, and leaves unread what it was told.
    let mut client = mux.client();
    let headers = [("content-length", "100"), ("expect", "100-continue")];
    client.start("POST", MESSAGES, &[&[BEARER], &headers[..]].concat());
    let told = client.wire.socket().peek(&mut [0]);
    assert_eq!(told.expect("100 Continue"), 1);
    drop(client);
    mux.wait_log("status=0 ");
    let away = mux.log_lines("status=0 ").pop().expect("a line");
    has(&away, &["user=alice", "provider=claude", "bytes=0"]);
    assert!(away.contains(" ended=\"the client went away"), "{away}");
    for more in [" request: ", " answer: "] {
        assert!(mux.log_lines(more).is_empty(), "{}", mux.log());
    }
}

#[test]
fn a_clients_text_cannot_break_a_line() {
    let up = Upstream::start(|_, conn| {
        let id = &format!("a\" status=1 b\tc{}", "d".repeat(3000));
        conn.respond(
            500,
            &[("request-id", id), ("x-name", "caf\u{e9} \u{202e}")],
            b"",
        )
    });
    let mux = Setup::new(&up).set("log_level", "debug").start();
    let long = format!("/claude/v1/{}", "a".repeat(3000));
    mux.ask(
        "POST",
        &long,
        &[("user-agent", "x\ty \" peer=1.2.3.4:5 user=root")],
        b"{}",
    );
    for raw in [
        "GET /claude/v1/a\x1b[31m HTTP/1.1",
        "GET /\u{202e}x HTTP/1.1",
        "G\"ET user=root / HTTP/1.1",
        "GET /x\" HTTP/1.1",
    ] {
        let mut client = mux.client();
        client
            .send(format!("{raw}\r\nhost: x\r\nx-api-key: {TOKEN}\r\n\r\n"))
            .rest();
    }
    mux.wait_log("path=/claude/v1/aaa");
    mux.wait_log_times(" status=400 ", 4);
    for line in mux.log().lines() {
        assert!(
            !line.contains('\x1b') && !line.contains('\u{202e}'),
            "{line:?}"
        );
        assert!(line.matches(" status=").count() <= 1, "{line:?}");
        assert!(!line.contains("y \" peer="), "{line:?}");
        assert!(
            ["ERROR", "WARN", "INFO", "DEBUG"]
                .iter()
                .any(|level| line.starts_with(level)),
            "{line:?}"
        );
    }
    let line = mux.log_lines("path=/claude/v1/aaa").pop().expect("a line");
    let path = line
        .split(" path=")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    assert!(path.is_some_and(|path| path.len() == 200), "{line}");
    assert!(line.len() < 1000, "{line}");
}

/// A token endpoint says what it likes; only its error word is repeated.
#[test]
fn what_else_a_token_endpoint_says() {
    let up = Upstream::plain();
    let answer =
        |said: Value| move |_: &Request, conn: &mut Conn| conn.json(500, &said).map(|()| true);
    let error = json!({"message": "told_message", "code": "told_error"});
    up.on_refresh(answer(json!({"code": "told_code", "error": error})));
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let mux = setup.start();
    mux.wait_log("answered 500 told_error");
    up.on_refresh(answer(json!({"type": "told_type", "said": "told_message"})));
    login::save(&mux.state(), "claude", &up.login("claude", -20).claude());
    mux.message();
    mux.wait_log_times("answered 500", 2);
    for word in ["told_code", "told_type", "told_message"] {
        assert_eq!(mux.log_lines(word), [""; 0]);
    }
}

#[test]
fn one_line_for_each_refresh() {
    let up = Upstream::plain();
    let (claude, chatgpt) = (up.login("claude", -10), up.login("chatgpt", -10));
    let setup = Setup::bare(&up).save("claude", &claude.claude());
    let mux = setup.save("chatgpt", &chatgpt.flat()).start();
    assert_eq!(mux.message().status, 200);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    for provider in ["claude", "chatgpt"] {
        mux.wait_log(&format!("{provider}: refreshed"));
        assert_eq!(mux.log_lines(&format!("{provider}: refreshed")).len(), 1);
    }
    assert!(
        mux.log_lines("ERROR").is_empty() && mux.log_lines("WARN").is_empty(),
        "{}",
        mux.log()
    );
}

#[test]
fn under_systemd_the_journal_tells_the_time() {
    let up = Upstream::plain();
    let listening = |setup: Setup| setup.start().log_lines("listening on").remove(0);
    let journal = "JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr) exec \"$@\"";
    let line = listening(Setup::new(&up).shell(journal));
    assert!(line.starts_with("INFO  [ai_mux] listening on"), "{line}");
    // A desktop's terminal inherits the variable, and is no journal (systemd.exec(5)).
    for inherited in ["", "9:1234"] {
        let line = listening(Setup::new(&up).env("JOURNAL_STREAM", inherited));
        assert!(line.starts_with("INFO  [ai_mux] 20"), "{line}"); // the year
    }
    let line = listening(Setup::new(&up));
    assert!(line.starts_with("INFO  [ai_mux] 20"), "{line}");
}
