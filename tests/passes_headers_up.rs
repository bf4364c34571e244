//! What the upstream sees of a client's headers: all of them but the client's secrets and the hop's own.

mod common;
use common::*;

/// The headers that the upstream saw, without `host` and the framing.
fn seen(up: &Upstream) -> Vec<(String, String)> {
    let request = up.requests().pop().expect("a request");
    let own = ["host", "content-length", "transfer-encoding"];
    let headers = request.head.headers.into_iter();
    let mut rest: Vec<_> = headers
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .filter(|(name, _)| !own.contains(&name.as_str()))
        .collect();
    rest.sort_by(|a, b| a.0.cmp(&b.0));
    rest
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter()
        .map(|(n, v)| (n.to_string(), v.to_string()))
        .collect()
}

fn access(mux: &Mux, provider: &str) -> String {
    let file = login::read(&mux.state(), provider);
    let token = match provider {
        "claude" => &file["claudeAiOauth"]["accessToken"],
        _ => &file["tokens"]["access_token"],
    };
    format!("Bearer {}", token.as_str().expect("a token"))
}

#[test]
fn nothing_is_added_that_the_client_did_not_send() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let bearer = access(&mux, "claude");
    assert_eq!(mux.ask("GET", "/claude/v1/models", &[], b"").status, 200);
    let expected = [
        ("anthropic-beta", "oauth-2025-04-20"),
        ("authorization", bearer.as_str()),
    ];
    assert_eq!(seen(&up), pairs(&expected));
    let request = up.requests().pop().expect("a request");
    assert_eq!(request.head.get("host"), Some(up.addr.to_string().as_str()));
    assert_eq!(request.head.get("content-length"), None);
    assert_eq!(request.head.get("transfer-encoding"), None);

    let file = login::read(&mux.state(), "chatgpt");
    let account = file["tokens"]["account_id"].as_str().expect("an account");
    assert_eq!(mux.ask("GET", "/chatgpt/v1/models", &[], b"").status, 200);
    let bearer = access(&mux, "chatgpt");
    let expected = [
        ("authorization", bearer.as_str()),
        ("chatgpt-account-id", account),
    ];
    assert_eq!(seen(&up), pairs(&expected));
}

#[test]
fn the_clients_secrets_and_the_hops_headers_stay_here() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let dropped = [
        ("x-api-key", TOKEN),
        ("Cookie", "session=1"),
        ("Expect", "100-continue"),
        ("Connection", "keep-alive, X-Private, te, Content-Length"),
        ("X-Private", "1"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Trailer", "x-sum"),
        ("Upgrade", "h2c"),
        ("Proxy-Authorization", "Basic eA=="),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Whatever", "1"),
        ("Forwarded", "for=1.2.3.4"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("X-Forwarded-Proto", "https"),
        ("x-forwarded-anything", "1"),
        ("X-Real-IP", "1.2.3.4"),
        ("x-kept", "yes"),
    ];
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[&[BEARER], &dropped[..]].concat(), b"{}");
    assert_eq!(client.head().word(1), "100");
    assert_eq!(client.answer().status, 200);
    // A length tells where the body ends, whatever `Connection` names.
    let head = up.requests().pop().expect("a request").head;
    let framing = (head.get("content-length"), head.get("transfer-encoding"));
    assert_eq!(framing, (Some("2"), None));
    let bearer = access(&mux, "claude");
    let expected = [
        ("anthropic-beta", "oauth-2025-04-20"),
        ("authorization", bearer.as_str()),
        ("x-kept", "yes"),
    ];
    assert_eq!(seen(&up), pairs(&expected));
}

#[test]
fn a_client_cannot_choose_the_account() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let file = login::read(&mux.state(), "chatgpt");
    let account = file["tokens"]["account_id"].as_str().expect("an account");
    for name in [
        "ChatGPT-Account-Id",
        "chatgpt-account-id",
        "CHATGPT-ACCOUNT-ID",
    ] {
        assert_eq!(
            mux.ask("POST", RESPONSES, &[(name, "another")], b"{}")
                .status,
            200
        );
        let request = up.requests().pop().expect("a request");
        assert_eq!(request.head.all("chatgpt-account-id"), [account]);
    }
    // Nor where there is none that would replace it.
    let mut login = up.login("chatgpt", 3600);
    login.access = noise();
    up.accept(&login);
    let mut file = login.flat();
    file["account_id"] = Value::Null;
    login::save(&mux.state(), "chatgpt", &file);
    for target in [RESPONSES, MESSAGES] {
        let sent = [("chatgpt-account-id", "another")];
        assert_eq!(mux.ask("POST", target, &sent, b"{}").status, 200);
        let request = up.requests().pop().expect("a request");
        assert_eq!(request.head.get("chatgpt-account-id"), None, "{target}");
    }
}

#[test]
fn everything_else_goes_through_byte_for_byte() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let sent = [
        ("User-Agent", "claude-cli/2.0 (external, cli)"),
        ("Accept", "application/json, */*;q=0.1"),
        ("Accept-Encoding", "gzip, deflate, br, zstd"),
        ("Accept-Language", ""),
        ("Content-Type", "application/json; charset=utf-8"),
        ("Content-Encoding", "zstd"),
        ("anthropic-version", "2023-06-01"),
        ("X-Codex-Turn-State", "  \"a\tb\"  ,  c"),
        ("x-codex-beta", "!#$%&'*+-.^_`|~()<>@,;:\\/[]?={}"),
        ("Session_id", "0-1"),
        ("x-stainless-retry-count", "0"),
        ("If-None-Match", "W/\"x\""),
        ("Range", "bytes=0-1"),
        ("Referer", "x"),
        ("Via", "1.1 somewhere"),
        ("Origin", "https://example.org"),
        ("X-Repeat", "b"),
        ("X-Other", "between"),
        ("x-repeat", "a, c"),
        ("X-REPEAT", "b"),
    ];
    assert_eq!(mux.ask("POST", MESSAGES, &sent, b"{}").status, 200);
    let request = up.requests().pop().expect("a request");
    for (name, _) in sent {
        let all = sent.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let values: Vec<_> = all.map(|(_, value)| value.trim()).collect();
        assert_eq!(request.head.all(name), values, "{name}");
    }
    assert_eq!(seen(&up).len(), sent.len() + 2, "{:?}", seen(&up));
}

/// A line of 8 KiB, with its CR but not its LF, is the longest.
#[test]
fn a_long_line_is_passed_on_whole() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let value = "x".repeat((8 << 10) - "x-long: \r".len());
    let ask = |value: &str| {
        mux.ask("POST", MESSAGES, &[("x-long", value)], b"{}")
            .status
    };
    assert_eq!(ask(&value), 200);
    let request = up.requests().pop().expect("a request");
    assert_eq!(request.head.get("x-long"), Some(value.as_str()));
    assert_eq!(ask(&format!("{value}x")), 431);
    let query = "x".repeat((8 << 10) - "POST ? HTTP/1.1\r".len() - MESSAGES.len());
    let target = format!("{MESSAGES}?{query}");
    assert_eq!(mux.ask("POST", &target, &[], b"{}").status, 200);
    let request = up.requests().pop().expect("a request");
    assert!(request.head.word(1).ends_with(&query));
    assert_eq!(
        mux.ask("POST", &format!("{target}x"), &[], b"{}").status,
        431
    );
}

#[test]
fn anthropic_headers_do_not_go_to_chatgpt() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let sent = [
        ("anthropic-beta", "a"),
        ("Anthropic-Version", "b"),
        ("x-kept", "c"),
    ];
    assert_eq!(mux.ask("POST", RESPONSES, &sent, b"{}").status, 200);
    let names: Vec<_> = seen(&up).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["authorization", "chatgpt-account-id", "x-kept"]);
}

#[test]
fn the_oauth_beta_is_there_once_and_the_clients_own_stay_in_order() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let name = "Anthropic-Beta";
    for (sent, expected) in [
        (vec![], vec!["oauth-2025-04-20"]),
        (vec!["b-1,a-2"], vec!["b-1", "a-2", "oauth-2025-04-20"]),
        (
            vec!["b-1", "a-2, c-3"],
            vec!["b-1", "a-2", "c-3", "oauth-2025-04-20"],
        ),
        (vec!["oauth-2025-04-20"], vec!["oauth-2025-04-20"]),
        (
            vec!["b-1,oauth-2025-04-20,a-2"],
            vec!["b-1", "oauth-2025-04-20", "a-2"],
        ),
        (
            vec!["oauth-2025-04-20", "b-1", "oauth-2025-04-20"],
            vec!["oauth-2025-04-20", "b-1"],
        ),
        (vec![""], vec!["oauth-2025-04-20"]),
        (vec!["b-1,,a-2,"], vec!["b-1", "a-2", "oauth-2025-04-20"]),
        (
            vec!["not-oauth-2025-04-20"],
            vec!["not-oauth-2025-04-20", "oauth-2025-04-20"],
        ),
    ] {
        let headers: Vec<_> = sent.iter().map(|value| (name, *value)).collect();
        assert_eq!(mux.ask("POST", MESSAGES, &headers, b"{}").status, 200);
        let request = up.requests().pop().expect("a request");
        let values = request.head.all(name).join(",");
        let values: Vec<_> = values.split(',').map(str::trim).collect();
        assert_eq!(values, expected, "{sent:?}");
    }
}

#[test]
fn configured_headers_replace_the_clients() {
    let up = Upstream::plain();
    for value in ["hQ7 wR2k hQ7", "Qm8Zt4Rw"] {
        up.secret(value);
    }
    let headers = json!({"X-Team": "hQ7 wR2k hQ7", "user-agent": "Qm8Zt4Rw"});
    let beta = json!({"Anthropic-Beta": "ours-1, ours-2"});
    let setup = Setup::new(&up).provider(0, "headers", beta);
    let mux = setup.provider(1, "headers", headers).start();
    let sent = [
        ("x-team", "mine"),
        ("X-TEAM", "again"),
        ("User-Agent", "client/1"),
        ("anthropic-beta", "theirs-1"),
    ];
    assert_eq!(mux.ask("POST", RESPONSES, &sent, b"{}").status, 200);
    let request = up.requests().pop().expect("a request");
    assert_eq!(request.head.all("x-team"), ["hQ7 wR2k hQ7"]);
    assert_eq!(request.head.all("user-agent"), ["Qm8Zt4Rw"]);
    assert_eq!(mux.ask("POST", MESSAGES, &sent, b"{}").status, 200);
    let request = up.requests().pop().expect("a request");
    assert_eq!(
        request.head.all("x-team"),
        ["mine", "again"],
        "the other provider has none"
    );
    // Without this one, upstream takes no login.
    assert_eq!(
        request.head.all("anthropic-beta").join(","),
        "ours-1,ours-2,oauth-2025-04-20"
    );
}

#[test]
fn a_value_that_is_not_ascii_is_400() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    for value in ["é", "日本", "\u{80}"] {
        let answer = mux.ask("POST", MESSAGES, &[("x-name", value)], b"{}");
        assert_eq!(answer.status, 400, "{value}");
        answer.error();
    }
    assert_eq!(up.requests().len(), 0);
}

/// Two that are short enough become one that is not.
#[test]
fn a_header_that_is_too_long_when_merged_is_431() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let long = "b".repeat(6000);
    let twice = [("anthropic-beta", long.as_str()); 2];
    let answer = mux.ask("POST", MESSAGES, &twice, b"{}");
    assert_eq!(answer.status, 431);
    answer.error();
    assert_eq!(mux.ask("POST", MESSAGES, &twice[..1], b"{}").status, 200);
}

#[test]
fn a_post_without_a_body_stays_one() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    assert_eq!(
        mux.client()
            .start("POST", MESSAGES, &[BEARER])
            .answer()
            .status,
        200
    );
    let head = up.requests().pop().expect("a request").head;
    let framing = (head.get("content-length"), head.get("transfer-encoding"));
    assert_eq!(framing, (Some("0"), None));
}

/// Nearly as large as a head may be, and with nearly as many fields.
#[test]
fn a_large_head_is_passed_on() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let value = "x".repeat(300);
    let names: Vec<_> = (0..90).map(|number| format!("x-{number}")).collect();
    let headers: Vec<_> = names.iter().map(|n| (n.as_str(), value.as_str())).collect();
    assert_eq!(mux.ask("POST", MESSAGES, &headers, b"{}").status, 200);
    let head = up.requests().pop().expect("a request").head;
    assert!(names.iter().all(|name| head.get(name) == Some(&value)));
}
